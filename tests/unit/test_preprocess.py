"""Resizing: the pixels that open_clip's own transform gives, for each of its modes, but for torch's rounding."""

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


@pytest.mark.parametrize("shape", [(64, 64), (200, 131), (97, 301), (40, 33), (64, 100), (480, 640), (90, 1), (1, 90)])
@pytest.mark.parametrize("case", CASES)
def test_equals_open_clip(case: str, shape: tuple[int, int]) -> None:
    """Every pixel is open_clip's, before normalisation, but for a level or two in a few of them."""
    config = {**BASE, **CASES[case]}
    rgb_HWC = make_pixels(shape[1], shape[0], seed=shape[0])
    ours = Preprocess.from_config(config)(rgb_HWC)
    difference = np.abs(ours.astype(np.float32) - expected(config, rgb_HWC))
    assert ours.dtype == np.uint8
    assert ours.flags["C_CONTIGUOUS"]
    assert difference.max() < 2.01
    assert (difference > 0.01).mean() < 0.04


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_a_strip_does_not_grow(mode: str) -> None:
    """An image one pixel wide gives the middle of it at the usual size, without gigabytes in between."""
    rgb_HWC = np.zeros((200_000, 1, 3), np.uint8)
    rgb_HWC[99_000:101_000] = 200
    out = Preprocess.from_config({**BASE, "resize_mode": mode})(rgb_HWC)
    assert out.shape == (3, 64, 64)
    assert out[:, 31:33].max() > 0


def test_unknown_mode_is_refused() -> None:
    """A resize mode that open_clip does not have is not guessed."""
    with pytest.raises(ModelError, match="stretch"):
        Preprocess.from_config({**BASE, "resize_mode": "stretch"})


def test_min_side_is_the_longer_side_of_the_input() -> None:
    """A reduced decode never has to be enlarged."""
    assert Preprocess.from_config({**BASE, "size": (48, 80)}).min_side == 80


@pytest.mark.parametrize("case", CASES)
def test_pixels_that_lie_otherwise_come_out_the_same(case: str) -> None:
    """A turned, mirrored or read-only picture is resized like a copy of it, and stays as it was."""
    rule = Preprocess.from_config({**BASE, **CASES[case]})
    rgb_HWC = make_pixels(120, 90, seed=3)
    before = rgb_HWC.copy()
    frozen_HWC = np.frombuffer(rgb_HWC.tobytes(), np.uint8).reshape(rgb_HWC.shape)
    for view in (rgb_HWC[:, ::-1], rgb_HWC.transpose(1, 0, 2), frozen_HWC):
        assert np.array_equal(rule(view), rule(view.copy()))
    assert np.array_equal(rgb_HWC, before)
