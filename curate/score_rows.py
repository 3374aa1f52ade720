"""From samples as read and embeddings as computed to rows of the score table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate import scores
from curate.reading import Sample
from curate.scores import safe_text

# N rows, M of them readable, D width

PREFIX: Final = {"reference": "ref", "learner": "learner"}


class PairModel(Protocol):
    """What the table needs to know of a model."""

    @property
    def loss(self) -> Any: ...
    @property
    def scale(self) -> float: ...
    @property
    def bias(self) -> float: ...
    @property
    def width(self) -> int: ...


def score_schema(models: Mapping[str, PairModel]) -> pa.Schema:
    """The table's columns for these models (role -> model)."""
    return scores.schema(
        {f"{PREFIX[role]}_{tower}": model.width for role, model in models.items() for tower in ("image", "text")}
    )


def spread(embedding_MD: NDArray[np.float32], readable_N: NDArray[np.bool_]) -> pa.Array:
    """Rows [M, D] of readable samples over all N rows, fp16, null where a sample could not be read."""
    full_ND = np.zeros((len(readable_N), embedding_MD.shape[1]), "<f2")
    full_ND[readable_N] = embedding_MD
    packed = scores.pack(full_ND)
    validity = pa.py_buffer(np.packbits(readable_N, bitorder="little").tobytes())
    return pa.Array.from_buffers(packed.type, len(packed), [validity, packed.buffers()[1]])


def score_rows(samples: Sequence[Sample], towers: Mapping[str, pa.Array], models: Mapping[str, PairModel]) -> pa.Table:
    """One row per sample; `towers` has the columns of `spread`, by name."""
    columns: dict[str, Any] = {
        "sample_id": [s.entry.sample_id for s in samples],
        "ordinal": [s.entry.ordinal for s in samples],
        "key": [safe_text(s.entry.key) for s in samples],
        "uid": [s.uid for s in samples],
        "reason": [s.reason for s in samples],
        "detail": [safe_text(s.detail) for s in samples],
        "members": [[_member_row(m) for m in s.entry.members] for s in samples],
        "payload_digest": [s.payload_digest for s in samples],
        "image_digest": [s.image_digest for s in samples],
        "caption_digest": [s.caption_digest for s in samples],
        "width": [s.header.width if s.header else None for s in samples],
        "height": [s.header.height if s.header else None for s in samples],
        "caption_bytes": [len(s.caption.encode()) if s.caption is not None else None for s in samples],
        "sharpness": [s.signals.sharpness if s.signals else None for s in samples],
        "dhash": [s.signals.dhash if s.signals else None for s in samples],
        **towers,
    }
    unreadable_N = np.array([sample.reason is not None for sample in samples], bool)
    for role, model in models.items():
        columns |= _pair_columns(role, model, towers, unreadable_N)
    layout = score_schema(models)
    return pa.Table.from_arrays([_array(columns.get(f.name), f, len(samples)) for f in layout], schema=layout)


def _member_row(member: Any) -> dict[str, Any]:
    return {"name": safe_text(member.name), "offset": member.offset, "size": member.size}


def _array(values: Any, field: pa.Field, rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(rows, field.type)
    return values if isinstance(values, pa.Array) else pa.array(values, field.type)


def _pair_columns(
    role: str, model: PairModel, towers: Mapping[str, pa.Array], unreadable_N: NDArray[np.bool_]
) -> dict[str, pa.Array]:
    """Similarity of each pair as stored, and its own loss: -log sigmoid(a s + b), or the -a s of a softmax pair."""
    image_ND, text_ND = (
        scores.unpack(towers[f"{PREFIX[role]}_{tower}"]).astype(np.float32) for tower in ("image", "text")
    )
    similarity_N = np.einsum("nd,nd->n", image_ND, text_ND)
    logit_N = model.scale * similarity_N + model.bias
    loss_N = np.logaddexp(0, -logit_N) if model.loss == "sigmoid" else -logit_N
    return {
        f"{role}_similarity": pa.array(similarity_N.astype(np.float32), mask=unreadable_N),
        f"{role}_loss": pa.array(loss_N.astype(np.float32), mask=unreadable_N),
    }
