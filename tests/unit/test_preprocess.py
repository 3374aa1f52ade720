"""Resizing: the pixels that open_clip's own transform gives, for each of its modes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from curate.errors import ModelError
from curate.models.preprocess import Preprocess
from tests.making import make_pixels

BASE: dict[str, Any] = {"size": 64, "mean": (0.48, 0.45, 0.4), "std": (0.26, 0.27, 0.28)}
CASES: dict[str, dict[str, Any]] = {
    "shortest": {},
    "shortest, not square": {"size": (48, 80)},
    "shortest, bilinear": {"interpolation": "bilinear"},
    "longest": {"resize_mode": "longest", "fill_color": 127},
    "squash": {"resize_mode": "squash", "interpolation": "bilinear"},
}


def expected(config: dict[str, Any], rgb_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
    normalised = transform(Image.fromarray(rgb_HWC))
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (255 * (normalised * std + mean)).numpy()


@pytest.mark.parametrize("shape", [(64, 64), (200, 131), (97, 301), (40, 33), (64, 100), (480, 640)])
@pytest.mark.parametrize("case", CASES)
def test_equals_open_clip(case: str, shape: tuple[int, int]) -> None:
    """Every pixel is open_clip's, before normalisation."""
    config = {**BASE, **CASES[case]}
    rgb_HWC = make_pixels(shape[1], shape[0], seed=shape[0])
    ours = Preprocess.from_config(config)(rgb_HWC)
    difference = np.abs(ours.astype(np.float32) - expected(config, rgb_HWC))
    assert ours.dtype == np.uint8
    assert ours.flags["C_CONTIGUOUS"]
    assert difference.max() < 0.01


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_a_strip_does_not_grow(mode: str) -> None:
    """An image one pixel wide gives the middle of it at the usual size, without gigabytes in between."""
    rgb_HWC = np.zeros((200_000, 1, 3), np.uint8)
    rgb_HWC[99_000:101_000] = 200
    out = Preprocess.from_config({**BASE, "resize_mode": mode})(rgb_HWC)
    assert out.shape == (3, 64, 64)
    assert out.max() > 0


def test_unknown_mode_is_refused() -> None:
    """A resize mode that open_clip does not have is not guessed."""
    with pytest.raises(ModelError, match="stretch"):
        Preprocess.from_config({**BASE, "resize_mode": "stretch"})


def test_min_side_is_the_longer_side_of_the_input() -> None:
    """A reduced decode never has to be enlarged."""
    assert Preprocess.from_config({**BASE, "size": (48, 80)}).min_side == 80


@pytest.mark.parametrize("case", CASES)
def test_a_stack_holds_each_picture(case: str) -> None:
    """Several pictures on one canvas come out as each alone."""
    rule = Preprocess.from_config({**BASE, **CASES[case]})
    pictures = [make_pixels(width, 90, seed=width) for width in (64, 120, 200)]
    stacked_BHWC = rule.stack([rule.resized(Image.fromarray(one)) for one in pictures])
    assert all(np.array_equal(one, rule.pixels(rgb)) for one, rgb in zip(stacked_BHWC, pictures, strict=True))
