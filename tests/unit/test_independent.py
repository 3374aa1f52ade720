"""Draws by one score per candidate: units of the scores, distribution, order, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from curate.errors import UsageError
from curate.selection.alignment import alignment_flops
from curate.selection.criteria import check_available, default_gain, weights
from curate.selection.independent import draw_alone, normal_scores


def ids(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (count, 16), dtype=np.uint8)


def test_the_example_of_the_docstring() -> None:
    """The scores and logits that the docstrings show."""
    draw = draw_alone(np.array([0.1, 5.0, 0.2, 0.3]), np.arange(64, dtype=np.uint8).reshape(4, 16), size=1)
    assert (draw.index_b.tolist(), draw.logit_B.astype(int).tolist()) == ([1], [-2, 2, 0, 0])
    assert normal_scores(np.array([1.0, 2.0, 2.0, 3.0, 100.0])).round(2).tolist() == [-1.28, -0.25, -0.25, 0.52, 1.28]


@pytest.mark.parametrize("tail", ["normal", "cauchy"])
def test_the_gain_is_logits_per_standard_deviation_whatever_the_scores(tail: str) -> None:
    """Logits have spread `gain`, and about exp(-gain^2 / 2) of the candidates count, long tails or not, in any unit."""
    dice = np.random.default_rng(0)
    score_B = 1e-3 * (dice.normal(size=4000) if tail == "normal" else dice.standard_cauchy(4000))
    logit_B = draw_alone(score_B, ids(4000), size=1, gain=2.0).logit_B.astype(float)
    assert logit_B.std() == pytest.approx(2.0, rel=0.01)
    np.testing.assert_allclose(np.sort(score_B), score_B[np.argsort(logit_B)])
    share_B = np.exp(logit_B) / np.exp(logit_B).sum()
    assert np.exp(-(share_B * np.log(share_B)).sum()) / 4000 == pytest.approx(np.exp(-2), rel=0.1)
    np.testing.assert_array_equal(draw_alone(1e6 * score_B - 5, ids(4000), size=1, gain=2.0).logit_B, logit_B)


def test_each_is_drawn_in_proportion_to_the_exponential_of_its_logit() -> None:
    """First draws over 4,000 steps have the frequencies of a softmax, within four standard errors."""
    score_B, id_B, steps = np.array([0.0, 1.0, 2.0, 3.0, 4.0]), ids(5), 4000
    draws = [draw_alone(score_B, id_B, size=2, gain=1.0, step=step) for step in range(steps)]
    share_B = np.exp(draws[0].logit_B.astype(float))
    share_B /= share_B.sum()
    counts = Counter(int(draw.index_b[0]) for draw in draws)
    found_B = np.array([counts[row] for row in range(5)]) / steps
    assert (np.abs(found_B - share_B) < 4 * np.sqrt(share_B * (1 - share_B) / steps)).all(), (found_B, share_B)


def test_the_order_of_the_rows_does_not_matter_and_a_call_repeats() -> None:
    """The same ids are drawn in the same order from shuffled rows; seed and step change what is drawn."""
    score_B, id_B = np.random.default_rng(2).normal(size=60), ids(60)
    first = draw_alone(score_B, id_B, size=20, seed=3, step=4)
    order = np.random.default_rng(3).permutation(60)
    again = draw_alone(score_B[order], id_B[order], size=20, seed=3, step=4)
    assert order[again.index_b].tolist() == first.index_b.tolist()
    np.testing.assert_array_equal(again.logit_B, first.logit_B[order])
    assert len(set(first.index_b.tolist())) == 20
    assert (first.chunk_b.tolist(), first.kernel) == ([0] * 20, "independent")
    np.testing.assert_array_equal(first.logit_b, first.logit_B[first.index_b])
    others = [draw_alone(score_B, id_B, size=20, seed=seed, step=step) for seed, step in ((4, 4), (3, 5))]
    assert all(other.index_b.tolist() != first.index_b.tolist() for other in others)


def test_equal_scores_are_drawn_uniformly() -> None:
    """Without any spread all logits are 0."""
    assert draw_alone(np.full(8, 3.5), ids(8), size=3).logit_B.tolist() == [0.0] * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "cannot draw 0 of 4"),
        ({"size": 5}, "cannot draw 5 of 4"),
        ({"gain": -1.0}, "gain is -1.0"),
        ({"gain": float("inf")}, "gain is inf"),
        ({"score_B": np.zeros(3)}, r"scores are \(3,\) for 4 sample ids"),
        ({"score_B": np.array([0.0, np.nan, 1.0, 2.0])}, r"the score of row 1 \(sample [0-9a-f]{32}\) is nan"),
        ({"sample_ids": np.zeros((4, 16), np.uint8)}, "the same sample id"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change: dict[str, Any], message: str) -> None:
    """Each impossible argument is a UsageError that says what is wrong, a bad score with its sample."""
    arguments: dict[str, Any] = {"score_B": np.arange(4.0), "sample_ids": ids(4), "size": 2} | change
    with pytest.raises(UsageError, match=message):
        draw_alone(arguments.pop("score_B"), arguments.pop("sample_ids"), **arguments)


def test_the_joint_sampler_says_why_it_cannot_take_alignment() -> None:
    """Alignment has no weights of pairs, and it asks for a learner and for trusted pairs."""
    with pytest.raises(UsageError, match=r"scored by derivative, not by pairs: .*`draw_alone`"):
        weights("alignment")
    with pytest.raises(UsageError, match="needs a learner"):
        check_available("alignment", reference=True, learner=False, trusted=True)
    with pytest.raises(UsageError, match="--trusted"):
        check_available("alignment", reference=True, learner=True, trusted=False)
    check_available("alignment", reference=False, learner=True, trusted=True)
    assert (default_gain("alignment"), default_gain("learnability")) == (2.0, 100.0)


def test_flops_are_three_forward_passes_a_candidate_and_four_a_trusted_pair() -> None:
    """The example of the docstring."""
    assert alignment_flops(1e9, trusted=256, candidates=640) == pytest.approx(2.944e12)
