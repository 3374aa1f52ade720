"""Groups that nobody named: clusters of the reference's embeddings, and near-duplicates as units of a test.

The clusters are fitted on the whole pool (faiss, spherical k-means, a seed) and never see the selection, so that a
cluster which the selection left out is a finding and no artefact. The fit runs on one thread: its bits do not depend on
the machine's cores. Cost 2 N K D for the assignment and at most 256 K samples times K times 2 D per round of the fit:
0.1 s for 6,000 x 128 and K = 50 on one core, 20 rounds.
"""

# N samples of the pool, M of them with an embedding, K clusters, D width

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from curate.auditing.columns import UNKNOWN, Column
from curate.duplicates import NEAR_BITS, first_rows, near_originals
from curate.errors import UsageError

FEWEST: Final = 2
MOST: Final = 256
ROUNDS: Final = 20
LEAST_PER_CLUSTER: Final = 39  # what faiss asks for before it warns
COPIES: Final = ("no copy", "2 copies", "3 to 9 copies", "10 copies or more")


@dataclass(frozen=True, slots=True)
class Clusters:
    """`column`: the cluster of each sample; `medoids_K` the row nearest to each centre (ties: the first).

    `similarity_K`: mean cosine of a cluster's samples with its centre, how tight it is.
    """

    column: Column
    medoids_K: NDArray[np.int64]
    similarity_K: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Copies:
    """Near-duplicates: `units_N` numbers the cluster of each sample from 0 in the order of their first rows.

    A sample without a hash is a unit of its own. `column` groups samples by how many copies there are.
    """

    units_N: NDArray[np.int64]
    column: Column


def default_clusters(samples: int) -> int:
    """sqrt(samples / 2), between 2 and 256 and with 39 samples each or more. Example: 3,000 samples, 39 clusters."""
    most = max(1, min(MOST, samples // LEAST_PER_CLUSTER))
    return int(np.clip(round(float(np.sqrt(samples / 2))), min(FEWEST, most), most))


def embedding_clusters(
    embedding_MD: NDArray[Any],
    *,
    rows_M: NDArray[np.int64] | None = None,
    pool: int | None = None,
    clusters: int | None = None,
    seed: int = 0,
    source: str = "the reference's image embeddings",
) -> Clusters:
    """Clusters of embeddings [M, D] (fp16 as in the score table, or fp32; any length), of the pool's rows `rows_M`.

    Other rows are unknown. The same bits for the same embeddings, seed and version of faiss; the order of the rows
    counts. Errors: UsageError for no embedding, one that is not finite or zero, K below 1 or above M.
    Example: three tight bundles and clusters=3 give three groups of just those samples.
    """
    M = len(embedding_MD)
    rows_M = np.arange(M) if rows_M is None else np.asarray(rows_M, np.int64)
    K = default_clusters(M) if clusters is None else clusters
    if M == 0 or not 1 <= K <= M:
        raise UsageError(f"{K} clusters of {M} embeddings: there are as many as samples at most, and one at least")
    unit_MD = _unit(embedding_MD)
    code_M, similarity_M = _fit(unit_MD, K, seed)
    used, code_M = np.unique(code_M, return_inverse=True)  # a cluster that ended empty is none
    codes_N = np.full(M if pool is None else pool, UNKNOWN, np.int32)
    codes_N[rows_M] = code_M
    order = np.lexsort((rows_M, -similarity_M, code_M))  # by cluster, then the nearest, then the first row
    first_K = order[np.searchsorted(code_M[order], np.arange(len(used)))]
    mean_K = np.bincount(code_M, similarity_M) / np.bincount(code_M)
    provenance = f"{len(used)} clusters (k-means, seed {seed}) of {source}, fitted on the pool without the selection"
    names = tuple(f"cluster {number}" for number in range(len(used)))
    column = Column("embedding cluster", "cluster", provenance, names, codes_N)
    return Clusters(column, rows_M[first_K], mean_K.astype(np.float32))


def near_duplicates(
    image_digest_N: NDArray[np.uint8], dhash_N: NDArray[np.uint8], *, known_N: NDArray[np.bool_] | None = None,
    bits: int = NEAR_BITS,
) -> Copies:  # fmt: skip
    """Units of samples with the same image bytes [N, 32] or difference hashes [N, 32] within `bits` of an original's.

    Rows that are not known (no image was read) are alone. Cost: `curate.duplicates.near_originals`, N^2 / 64 words;
    N log N for `bits` 0.
    Example: a, a', b, a'' with a' and a'' copies of a: units 0, 0, 1, 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    N = len(dhash_N)
    known_N = np.ones(N, bool) if known_N is None else known_N
    rows = np.flatnonzero(known_N)
    near_N = near_originals(dhash_N[rows], bits) if bits else first_rows(dhash_N[rows])
    ends = [rows[near_N], rows[first_rows(image_digest_N[rows])]] if len(rows) else []
    one = np.concatenate([rows] * len(ends)) if ends else rows
    other = np.concatenate(ends) if ends else rows
    _, label_N = connected_components(coo_array((np.ones(len(one), bool), (one, other)), shape=(N, N)), directed=False)
    _, first, inverse = np.unique(label_N, return_index=True, return_inverse=True)
    units_N = np.argsort(np.argsort(first))[inverse] if N else np.zeros(0, np.int64)
    return Copies(units_N, _copies_column(units_N, known_N, bits))


def _copies_column(units_N: NDArray[np.int64], known_N: NDArray[np.bool_], bits: int) -> Column:
    size_N = np.bincount(units_N)[units_N] if len(units_N) else units_N
    code_N = np.searchsorted([2, 3, 10], size_N, side="right")
    provenance = f"near-duplicates in the pool: the same bytes, or 256-bit difference hashes within {bits} bits"
    return Column(
        "near-duplicates", "duplicate", provenance, COPIES, np.where(known_N, code_N, UNKNOWN).astype(np.int32)
    )


def _unit(embedding_MD: NDArray[Any]) -> NDArray[np.float32]:
    wide_MD = np.ascontiguousarray(embedding_MD, np.float32)
    norm_M = np.linalg.norm(wide_MD, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norm_M) & (norm_M > 0)))
    if len(bad):
        raise UsageError(f"{len(bad):,} embeddings are zero or not finite, first in row {bad[0]}; score the pool again")
    unit_MD: NDArray[np.float32] = wide_MD / norm_M[:, None]
    return unit_MD


def _fit(unit_MD: NDArray[np.float32], K: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The cluster of each sample and its cosine with the centre."""
    import faiss

    with _one_thread(faiss):
        fitted = faiss.Kmeans(
            unit_MD.shape[1], K, niter=ROUNDS, seed=seed & 0x7FFFFFFF, spherical=True, max_points_per_centroid=256,
            min_points_per_centroid=1,
        )  # fmt: skip
        fitted.train(unit_MD)
        similarity_M1, code_M1 = fitted.index.search(unit_MD, 1)
    return code_M1[:, 0], similarity_M1[:, 0]


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
