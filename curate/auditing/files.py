"""An audit as tables: `groups.parquet` with a row per group, `assignments.parquet` with a row per sample of the pool.

The second holds who was put into which group, so that every count of the first can be made again from it.
"""

# N rows of the pool, G groups

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curate.auditing.columns import Column
from curate.auditing.outcome import Audit, ColumnAudit, GroupRow
from curate.auditing.strata import Ratio
from curate.evaluation.interval import Share

_THREE: Final = ("", "_low", "_high")
_CONDITIONAL: Final = pa.struct(
    [
        ("confounder", pa.string()),
        *((f"ratio{end}", pa.float64()) for end in _THREE),
        ("p", pa.float64()),
        ("homogeneity_p", pa.float64()),
        ("strata", pa.int64()),
        ("covered", pa.float64()),
        ("explains", pa.string()),
    ]
)
GROUPS: Final = pa.schema(
    [
        ("column", pa.string()),
        ("kind", pa.string()),
        ("group", pa.string()),
        ("is_unknown", pa.bool_()),
        ("pool", pa.int64()),
        ("selected", pa.int64()),
        ("never_selected", pa.int64()),
        ("share_of_pool", pa.float64()),
        ("share_of_selected", pa.float64()),
        ("votes", pa.float64()),  # what the rows weigh in the test: near-duplicates together hardly more than one
        *((f"rate{end}", pa.float64()) for end in _THREE),
        *((f"ratio{end}", pa.float64()) for end in _THREE),  # to the rest of the column; of the votes
        ("ratio_of_rows", pa.float64()),
        *((f"corrected{end}", pa.float64()) for end in _THREE),
        ("cohens_h", pa.float64()),
        ("test", pa.string()),
        ("p", pa.float64()),
        ("q", pa.float64()),
        ("level", pa.string()),
        ("untested", pa.string()),
        ("could_see_below", pa.float64()),
        ("could_see_above", pa.float64()),
        ("conditional", pa.list_(_CONDITIONAL)),
        *((f"shrunken{end}", pa.float64()) for end in _THREE),
        ("times_drawn", pa.int64()),
        ("share_of_draws", pa.float64()),
        ("draws_per_sample", pa.float64()),
        ("learner_loss", pa.float64()),
        ("reference_loss", pa.float64()),
        ("quadrant", pa.string()),
        ("score_quantiles", pa.list_(pa.float64())),  # at 10, 25, 50, 75 and 90 %
        ("early", pa.int64()),
        ("late", pa.int64()),
        *((f"late_ratio{end}", pa.float64()) for end in _THREE),
        ("late_q", pa.float64()),
    ]
)


def groups_table(audit: Audit) -> pa.Table:
    """Every group of every column, as `GROUPS`."""
    rows = [_row(column, row) for column in audit.columns for row in column.groups]
    return pa.Table.from_pylist(rows, GROUPS)


def assignments_table(rows: pa.Table, columns: Sequence[Column], times_N: NDArray[np.int64]) -> pa.Table:
    """Per sample of the pool its identity, how often it was selected, and its groups in every column.

    A column of disjoint groups holds names, one of overlapping groups lists of names; null is not known.
    """
    names = [name for name in ("sample_id", "key", "uid", "shard_url") if name in rows.column_names]
    found = {name: rows[name] for name in names} | {"times_selected": pa.array(times_N)}
    for column in columns:
        found[_free(column.name, found)] = _lists(column) if column.overlapping else _names(column)
    return pa.table(found)


def _free(name: str, taken: Any) -> str:
    return name if name not in taken else _free(f"{name} (group)", taken)


def _names(column: Column) -> pa.Array:
    assert column.codes_N is not None
    codes = pa.array(column.codes_N, mask=column.codes_N < 0)
    return pa.DictionaryArray.from_arrays(codes, pa.array(column.names, pa.string()))


def _lists(column: Column) -> pa.Array:
    members_NG, known_N = column.members, column.is_known
    ends = np.concatenate([[0], np.cumsum(members_NG.sum(1))]).astype(np.int32)
    codes = pa.DictionaryArray.from_arrays(
        pa.array(np.nonzero(members_NG)[1].astype(np.int32)), pa.array(column.names, pa.string())
    )
    return pa.ListArray.from_arrays(pa.array(ends), codes, mask=pa.array(~known_N))


def _row(column: ColumnAudit, row: GroupRow) -> dict[str, Any]:
    plain = {name: getattr(row, name) for name in GROUPS.names if hasattr(row, name)}
    plain |= _three("rate", row.rate) | _three("ratio", row.ratio) | _three("corrected", row.corrected)
    plain |= _three("shrunken", row.shrunken) | {"kind": column.kind}
    plain |= {"could_see_below": row.could_see.below, "could_see_above": row.could_see.above}
    plain["conditional"] = [
        {name: getattr(one, name) for name in _CONDITIONAL.names if hasattr(one, name)} | _three("ratio", one.ratio)
        for one in row.conditional
    ]
    if row.exposures is not None:
        drawn = row.exposures
        plain |= {
            "times_drawn": drawn.exposures, "share_of_draws": drawn.share, "draws_per_sample": drawn.per_selected,
        }  # fmt: skip
    if row.losses is not None:
        plain |= {
            "learner_loss": row.losses.learner, "reference_loss": row.losses.reference, "quadrant": row.losses.quadrant,
        }  # fmt: skip
    if row.early_late is not None:
        when = row.early_late
        plain |= {"early": when.early, "late": when.late, "late_q": when.q} | _three("late_ratio", when.ratio)
    return plain


def _three(name: str, value: Share | Ratio | None) -> dict[str, float | None]:
    numbers = (None, None, None) if value is None else (value.value, value.low, value.high)
    return {f"{name}{end}": number for end, number in zip(_THREE, numbers, strict=True)}
