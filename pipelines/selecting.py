"""Draw one super-batch from stored scores: duplicates leave, a sampler draws, no model is touched.

Rows are put in the order of their sample ids first, so nothing here depends on how the input was listed. Memory
O(B D): the embeddings of one super-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from curate import duplicates, scores
from curate.pipelines.planning import SuperBatch
from curate.pipelines.ruling import Ruled
from curate.policy.drawing import ConstrainedDraw
from curate.policy.fixed_scores import draw_alone_within
from curate.policy.price import Price, draw_priced
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.selection.independent import draw_alone
from curate.selection.joint import Draw, Pairs, draw_joint
from curate.settings import SelectSettings

# B candidates of the super-batch in the order of their ids, U of them unique, b drawn

_ROLES = (("reference", "ref"), ("learner", "learner"))
SELECTION = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("shard", pa.int32()),
        ("row", pa.int32()),  # of the shard's score table
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("rank", pa.int32()),
        ("chunk", pa.int16()),
        ("score", pa.float32()),
    ]
)


@dataclass(frozen=True, slots=True)
class SelectSpec:
    """One super-batch to draw: where its shards' score tables are, and how to draw."""

    output: Path
    batch: SuperBatch
    tables: dict[int, tuple[Path, str]]  # input shard -> (path of its score table, its sha256)
    models: dict[str, Any]  # role -> {"scale", "bias", ...}
    settings: SelectSettings
    threads: int
    ruled: Ruled | None = None

    @property
    def unit(self) -> Unit:
        pieces = [[piece.shard, self.tables[piece.shard][1], piece.start, piece.stop] for piece in self.batch.pieces]
        settings = self.settings.model_dump(exclude={"keep", "sub_batch", "super_batch", "policy"})
        inputs = {"pieces": pieces, "number": self.batch.number, "size": self.batch.size, "settings": settings}
        ruled = {} if self.ruled is None else {"policy": self.ruled.as_json()}
        return Unit("selection", inputs | {"models": self.models} | ruled)


def select_super_batch(spec: SelectSpec) -> Receipt:
    """The receipt of one drawn super-batch; its facts count candidates, duplicates and drawn samples."""
    return Store.of(spec.output).commit(spec.unit, functools.partial(_select, spec))


def _select(spec: SelectSpec, attempt: Attempt) -> dict[str, Any]:
    rows = _candidates(spec, _scored(spec))
    reason_B, detail_B = _find_duplicates(rows, spec.settings)
    unique_U = np.flatnonzero(reason_B == "")
    size = min(spec.batch.size, len(unique_U))
    draw, ruled = _draw(spec, rows, unique_U, size)
    table = _as_table(rows, reason_B, detail_B, unique_U, draw)
    with attempt.open(".parquet") as file:
        scores.write_table(file, table, {"super_batch": spec.batch.number, "size": size})
    return {
        "super_batch": spec.batch.number,
        "candidates": len(reason_B),
        "duplicates": len(reason_B) - len(unique_U),
        "asked": spec.batch.size,
        "drawn": size,
        "kernel": None if draw is None else draw.kernel,
        "shards": [piece.shard for piece in spec.batch.pieces],
    } | ruled


def drawable(spec: SelectSpec) -> pa.Table:
    """sample_id, shard and row of the candidates that may be drawn: readable, and no duplicate of another."""
    rows = _candidates(spec)
    reason_B, _ = _find_duplicates(rows, spec.settings)
    return rows.select(["sample_id", "shard", "row"]).filter(pa.array(reason_B == ""))


def _candidates(spec: SelectSpec, scored: Sequence[str] = ()) -> pa.Table:
    """The super-batch's readable rows, with their shard and row numbers, in the order of their ids."""
    columns = ["sample_id", "key", "reason", "image_digest", "caption_digest", "dhash", *scored]
    parts = []
    for piece in spec.batch.pieces:
        table = scores.read_table(spec.tables[piece.shard][0], columns)
        table = table.append_column("row", pa.array(np.arange(len(table), dtype=np.int32)))
        table = table.filter(pc.is_null(table["reason"])).slice(piece.start, piece.stop - piece.start)
        parts.append(table.append_column("shard", pa.array(np.full(len(table), piece.shard, np.int32))))
    return pa.concat_tables(parts).sort_by([("sample_id", "ascending"), ("shard", "ascending")]).combine_chunks()


def _scored(spec: SelectSpec) -> list[str]:
    """The columns that the criterion asks for: embeddings of models, or scores."""
    needed = {"learnability": ("ref_", "learner_"), "easy-reference": ("ref_",), "hard-learner": ("learner_",)}
    prefixes = {**needed, "alignment": ("alignment",)}[spec.settings.criterion]
    return [name for name in (*scores.TOWERS, "alignment") if name.startswith(prefixes)]


def _find_duplicates(rows: pa.Table, settings: SelectSettings) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Reason and detail of each row; both empty for those that may be drawn.

    A shard that is given twice has the same ids twice; the sampler needs them distinct, whatever the setting.
    """
    B = len(rows)
    reason_B, detail_B = np.full(B, "", object), np.full(B, "", object)
    ids_B = scores.ids_to_array(rows["sample_id"])
    if settings.deduplicate == "off":
        original_B = duplicates.exact_originals(ids_B, ids_B)
    else:
        digests = (scores.ids_to_array(rows[name]) for name in ("image_digest", "caption_digest"))
        original_B = duplicates.exact_originals(*digests)
    _mark(rows, original_B, "duplicate-exact", reason_B, detail_B)
    if settings.deduplicate == "near":
        unique_U = np.flatnonzero(reason_B == "")
        original_B = np.arange(B)
        original_B[unique_U] = unique_U[duplicates.near_originals(scores.ids_to_array(rows["dhash"])[unique_U])]
        _mark(rows, original_B, "duplicate-near", reason_B, detail_B)
    return reason_B, detail_B


def _mark(
    rows: pa.Table,
    original_B: NDArray[np.int64],
    reason: str,
    reason_B: NDArray[np.object_],
    detail_B: NDArray[np.object_],
) -> None:
    for row in np.flatnonzero(original_B != np.arange(len(original_B))):
        first = int(original_B[row])
        reason_B[row] = reason
        detail_B[row] = f"of {rows['key'][first].as_py()} in input shard {rows['shard'][first].as_py()}"


def _draw(
    spec: SelectSpec, rows: pa.Table, unique_U: NDArray[np.int64], size: int
) -> tuple[Draw | None, dict[str, Any]]:
    """The draw (None of nothing), and what a policy adds to the facts."""
    settings, ids_U = spec.settings, scores.ids_to_array(rows["sample_id"])[unique_U]
    how: dict[str, Any] = {"gain": settings.gain, "seed": settings.seed, "step": spec.batch.number}
    plain: Callable[..., Draw] = draw_joint
    within: Callable[..., tuple[ConstrainedDraw, Price]] = draw_priced
    given: tuple[Any, ...]
    if settings.criterion == "alignment":
        given, plain, within = (rows["alignment"].to_numpy()[unique_U], ids_U), draw_alone, draw_alone_within
    else:
        given = (*(_pairs(spec, rows, unique_U, *role) for role in _ROLES), ids_U)
        how |= {"chunks": settings.chunks, "criterion": settings.criterion, "loss": settings.loss}
        how |= {"threads": spec.threads}
    if spec.ruled is None:
        return (plain(*given, size=size, **how) if size else None), {}
    candidates = rows.select(["sample_id", "shard", "row"]).take(unique_U)
    draw, facts = spec.ruled.draw(candidates, size, functools.partial(within, *given, **how))
    return draw, {"policy": facts}


def _pairs(spec: SelectSpec, rows: pa.Table, unique_U: NDArray[np.int64], role: str, prefix: str) -> Pairs | None:
    if f"{prefix}_image" not in rows.column_names:
        return None
    model = spec.models[role]
    image_UD, text_UD = (
        torch.from_numpy(scores.unpack(rows[f"{prefix}_{tower}"])[unique_U]) for tower in ("image", "text")
    )
    return Pairs(image_UD, text_UD, model["scale"], model["bias"])


def _as_table(
    rows: pa.Table,
    reason_B: NDArray[np.object_],
    detail_B: NDArray[np.object_],
    unique_U: NDArray[np.int64],
    draw: Draw | None,
) -> pa.Table:
    B = len(rows)
    rank_B, chunk_B, score_B = np.full(B, -1, np.int32), np.full(B, -1, np.int16), np.full(B, np.nan, np.float32)
    reason_B = reason_B.copy()
    reason_B[unique_U] = "not-selected"
    if draw is not None:
        drawn_b = unique_U[draw.index_b]
        reason_B[drawn_b] = "selected"
        rank_B[drawn_b], chunk_B[drawn_b] = np.arange(len(drawn_b)), draw.chunk_b
        score_B[unique_U] = draw.logit_B
    columns = {
        "sample_id": rows["sample_id"],
        "shard": rows["shard"],
        "row": rows["row"],
        "reason": pa.array(reason_B, pa.string()),
        "detail": pa.array(detail_B, pa.string()),
        "rank": pa.array(rank_B, mask=rank_B < 0),
        "chunk": pa.array(chunk_B, mask=chunk_B < 0),
        "score": pa.array(score_B, mask=np.isnan(score_B)),
    }
    return pa.table(columns, schema=SELECTION)
