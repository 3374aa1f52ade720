"""Resize a decoded image as the model's own open_clip transform does: the same filters, sizes and crops, on uint8.

torch resamples, in two fifths of Pillow's time and without its copies; 0.3 % of the numbers differ by one level of 255
from those that open_clip's Pillow gives, and a few in a million by two. Strips more than eight times as long as wide
are resampled straight from the box that the crop keeps, by Pillow: a strip of 1 x 64,000,000 pixels would grow to
gigabytes otherwise. Normalisation is left to the model, on whole batches: uint8 is a quarter of the memory and traffic
of float32.
"""

# B images, H, W height and width of the source, C channels

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from curate.errors import ModelError

# Raised whenever the pixels that reach a model change: part of the preprocessing digest, so old caches are refused.
RULE: Final = "torch resample 1; JPEG may be decoded at a reduced scale with both sides >= min_side"
_STRIP: Final = 8
_FILTERS: Final = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}  # open_clip's names, torch's


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The evaluation transform of an open_clip model, up to normalisation. `height` and `width` in pixels."""

    height: int
    width: int
    resize_mode: str
    interpolation: str
    fill: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """From open_clip's `model.visual.preprocess_cfg`. Errors: ModelError for a mode it does not have."""
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
        mode, interpolation = config.get("resize_mode") or "shortest", config.get("interpolation") or "bicubic"
        if mode not in ("shortest", "longest", "squash") or interpolation not in _FILTERS:
            raise ModelError(f"preprocessing: resize mode {mode!r} with {interpolation!r} interpolation is unknown")
        mean, std = (tuple(float(x) for x in config[k]) for k in ("mean", "std"))
        if mode == "shortest" and height != width:
            interpolation = "bicubic"  # open_clip drops the setting for inputs that are not square
        return cls(height, width, mode, interpolation, int(config.get("fill_color") or 0), mean, std)

    @property
    def min_side(self) -> int:
        """The shorter side below which a reduced JPEG decode would have to be enlarged again.

        Decoding at the smallest scale above it changed cosines of a trained curate-tiny by 0.0003 on average and 0.0064
        at most, over 150 JPEGs of 200 pixels for an input of 64.
        """
        return max(self.height, self.width)

    def __call__(self, rgb_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop `rgb_HWC` (any size, RGB) to [3, height, width], uint8."""
        return np.ascontiguousarray(self.pixels(rgb_HWC).transpose(2, 0, 1))

    def pixels(self, rgb_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same as [height, width, 3], perhaps a view: the order in which convolutions run fastest on a CPU."""
        if self.resize_mode == "squash":
            return self._resize(rgb_HWC, self.height, self.width)
        return self._shortest(rgb_HWC) if self.resize_mode == "shortest" else self._longest(rgb_HWC)

    def _shortest(self, rgb_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        H, W, _ = rgb_HWC.shape
        if self.height == self.width:  # torchvision's Resize(int), which truncates the longer side
            short = min(W, H)
            resized_W, resized_H = (int(self.width * side / short) for side in (W, H))
        else:  # open_clip's ResizeKeepRatio, which rounds
            ratio = min(H / self.height, W / self.width)
            resized_W, resized_H = round(W / ratio), round(H / ratio)
        # what torchvision's CenterCrop keeps
        left, top = round((resized_W - self.width) / 2.0), round((resized_H - self.height) / 2.0)
        if max(resized_W, resized_H) > _STRIP * self.min_side:
            return self._from_strip(rgb_HWC, left, top, resized_W, resized_H)
        resized = self._resize(rgb_HWC, resized_H, resized_W)
        return resized[top : top + self.height, left : left + self.width]

    def _longest(self, rgb_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        H, W, C = rgb_HWC.shape
        ratio = max(H / self.height, W / self.width)
        width, height = max(1, round(W / ratio)), max(1, round(H / ratio))
        canvas = np.full((self.height, self.width, C), self.fill, np.uint8)
        left, top = (self.width - width) // 2, (self.height - height) // 2
        canvas[top : top + height, left : left + width] = self._resize(rgb_HWC, height, width)
        return canvas

    def _resize(self, rgb_HWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
        if rgb_HWC.shape[:2] == (height, width):
            return rgb_HWC
        if 1 in (width, rgb_HWC.shape[1]):  # torch without AVX2 takes a single column for another layout
            return self._by_pillow(rgb_HWC, height, width)
        if not (rgb_HWC.flags.c_contiguous and rgb_HWC.flags.writeable):
            rgb_HWC = rgb_HWC.copy()  # torch takes no other memory
        # a view, channels last; turned by numpy, as each operation of torch gives up the interpreter's lock
        x_1CHW = torch.from_numpy(rgb_HWC.transpose(2, 0, 1)[None])
        mode = _FILTERS[self.interpolation]
        resized_1CHW = functional.interpolate(x_1CHW, (height, width), mode=mode, align_corners=False, antialias=True)
        resized_CHW: NDArray[np.uint8] = resized_1CHW.numpy()[0]
        return resized_CHW.transpose(1, 2, 0)

    def _from_strip(
        self, rgb_HWC: NDArray[np.uint8], left: int, top: int, resized_W: int, resized_H: int
    ) -> NDArray[np.uint8]:
        H, W, _ = rgb_HWC.shape
        across, down = W / resized_W, H / resized_H
        right, bottom = (left + self.width) * across, (top + self.height) * down
        box = (left * across, top * down, min(right, W), min(bottom, H))
        return self._by_pillow(rgb_HWC, self.height, self.width, box)

    def _by_pillow(
        self, rgb_HWC: NDArray[np.uint8], height: int, width: int, box: tuple[float, float, float, float] | None = None
    ) -> NDArray[np.uint8]:
        resample = Image.Resampling[_FILTERS[self.interpolation].upper()]
        return np.asarray(Image.fromarray(rgb_HWC).resize((width, height), resample, box=box))
