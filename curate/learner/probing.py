"""`curate probe`: what an estimator is worth on one fixed batch of shards, before a run is spent on it.

Reads the shards' index, decodes what `open_pairs` keeps, and measures with `curate.estimators.probe`: some 20 estimates
and as many backward passes. As in training, only vocabulary rows that occur in the shards count as parameters.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from curate.errors import UsageError
from curate.estimators.names import NAMES, make_estimator
from curate.estimators.probe import ProbeReport, probe, render
from curate.estimators.problem import DualEncoderProblem
from curate.learner.dataset import PairSource, open_pairs
from curate.learner.settings import Loss, TrainSettings
from curate.learner.start import Start, prepare
from curate.learner.vocabulary import occurring
from curate.models.build import build, config_of, safe_weights, tokenizer_of
from curate.models.precision import choose_device
from curate.models.preprocess import Preprocess
from curate.models.spec import parse_spec
from curate.shards.sources import Patterns, expand_shards

# B batch, C channels, H, W height and width, T tokens
ALL = "all"
_WITH_TANGENTS = ("forward", "forward-dense", "forward-activity", "zeroth-order", "hybrid")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A report for each estimator that ran, best first, and for each other one why it did not. `pairs` is the batch."""

    model: str
    loss: str
    pairs: int
    reports: tuple[ProbeReport, ...]
    refused: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain values; `hopeless` stands beside each report's numbers."""
        return {
            "model": self.model,
            "loss": self.loss,
            "pairs": self.pairs,
            "reports": [{**asdict(report), "hopeless": report.hopeless} for report in self.reports],
            "refused": self.refused,
        }


def probe_shards(
    shards: Patterns,
    *,
    estimator: str = "forward",
    model: str = "curate-tiny",
    tangents: int = 1,
    rules: str = "",
    batch: int = 64,
    seeds: int = 16,
    loss: Loss | None = None,
    seed: int = 0,
    device: str = "auto",
) -> ProbeResult:
    """Measure an estimator, or all that run on the model (`estimator="all"`), against backprop on one batch of pairs.

    `model` is an architecture, initialised from `seed`, or a checkpoint; `loss` is the checkpoint's own there, sigmoid
    otherwise. The batch is drawn from the shards by `seed`. Errors: UsageError for an unknown estimator, one that
    cannot run on this model, fewer than 2 pairs or seeds, a loss that the checkpoint does not have; ModelError;
    ShardError. Example: `probe(["shards/{0..3}.tar"], estimator="forward").reports[0].hopeless`.
    """
    names = _names(estimator, rules)
    for name in names:
        _make(name, tangents, rules, alone=estimator != ALL)  # refuse before anything is read
    if batch < 2:
        raise UsageError(f"batch {batch} holds no negative pair; use at least 2")
    start = _start(model, loss, seed)
    on = choose_device(device)
    module = start.module.to(on).train()
    with open_pairs(expand_shards(shards), start.tokenizer, start.rule) as opened:
        image_BCHW, token_BT = _one_batch(opened.pairs, batch, seed)
        with occurring(module, opened.pairs.token_NT) as vocabulary:
            pairs = image_BCHW.to(on), vocabulary.compact(token_BT).to(on)
            reports, refused = _measured(names, DualEncoderProblem(module), pairs, tangents, rules, seeds, seed)
    if estimator != ALL and refused:
        raise UsageError(next(iter(refused.values())))
    reports.sort(key=lambda report: -report.progress)
    named = "softmax" if getattr(module, "logit_bias", None) is None else "sigmoid"
    return ProbeResult(model, named, len(token_BT), tuple(reports), refused)


def render_probe(result: ProbeResult) -> str:
    """One report as `curate.estimators.probe.render` shows it; several as a table, best first."""
    about = f"{result.model}, {result.loss} loss, one batch of {result.pairs} pairs"
    if len(result.reports) == 1 and not result.refused:
        return f"{about}\n{render(result.reports[0])}"
    refused = [why if why.startswith(f"{name}:") else f"{name}: {why}" for name, why in result.refused.items()]
    return "\n".join((about, _table(result.reports), *refused))


def _names(estimator: str, rules: str) -> tuple[str, ...]:
    if estimator != ALL:
        return (estimator,)
    return tuple(name for name in NAMES if name != "hybrid" or rules)


def _make(name: str, tangents: int, rules: str, *, alone: bool) -> Any:
    """Among `all`, each estimator takes the options that it has."""
    takes = alone or name in _WITH_TANGENTS
    return make_estimator(name, tangents=tangents if takes else 1, rules=rules if alone or name == "hybrid" else "")


def _start(model: str, loss: Loss | None, seed: int) -> Start:
    """The model in float32, its tokenizer and its rule for images."""
    spec = parse_spec(model)
    if spec.kind == "untrained":
        return prepare(TrainSettings(model=model, loss=loss or "sigmoid", seed=seed))
    module: Any = build(spec, safe_weights(spec), "fp32", seed)
    own = "softmax" if getattr(module, "logit_bias", None) is None else "sigmoid"
    if loss is not None and loss != own:
        raise UsageError(f"--loss {loss}: {model} was trained with the {own} loss; leave the option out")
    rule = Preprocess.from_config(dict(module.visual.preprocess_cfg))
    return Start(module, config_of(spec), tokenizer_of(spec), rule)


def _one_batch(pairs: PairSource, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    image_BCHW, token_BT = pairs.batch(order[:batch].tolist())
    if len(token_BT) < 2:
        raise UsageError(f"probe: {len(token_BT)} readable pairs in the batch; at least 2 are needed")
    return image_BCHW, token_BT


def _measured(
    names: tuple[str, ...], problem: DualEncoderProblem, pairs: Any, tangents: int, rules: str, seeds: int, seed: int
) -> tuple[list[ProbeReport], dict[str, str]]:
    reports, refused = [], {}
    for name in names:
        made = _make(name, tangents, rules, alone=len(names) == 1)
        try:
            reports.append(probe(made, problem, pairs, seeds=seeds, seed=seed))
        except UsageError as error:
            refused[name] = str(error)
    return reports, refused


def _table(reports: tuple[ProbeReport, ...]) -> str:
    rows = [("estimator", "K", "cosine", "R", "ms", "MiB", "progress/s", "")]
    for report in reports:
        cells = (f"{report.tangents}", f"{report.cosine:.4f}", f"{report.ratio:,.4g}", f"{report.milliseconds:.1f}",
                 f"{report.peak_mib:.1f}", f"{report.progress:.3g}")  # fmt: skip
        rows.append((report.estimator, *cells, "hopeless" if report.hopeless else ""))
    control = next((r.heads_progress for r in reports if r.heads_progress is not None), None)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip()
             for row in rows]  # fmt: skip
    if reports:
        lines.append(
            f"numbers d = {reports[0].dimensions:,}; R = E|g_hat|^2/|g|^2; progress per second is backprop's = 1"
        )
    if control is not None:
        lines.append(f"heads only, exact: {control:.3g} of backprop's progress per second")
    return "\n".join(lines)
