"""What an audit is told of the pool's rows beside their groups: selection, duplicates, strata, losses; checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curate.auditing.clusters_as_units import Clusters, read_clusters
from curate.auditing.membership import Membership, as_column, membership_of
from curate.errors import UsageError

# N rows of the pool

Numbers = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Pool:
    """Per row [N]; None where it was not given. `weight_N` are votes, 1 each without clusters; strata are numbered."""

    selected_N: NDArray[np.bool_]
    weight_N: NDArray[np.float64]
    clusters: Clusters | None = None
    times_N: NDArray[np.int64] | None = None
    strata: tuple[tuple[str, NDArray[np.intp]], ...] = ()
    learner_loss_N: Numbers | None = None
    reference_loss_N: Numbers | None = None
    score_N: Numbers | None = None
    sub_batch_N: NDArray[np.int64] | None = None


def read_pool(
    selected_N: ArrayLike,
    times_N: ArrayLike | None = None,
    clusters_N: ArrayLike | None = None,
    strata: Mapping[str, Any] | None = None,
    *,
    sub_batch_N: ArrayLike | None = None,
    **numbers: ArrayLike | None,
) -> Pool:
    """The pool of `audit_columns`. Errors: UsageError as there, naming the argument."""
    chosen_N = _selection(selected_N, times_N)
    N = len(chosen_N)
    clusters = None if clusters_N is None else read_clusters(clusters_N, chosen_N)
    return Pool(
        chosen_N,
        np.ones(N) if clusters is None else clusters.weight_N,
        clusters,
        None if times_N is None else np.asarray(times_N).astype(np.int64),
        _strata(strata or {}, N),
        sub_batch_N=None if sub_batch_N is None else _sub_batches(sub_batch_N, chosen_N),
        **{name: None if values is None else _numbers(name, values, N) for name, values in numbers.items()},
    )


def read_mask(name: str, values: ArrayLike, rows: int) -> NDArray[np.bool_]:
    """A mask over the rows. Errors: UsageError for another length or kind, naming it."""
    mask_N = np.asarray(values)
    if mask_N.shape != (rows,) or mask_N.dtype != np.bool_:
        raise UsageError(f"{name}: give true or false for each of the {rows:,} rows, not {mask_N.dtype} {mask_N.shape}")
    return mask_N


def _selection(selected: ArrayLike, times: ArrayLike | None) -> NDArray[np.bool_]:
    selected_N = np.asarray(selected)
    if selected_N.ndim != 1 or not len(selected_N):
        raise UsageError("the pool is empty: there is nothing to audit")
    selected_N = read_mask("selected_N", selected_N, len(selected_N))
    if times is None:
        return selected_N
    times_N = np.asarray(times)
    if times_N.shape != selected_N.shape or times_N.dtype.kind not in "iu" or int(times_N.min()) < 0:
        raise UsageError(f"times_N: give how often each of the {len(selected_N):,} rows was drawn, 0 or more")
    if not np.array_equal(times_N > 0, selected_N):
        row = int(np.flatnonzero((times_N > 0) != selected_N)[0])
        raise UsageError(f"row {row} was drawn {times_N[row]} times, but selected is {bool(selected_N[row])}")
    return selected_N


def _numbers(name: str, values: ArrayLike, rows: int) -> Numbers:
    try:
        number_N = np.asarray(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}; give one number per row, NaN where there is none") from None
    if number_N.shape != (rows,):
        raise UsageError(f"{name} has {number_N.size:,} values for {rows:,} rows of the pool; give one a row")
    return number_N


def _sub_batches(values: ArrayLike, selected_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    number_N = np.where(selected_N, _numbers("sub_batch_N", values, len(selected_N)), 0)
    if not (np.isfinite(number_N).all() and (number_N == np.floor(number_N)).all()):
        raise UsageError("sub_batch_N: every selected row needs the whole number of the sub-batch that drew it")
    return number_N.astype(np.int64)


def _strata(given: Mapping[str, Any], rows: int) -> tuple[tuple[str, NDArray[np.intp]], ...]:
    """Each confounder's strata, and all of them crossed where there are several; rows without a value are a stratum."""
    number = {name: _stratum(membership_of(as_column(name, labels, rows))) for name, labels in given.items()}
    if len(number) < 2:
        return tuple(number.items())
    crossed = np.zeros(rows, np.intp)
    for stratum_N in number.values():
        crossed = crossed * (int(stratum_N.max()) + 1) + stratum_N
        _, crossed = np.unique(crossed, return_inverse=True)
    return (*number.items(), (" and ".join(number), crossed))


def _stratum(members: Membership) -> NDArray[np.intp]:
    if members.column.overlapping:
        raise UsageError(f"confounder {members.column.name!r}: its groups overlap; strata exclude each other")
    stratum_N = np.zeros(len(members.known_N), np.intp)
    stratum_N[members.row_M] = members.code_M
    return stratum_N
