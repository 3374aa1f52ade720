"""What a model takes pictures for: the group whose prompts lie nearest, where its probability reaches the threshold.

A group is the normalised mean of its prompts' embeddings (arXiv 2103.00020, section 3.1.4). The probability is the
model's own: of a softmax model the softmax over the groups at its scale, which says which of them is nearest and adds
up to 1; of a sigmoid model sigmoid(scale cos + bias) of each group by itself, which says whether the prompt fits at
all, and so abstains from pictures of nothing that was named. Below the threshold, and where `otherwise` is nearest, the
model abstains. Cost: one caption per prompt and template; N D G multiplications.
"""

# N samples, n of them embedded, G groups (with `otherwise`, which comes last), P prompts, D width

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.auditing.attributes import Attribute, Attributes
from curate.auditing.columns import UNKNOWN, Column, distinct_names, shown
from curate.auditing.traits import facts_of, with_facts
from curate.evaluation.labels import fill

KIND: Final = "zero-shot"
PREDICTED: Final = "predicted:"  # and the column's name: its codes in a table of predictions
_SHORT: Final = 12  # digits of a digest

Loss = Literal["sigmoid", "softmax"]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]  # captions -> unit vectors [P, D]


def group_vectors(attribute: Attribute, templates: Sequence[str], embed: Embed) -> NDArray[np.float32]:
    """Unit vectors [G, D]: each group's prompts in all templates, averaged; `otherwise` last, where there is any."""
    asked = [group.prompts for group in attribute.groups] + ([attribute.otherwise] if attribute.otherwise else [])
    prompts = [[fill(template, prompt) for prompt in group for template in templates] for group in asked]
    vector_PD = embed([prompt for group in prompts for prompt in group])
    starts = np.cumsum([0, *map(len, prompts[:-1])])
    mean_GD = np.add.reduceat(vector_PD.astype(np.float64), starts) / np.array([[len(group)] for group in prompts])
    unit_GD: NDArray[np.float32] = (mean_GD / np.linalg.norm(mean_GD, axis=1, keepdims=True)).astype(np.float32)
    return unit_GD


def probabilities(
    image_nD: NDArray[np.floating], group_GD: NDArray[np.float32], *, loss: Loss, scale: float, bias: float
) -> NDArray[np.float64]:
    """[n, G], as the module says. Example: cosines 0.30 and 0.28 at scale 100 give 0.881 and 0.119 by softmax."""
    logit_nG = scale * (image_nD.astype(np.float32) @ group_GD.T).astype(np.float64) + bias
    if loss == "sigmoid":
        one_by_one: NDArray[np.float64] = np.exp(-np.logaddexp(0, -logit_nG))
        return one_by_one
    power_nG = np.exp(logit_nG - logit_nG.max(1, keepdims=True, initial=-np.inf))
    shared: NDArray[np.float64] = power_nG / power_nG.sum(1, keepdims=True)
    return shared


def guesses(probability_nG: NDArray[np.float64], threshold: float, groups: int) -> NDArray[np.int32]:
    """The best of the first `groups` groups, int32 [n]; -1 where it stays below the threshold or is not the best."""
    best_n = probability_nG.argmax(1)
    sure_n = (probability_nG.max(1, initial=0.0) >= threshold) & (best_n < groups)
    return np.where(sure_n, best_n, UNKNOWN).astype(np.int32)


def with_model(table: pa.Table, checkpoint: str, loss: Loss) -> pa.Table:
    """A table of predictions with what made them: the sha256 of the weights, and how probabilities come about."""
    return with_facts(table, {"checkpoint": checkpoint, "loss": loss})


def predicted_columns(
    attributes: Attributes, predictions: pa.Table, wanted: Collection[str] | None
) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """Columns of a pool's predictions, a row per sample, and a note on each: how often the model abstained.

    `predictions` has "predicted:NAME" for each column, int32: a group, -1 for abstained, null for no embedding.
    """
    made = [
        _column(attributes, attribute, predictions)
        for attribute in attributes.columns
        if wanted is None or shown(attribute.name) in wanted
    ]
    return tuple(column for column, _ in made), tuple(note for _, note in made)


def _column(attributes: Attributes, attribute: Attribute, predictions: pa.Table) -> tuple[Column, str]:
    codes, facts = predictions[PREDICTED + attribute.name], facts_of(predictions)
    codes_N = codes.fill_null(UNKNOWN).to_numpy().astype(np.int32)
    seen = len(codes) - codes.null_count
    abstained = (int((codes_N == UNKNOWN).sum()) - codes.null_count) / seen if seen else 0.0
    rule = "share of the softmax" if facts["loss"] == "softmax" else "sigmoid probability"
    model, name = attributes.model_name, shown(attribute.name)
    source = (
        f"predicted, not known: what {model} (sha256:{facts['checkpoint'][:_SHORT]}) takes a picture for, where its "
        f"{rule} is {attributes.threshold:g} or more; it abstained from {abstained:.1%}"
    )
    note = (
        f"{name}: {model} abstained from {abstained:.1%} of {seen:,} samples; what it takes the others for is its guess"
    )
    if codes.null_count:
        note += f", and {codes.null_count:,} images had no embedding"
    names = distinct_names([group.name for group in attribute.groups])
    return Column(name, KIND, source, names, codes_N, model=model), note
