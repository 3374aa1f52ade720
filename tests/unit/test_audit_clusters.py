"""Clusters of embeddings and near-duplicates: the planted ones are found, with the same bits on any number of cores."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from curate.auditing.clusters import default_clusters, embedding_clusters, near_duplicates
from curate.errors import UsageError

RNG = np.random.default_rng(5)

# B bundles, D width


def bundles(sizes: list[int], width: int = 32, spread: float = 0.02) -> NDArray[np.float16]:
    """Tight bundles around random directions, fp16 as in the score table."""
    centre_BD = RNG.standard_normal((len(sizes), width))
    centre_BD /= np.linalg.norm(centre_BD, axis=1, keepdims=True)
    rows = [centre_BD[b] + spread * RNG.standard_normal(width) for b, size in enumerate(sizes) for _ in range(size)]
    return np.array(rows).astype(np.float16)


def test_planted_bundles_are_the_clusters() -> None:
    """Three bundles and K = 3: each cluster is a bundle, and the medoid is the member with the highest cosine."""
    embedding_MD = bundles([60, 50, 40])
    clusters = embedding_clusters(embedding_MD, clusters=3)
    codes_N = clusters.column.codes_N
    assert codes_N is not None
    assert [len(set(part.tolist())) for part in (codes_N[:60], codes_N[60:110], codes_N[110:])] == [1, 1, 1]
    assert len(set(codes_N.tolist())) == 3
    unit_MD = embedding_MD.astype(np.float32)
    unit_MD /= np.linalg.norm(unit_MD, axis=1, keepdims=True)
    for code, medoid in enumerate(clusters.medoids_K):
        inside = np.flatnonzero(codes_N == code)
        centre_D = unit_MD[inside].mean(0)
        assert codes_N[medoid] == code
        assert unit_MD[medoid] @ centre_D >= (unit_MD[inside] @ centre_D).max() - 1e-5
    assert (clusters.similarity_K > 0.95).all()
    assert "without the selection" in clusters.column.provenance


def test_rows_without_an_embedding_are_unknown() -> None:
    """Medoids and codes are by the pool's rows."""
    rows_M = np.arange(5, 205, 2)
    clusters = embedding_clusters(bundles([50, 50]), rows_M=rows_M, pool=300, clusters=2)
    assert clusters.column.coverage == pytest.approx(100 / 300)
    assert set(clusters.medoids_K.tolist()) <= set(rows_M.tolist())
    assert clusters.column.is_known[rows_M].all()


def test_equal_rows_make_no_empty_group() -> None:
    """All samples alike: a group that ended empty is left out, and ties go to the first row."""
    clusters = embedding_clusters(np.ones((100, 8), np.float16), clusters=4)
    assert (clusters.column.counts > 0).all()
    assert 0 in clusters.medoids_K


PROGRAM = """
import hashlib, sys
import numpy as np
from curate.auditing.clusters import embedding_clusters
unit = np.random.default_rng(1).standard_normal((3000, 48)).astype(np.float16)
c = embedding_clusters(unit, clusters=30, seed=int(sys.argv[1]))
print(hashlib.sha256(c.column.codes_N.tobytes() + c.medoids_K.tobytes() + c.similarity_K.tobytes()).hexdigest())
"""


def test_the_bits_do_not_depend_on_the_cores() -> None:
    """The same seed gives the same bits with one and with four threads, another seed others."""
    made = {}
    for seed, threads in (("0", "1"), ("0", "4"), ("1", "1")):
        environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, seed],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        made[seed, threads] = done.stdout
    assert made["0", "1"] == made["0", "4"] != made["1", "1"]


def test_the_fit_leaves_the_number_of_threads_as_it_was() -> None:
    """faiss's threads belong to the process."""
    import faiss

    before = faiss.omp_get_max_threads()
    embedding_clusters(bundles([50, 50]), clusters=2)
    assert faiss.omp_get_max_threads() == before


@pytest.mark.parametrize(("samples", "clusters"), [(1, 1), (50, 1), (80, 2), (3000, 39), (20_000, 100), (10**6, 256)])
def test_the_default_grows_with_the_root(samples: int, clusters: int) -> None:
    """sqrt(N / 2), at most 256, 39 samples each or more."""
    assert default_clusters(samples) == clusters


@pytest.mark.parametrize("bad", [np.zeros((0, 4)), np.zeros((5, 4)), np.full((5, 4), np.nan), np.full((5, 4), np.inf)])
def test_embeddings_that_are_none_are_refused(bad: NDArray[np.float64]) -> None:
    """No sample, zeros, and what is not finite: an error, no cluster."""
    with pytest.raises(UsageError):
        embedding_clusters(bad.astype(np.float16), clusters=2)


def test_more_clusters_than_samples_are_refused() -> None:
    """K is at most the number of embeddings."""
    with pytest.raises(UsageError, match="200 clusters of 100 embeddings"):
        embedding_clusters(bundles([50, 50]), clusters=200)


def digests(texts: list[str]) -> NDArray[np.uint8]:
    """Digests [N, 32] of texts."""
    return np.array([list(hashlib.sha256(text.encode()).digest()) for text in texts], np.uint8)


def flipped(hash_: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """A hash with its first bits turned."""
    every = np.unpackbits(hash_)
    every[:bits] ^= 1
    return np.packbits(every)


def test_copies_are_one_unit() -> None:
    """Same bytes or near hashes join; far hashes, and samples that no image was read of, are alone."""
    a, b = RNG.integers(0, 256, (2, 32), dtype=np.uint8)
    dhash_N = np.stack([a, b, flipped(a, 4), flipped(b, 40), a, a, b])
    image_N = digests(["a", "b", "a2", "c", "unread", "a3", "c"])
    known_N = np.array([True, True, True, True, False, True, True])
    copies = near_duplicates(image_N, dhash_N, known_N=known_N)
    # the last has b's hash and the bytes of the fourth, so those two and b are one unit
    assert copies.units_N.tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert [copies.column.names[code] for code in copies.column.codes_N[known_N]] == ["3 to 9 copies"] * 6  # type: ignore[index]
    assert copies.column.codes_N[4] == -1  # type: ignore[index]


def test_units_agree_with_a_search_of_all_pairs() -> None:
    """On random hashes with planted copies, units are the components of the links that a double loop finds."""
    base = RNG.integers(0, 256, (20, 32), dtype=np.uint8)
    dhash_N = np.stack([flipped(base[n % 20], int(RNG.integers(0, 5))) for n in range(100)])
    copies = near_duplicates(digests([str(n) for n in range(100)]), dhash_N)
    bits = np.unpackbits(dhash_N, axis=1).astype(int)
    near_NN = np.abs(bits[:, None] - bits[None]).sum(2) <= 10
    assert np.array_equal(copies.units_N[:, None] == copies.units_N[None], near_NN)
    assert copies.units_N[:20].tolist() == list(range(20))


def test_an_empty_pool_has_no_unit() -> None:
    """No rows, no units."""
    copies = near_duplicates(np.zeros((0, 32), np.uint8), np.zeros((0, 32), np.uint8))
    assert len(copies.units_N) == len(copies.column) == 0


def test_any_seed_of_an_audit_is_one_of_the_fit() -> None:
    """faiss takes 31 bits; larger seeds are cut, smaller ones are taken as they are."""
    embedding_MD = bundles([40, 40])
    for seed in (2**31 + 3, 2**64 - 1):
        assert len(embedding_clusters(embedding_MD, clusters=2, seed=seed).column.names) == 2
