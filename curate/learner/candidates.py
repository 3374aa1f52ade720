"""The pairs that a run may train on, with what the reference thinks of each: embeddings, looked up by sample id.

Embeddings are cached, not losses, because a loss depends on the batch (arXiv 2406.17711, section 2.2). Memory: 4 D
bytes for each pair, fp16.
"""

# N pairs of the source, M of them candidates, B a super-batch, D width of the reference

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from curate import scores
from curate.errors import UsageError
from curate.learner.dataset import PairSource
from curate.selection.criteria import LossName
from curate.selection.joint import Pairs


@dataclass(frozen=True, slots=True)
class Reference:
    """The reference's embeddings of all pairs (fp16 [N, D], zero where `known_N` is False), its scale, bias, loss."""

    image_ND: NDArray[np.float16]
    text_ND: NDArray[np.float16]
    known_N: NDArray[np.bool_]
    scale: float
    bias: float
    loss: LossName

    def rows(self, row_n: NDArray[np.int64]) -> Reference:
        """The same for some rows only."""
        sides = (self.image_ND[row_n], self.text_ND[row_n], self.known_N[row_n])
        return Reference(*sides, self.scale, self.bias, self.loss)

    def pairs(self, row_B: NDArray[np.int64]) -> Pairs:
        """Some rows as the sampler takes them, in float32."""
        image_BD, text_BD = (torch.from_numpy(side[row_B]).float() for side in (self.image_ND, self.text_ND))
        return Pairs(image_BD, text_BD, self.scale, self.bias)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows of `pairs` that may be drawn, and the reference where the criterion asks for one.

    `clean_N` is the truth where it is known (1 clean, 0 not), for the report alone.
    """

    pairs: PairSource
    row_M: NDArray[np.int64]
    reference: Reference | None = None
    clean_N: NDArray[np.int8] | None = None

    def __len__(self) -> int:
        return len(self.row_M)

    def without(self, row_n: NDArray[np.int64]) -> Candidates:
        """The same less some rows, which are held out."""
        kept_M = self.row_M[~np.isin(self.row_M, row_n)]
        return Candidates(self.pairs, kept_M, self.reference, self.clean_N)


def all_of(pairs: PairSource, reference: Reference | None = None, clean: Sequence[object] = ()) -> Candidates:
    """Every pair that the reference knows is a candidate. Errors: UsageError where it knows none."""
    row_M = np.arange(len(pairs)) if reference is None else np.flatnonzero(reference.known_N)
    if not len(row_M):
        raise UsageError("the reference's scores hold none of these samples; were the shards changed since?")
    return Candidates(pairs, row_M, reference, clean_labels(pairs.places.label_N, clean) if len(clean) else None)


def clean_labels(label_N: Sequence[object], clean: Sequence[object]) -> NDArray[np.int8]:
    """1 where a label is one of the `clean` ones, 0 where it is another; a missing field counts as the text "null"."""
    wanted = {str(value).lower() for value in clean}
    return np.array([str("null" if label is None else label).lower() in wanted for label in label_N], np.int8)


def read_reference(tables: Sequence[Path], id_N16: NDArray[np.uint8]) -> Reference:
    """Look the reference's embeddings up in score tables, one path per shard. Errors: UsageError for an empty list."""
    if not tables:
        raise UsageError("no score tables to read the reference's embeddings from")
    facts = scores.read_facts(tables[0])["models"]["reference"]
    N, D = len(id_N16), int(facts["width"])
    image_ND, text_ND, known_N = np.zeros((N, D), np.float16), np.zeros((N, D), np.float16), np.zeros(N, bool)
    rows = {identifier.tobytes(): row for row, identifier in enumerate(id_N16)}
    for path in tables:
        table = scores.read_table(path, ["sample_id", "reason", "ref_image", "ref_text"])
        table = table.filter(table["reason"].is_null())
        found = [(row, at) for at, i in enumerate(table["sample_id"].to_pylist()) if (row := rows.get(i)) is not None]
        if not found:
            continue
        row_n, at_n = np.array(found).T
        known_N[row_n] = True
        for name, side_ND in (("ref_image", image_ND), ("ref_text", text_ND)):
            side_ND[row_n] = scores.unpack(table[name])[at_n]
    return Reference(image_ND, text_ND, known_N, float(facts["scale"]), float(facts["bias"]), facts["loss"])
