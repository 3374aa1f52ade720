"""Which rows of the pool belong to which groups of one column, as pairs (row, group): every count is one `bincount`.

About 10 ns a pair. Rows whose group is not known are a group of their own, "unknown": they stay visible and are
compared with the known rows, and no other group's rest has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from curate.auditing.columns import Column, check_group_count, column_of, distinct_names, shown
from curate.errors import UsageError

# N rows of the pool, M pairs of a row and a group, G groups, the unknown one among them

UNKNOWN_GROUP: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Membership:
    """Pairs (row_M, code_M) of a column; `unknown` is the code of the rows not known, None if there are none."""

    column: Column
    groups: tuple[str, ...]
    row_M: NDArray[np.intp]
    code_M: NDArray[np.intp]
    known_N: NDArray[np.bool_]
    unknown: int | None

    def tally(self, weight_M: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """The sum of the weights of each group's pairs [G], or their number."""
        tally_G: NDArray[np.float64] = np.bincount(self.code_M, weight_M, minlength=len(self.groups)).astype(np.float64)
        return tally_G


def membership_of(column: Column) -> Membership:
    """The pairs of a column, the unknown rows last. Example: codes 1, -1, 0 of groups (a, b) give (a, b, unknown)."""
    known_N = column.is_known
    if column.codes_N is not None:
        row_M, code_M = np.flatnonzero(known_N), column.codes_N[known_N].astype(np.intp)
    else:
        row_M, code_M = np.nonzero(column.members)
    lost = np.flatnonzero(~known_N)
    if not len(lost):
        return Membership(column, column.names, row_M, code_M, known_N, None)
    name = UNKNOWN_GROUP if UNKNOWN_GROUP not in column.names else f"{UNKNOWN_GROUP} (no label)"
    code_M = np.concatenate([code_M, np.full(len(lost), len(column.names), np.intp)])
    return Membership(
        column, (*column.names, name), np.concatenate([row_M, lost]), code_M, known_N, len(column.names)
    )  # fmt: skip


def as_column(name: str, values: Any, rows: int) -> Column:
    """A column of a `Column`, of one label per row (None, NaN and blank: not known), or of {group: mask over the rows}.

    Masks may overlap; None or NaN in one of them makes the row not known. Whole floats read as integers: 1.0 is "1".
    Errors: UsageError for a wrong length, values that are no labels, masks with other values than true and false, and
    more groups than anyone can compare. Example: `as_column("tone", ["dark", None], 2).names` is ("dark",).
    """
    if isinstance(values, Column):
        _check_length(values.name, len(values), rows)
        return values
    return _of_masks(name, values, rows) if isinstance(values, Mapping) else _of_labels(name, values, rows)


def _of_labels(name: str, values: Any, rows: int) -> Column:
    label_N = _series(values)
    _check_length(name, len(label_N), rows)
    try:
        code_N, found = pd.factorize(label_N, use_na_sentinel=True)
    except TypeError as error:
        raise UsageError(f"column {shown(name)!r}: its values are no labels ({error}); give one text a row") from None
    check_group_count(name, len(found))
    text = np.array([*(_text(value) for value in found), None], dtype=object)  # factorize's -1 is a missing value
    return column_of(text[code_N].tolist(), name=name, kind="label", provenance="labels given by the caller")


def _of_masks(name: str, masks: Mapping[Any, Any], rows: int) -> Column:
    check_group_count(name, len(masks))
    known_N, member_GN = np.ones(rows, bool), np.zeros((len(masks), rows), bool)
    for place, (group, given) in enumerate(masks.items()):
        mask_N = _series(given)
        _check_length(f"{name}: {group}", len(mask_N), rows)
        missing_N = mask_N.isna().to_numpy()
        if not mask_N[~missing_N].isin([True, False]).all():
            raise UsageError(f"column {shown(name)!r}, group {shown(str(group))!r}: a mask holds true and false only")
        known_N &= ~missing_N
        member_GN[place, ~missing_N] = mask_N[~missing_N].to_numpy(dtype=bool)
    names = distinct_names([str(group) for group in masks])
    members_NG = np.ascontiguousarray((member_GN & known_N).T)
    return Column(shown(name), "label", "masks given by the caller", names, members_NG=members_NG, known_N=known_N)


def _series(values: Any) -> pd.Series[Any]:
    return pd.Series(values.to_pandas() if hasattr(values, "to_pandas") else values)


def _text(value: Any) -> str | None:
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text if text.strip() else None


def _check_length(name: str, found: int, rows: int) -> None:
    if found != rows:
        raise UsageError(f"column {shown(name)!r} has {found:,} values for {rows:,} rows of the pool; give one a row")


def bins(values_N: Sequence[Any] | NDArray[Any], count: int = 5) -> NDArray[np.object_]:
    """Numbers as labels of about equally filled ranges, for strata such as caption length; None for a missing number.

    Equal numbers share a bin, so there may be fewer. Errors: UsageError for fewer than two bins or no numbers.
    Example: `bins([1, 2, 30, 40], 2)` is ["1 to 2", "1 to 2", "30 to 40", "30 to 40"].
    """
    if count < 2:
        raise UsageError(f"{count} bins separate nothing; give 2 or more")
    try:
        number_N = pd.to_numeric(_series(values_N)).astype(float).replace([np.inf, -np.inf], np.nan)
    except (TypeError, ValueError) as error:
        raise UsageError(f"bins are of numbers: {error}") from None
    number = pd.qcut(number_N, count, labels=False, duplicates="drop")
    if number_N.nunique() < 2:  # one value has no ranges
        number = number_N.where(number_N.isna(), 0)
    spans = number_N.groupby(number).agg(["min", "max"])
    name = {code: f"{low:g}" if low == high else f"{low:g} to {high:g}" for code, low, high in spans.itertuples()}
    return np.array([name.get(code) for code in number], dtype=object)
