"""The losses against open_clip's own classes and against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch.nn import functional

from curate.learner.losses import sigmoid_loss, softmax_loss


def unit(rows: int, seed: int) -> torch.Tensor:
    return functional.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_sigmoid_equals_open_clip(rows: int) -> None:
    """The sigmoid loss is SigLipLoss, with its sign of the bias."""
    image, text, scale, bias = unit(rows, 0), unit(rows, 1), torch.tensor(12.0), torch.tensor(-7.0)
    torch.testing.assert_close(sigmoid_loss(image, text, scale, bias), SigLipLoss()(image, text, scale, bias))


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_softmax_equals_open_clip(rows: int) -> None:
    """The softmax loss is ClipLoss."""
    image, text, scale = unit(rows, 0), unit(rows, 1), torch.tensor(12.0)
    torch.testing.assert_close(softmax_loss(image, text, scale), ClipLoss()(image, text, scale))


def test_two_matched_pairs_by_hand() -> None:
    """The figures in the docstrings are what the formulas give."""
    pairs, one = torch.eye(2), torch.tensor(1.0)
    assert math.isclose(
        float(sigmoid_loss(pairs, pairs, one, torch.tensor(0.0))), math.log1p(1 / math.e) + math.log(2), rel_tol=1e-6
    )
    assert math.isclose(float(softmax_loss(pairs, pairs, one)), math.log1p(1 / math.e), rel_tol=1e-6)
