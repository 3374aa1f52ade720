"""The hash behind the noise: published answers, uniformity, independence, and ends that cannot be hit."""

from __future__ import annotations

import numpy as np
import pytest

from curate.errors import UsageError
from curate.selection.noise import gumbel, philox, uniform


def counting_ids(count: int) -> np.ndarray:
    """Ids that differ in few bits: the hardest case for a hash."""
    ids = np.zeros((count, 16), dtype=np.uint8)
    ids[:, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(-1, 4)
    return ids


def random_ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16), dtype=np.uint8)


def chi_square(u_B: np.ndarray, cells: int = 256) -> float:
    """Standard deviations by which the chi-square of equal cells is off its mean."""
    seen = np.bincount((u_B * cells).astype(int), minlength=cells)
    expected = len(u_B) / cells
    return float((((seen - expected) ** 2 / expected).sum() - (cells - 1)) / np.sqrt(2 * (cells - 1)))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: tuple[int, int], answer: list[int]) -> None:
    """The three known answers of Random123 for philox4x32-10 come out."""
    assert philox(np.array([counter], dtype=np.uint64), key)[0].tolist() == answer


@pytest.mark.parametrize("ids", [counting_ids(100_000), random_ids(100_000)], ids=["counting", "random"])
def test_uniforms_are_uniform(ids: np.ndarray) -> None:
    """Chi-square over 256 cells and Kolmogorov-Smirnov pass for random ids and for ids that count."""
    u_B = uniform(ids, seed=3, step=1, chunk=2)
    ranks = (np.arange(len(u_B)) + 0.5) / len(u_B)
    assert abs(chi_square(u_B)) < 4
    assert np.abs(np.sort(u_B) - ranks).max() * np.sqrt(len(u_B)) < 1.95  # p = 0.001


@pytest.mark.parametrize("name", ["seed", "step", "chunk"])
def test_another_seed_step_or_chunk_is_independent(name: str) -> None:
    """Pairs of uniforms with neighbouring seeds, steps or chunks fill the unit square evenly and do not correlate."""
    ids = counting_ids(100_000)
    base = {"seed": 0, "step": 0, "chunk": 0}
    one_B, other_B = uniform(ids, **base), uniform(ids, **{**base, name: 1})
    assert abs(np.corrcoef(one_B, other_B)[0, 1]) < 0.013  # four standard deviations
    assert abs(chi_square((np.floor(one_B * 16) + other_B) / 16)) < 4


def test_neighbouring_ids_are_independent() -> None:
    """Uniforms of ids one apart do not correlate, whichever of the sixteen bytes differs."""
    for byte in range(16):
        ids = random_ids(20_000)
        near = ids.copy()
        near[:, byte] ^= 1
        one_B, other_B = uniform(ids, seed=0, step=0, chunk=0), uniform(near, seed=0, step=0, chunk=0)
        assert abs(np.corrcoef(one_B, other_B)[0, 1]) < 0.03
        assert not (one_B == other_B).any()


def test_seed_step_and_chunk_are_not_confused() -> None:
    """(1, 0, 0), (0, 1, 0) and (0, 0, 1) are three different streams, as are 1 and 1 + 2**32."""
    ids = counting_ids(4)
    streams = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 + 2**32, 0, 0)]
    assert len({uniform(ids, seed=a, step=b, chunk=c).tobytes() for a, b, c in streams}) == 4


def test_gumbel_has_its_mean_and_variance() -> None:
    """Mean 0.5772 and variance pi^2 / 6, every value finite."""
    noise_B = gumbel(counting_ids(200_000), seed=0, step=0, chunk=0)
    assert np.isfinite(noise_B).all()
    assert noise_B.mean() == pytest.approx(0.5772157, abs=0.012)
    assert noise_B.var() == pytest.approx(np.pi**2 / 6, abs=0.035)


def test_the_extreme_words_stay_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits zero and all bits one give numbers strictly between 0 and 1, and finite noise."""
    for word in (0, 0xFFFFFFFF):
        words = np.full((1, 4), word, dtype=np.uint64)
        monkeypatch.setattr("curate.selection.noise.philox", lambda *_, words=words: words)
        assert 0.0 < uniform(counting_ids(1), seed=0, step=0, chunk=0)[0] < 1.0
        assert np.isfinite(gumbel(counting_ids(1), seed=0, step=0, chunk=0)).all()


def test_the_noise_of_a_sample_does_not_depend_on_its_neighbours() -> None:
    """Any subset of the ids, in any order and memory layout, gets the same bits."""
    ids = random_ids(100)
    whole_B = gumbel(ids, seed=5, step=2, chunk=1)
    assert np.array_equal(whole_B[::-7], gumbel(ids[::-7], seed=5, step=2, chunk=1))


def test_these_values_never_change() -> None:
    """Selections of earlier runs can be repeated: the noise of two ids is pinned."""
    noise_B = gumbel(counting_ids(2), seed=7, step=3, chunk=1)
    assert noise_B.tolist() == pytest.approx([2.0863386811327835, 0.34366345118621405], rel=1e-12)


def test_a_negative_seed_is_refused() -> None:
    """A seed outside 0 .. 2**64 - 1 is a UsageError that says so."""
    with pytest.raises(UsageError, match=r"seed is -1; give a whole number from 0 to 2\*\*64 - 1"):
        gumbel(counting_ids(1), seed=-1, step=0, chunk=0)
