"""The folded ResNet against open_clip's own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from curate.models.build import build_untrained
from curate.models.configs import CONFIGS, PREPROCESS
from curate.models.resnet import fold, residual_path


def tower(layers: list[int], seed: int = 0) -> Any:
    """A small tower, in which every gain, shift, mean and variance differs from its initial value."""
    config = copy.deepcopy(CONFIGS["curate-tiny"])
    config["vision_cfg"] |= {"layers": layers, "width": 8}
    visual: Any = build_untrained(config, seed=seed, preprocess=PREPROCESS).eval().visual  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in (module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))
    return visual


def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", [[1, 1, 1, 1], [2, 1, 3, 2]])
def test_equals_open_clip(layers: list[int]) -> None:
    """Embeddings are open_clip's to a millionth of their length, with and without blocks that keep their shape."""
    own = tower(layers)
    short = residual_path(own)
    assert short is not None
    with torch.inference_mode():
        mine, theirs = short(images()), own(images())
    assert float((mine - theirs).norm() / theirs.norm()) < 5e-6


def test_fold_by_hand() -> None:
    """A gain of 3, shift 1, mean 2 and variance 4 make of weight 10 the weight 15 and the bias -2."""
    convolution, norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)
    for tensor, value in ((norm.weight, 3), (norm.bias, 1), (norm.running_mean, 2), (norm.running_var, 4)):
        assert tensor is not None
        nn.init.constant_(tensor, value)
    nn.init.constant_(convolution.weight, 10)
    folded = fold(convolution, norm)
    assert (folded.weight.item(), folded.bias.item()) == (15.0, -2.0)


def test_weights_that_change_are_noticed() -> None:
    """After a step of training the tower's own forward answers, not the weights that were folded."""
    own = tower([1, 1, 1, 1])
    short = residual_path(own)
    assert short is not None
    with torch.no_grad():
        own.conv1.weight.mul_(2)
        assert torch.equal(short(images()), own(images()))


def test_other_towers_are_left_alone() -> None:
    """Half precision and towers of another kind have no short way here."""
    assert residual_path(tower([1, 1, 1, 1]).bfloat16()) is None
    assert residual_path(nn.Linear(2, 2)) is None
