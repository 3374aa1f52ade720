"""The verb that says what a gradient estimator is worth before a run is spent on it."""

from __future__ import annotations

from typing import Literal

from curate.cli.options import Json
from curate.cli.printing import print_json


def probe(
    *shards: str,
    estimator: str = "forward",
    model: str = "curate-tiny",
    tangents: int = 1,
    rules: str = "",
    batch: int = 64,
    seeds: int = 16,
    loss: Literal["sigmoid", "softmax"] | None = None,
    seed: int = 0,
    json: Json = False,
) -> int:
    """Measure a gradient estimator against backprop on one batch, up to its predicted progress per second.

    Below half of backprop's progress it is called hopeless. The control trains nothing but the heads, exactly.

    Example: curate probe shards/ --estimator forward --tangents 4

    Parameters
    ----------
    shards
        Files, directories, brace patterns or fsspec URLs.
    estimator
        backprop, backprop-checkpoint, forward, forward-dense, forward-activity, forward-local, local-backprop,
        forward-exact, zeroth-order, hybrid; or all, for a table of what runs on this model.
    model
        curate-tiny, curate-small, any architecture of open_clip, or a checkpoint (local-dir:...).
    tangents
        Directions per step, K.
    rules
        For hybrid, the first that matches decides: "logit_*:exact,*.mlp.*:forward,*:backprop".
    seeds
        Estimates from which variance and cosine are taken.
    loss
        The loss of an untrained model (sigmoid); a checkpoint has its own.
    """
    from curate.learner.probing import probe_shards, render_probe

    result = probe_shards(
        shards, estimator=estimator, model=model, tangents=tangents, rules=rules, batch=batch, seeds=seeds, loss=loss,
        seed=seed,
    )  # fmt: skip
    if json:
        return print_json(result.as_json())
    print(render_probe(result))
    return 0
