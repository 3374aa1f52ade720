"""Resize a decoded image as the model's own open_clip transform does, with the same Pillow filters, on uint8.

The pixels are open_clip's, bit by bit, except for strips more than eight times as long as wide: those are resampled
straight from the box that the crop keeps, since a strip of 1 x 64,000,000 pixels would grow to gigabytes otherwise.
Normalisation is left to the model, on whole batches: uint8 is a quarter of the memory and traffic of float32.
"""

# B images, H, W height and width of the source, C channels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curate.errors import ModelError

# Raised whenever the pixels that reach a model change: part of the preprocessing digest, so old caches are refused.
RULE: Final = "pillow resample 1; JPEG may be decoded at a reduced scale with both sides >= min_side"
_STRIP: Final = 8
_FILTERS: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "random": Image.Resampling.BICUBIC,
}


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
        """The same as [height, width, 3], read-only: the order in which convolutions run fastest on a CPU."""
        resized = self.resized(Image.fromarray(rgb_HWC))
        return np.frombuffer(resized.tobytes(), np.uint8).reshape(self.height, self.width, 3)

    def resized(self, picture: Image.Image) -> Image.Image:
        """An RGB picture of any size as the model sees it, `width` x `height`."""
        if self.resize_mode == "squash":
            return picture.resize((self.width, self.height), _FILTERS[self.interpolation])
        return self._shortest(picture) if self.resize_mode == "shortest" else self._longest(picture)

    def stack(self, pictures: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """Resized pictures as [B, height, width, 3], read-only."""
        canvas = Image.new("RGB", (self.width, self.height * len(pictures)), None)  # one copy to numpy, not one each
        for row, picture in enumerate(pictures):
            canvas.paste(picture, (0, row * self.height))
        return np.frombuffer(canvas.tobytes(), np.uint8).reshape(-1, self.height, self.width, 3)

    def _shortest(self, image: Image.Image) -> Image.Image:
        W, H = image.size
        if self.height == self.width:  # torchvision's Resize(int), which truncates the longer side
            short = min(W, H)
            resized_W, resized_H = (int(self.width * side / short) for side in (W, H))
        else:  # open_clip's ResizeKeepRatio, which rounds
            ratio = min(H / self.height, W / self.width)
            resized_W, resized_H = round(W / ratio), round(H / ratio)
        return self._crop(image, resized_W, resized_H)

    def _crop(self, image: Image.Image, resized_W: int, resized_H: int) -> Image.Image:
        """Resize, then keep what torchvision's CenterCrop keeps."""
        left, top = round((resized_W - self.width) / 2.0), round((resized_H - self.height) / 2.0)
        resample = _FILTERS[self.interpolation]
        if max(resized_W, resized_H) <= _STRIP * self.min_side:
            resized = image.resize((resized_W, resized_H), resample)
            return resized.crop((left, top, left + self.width, top + self.height))
        across, down = image.width / resized_W, image.height / resized_H
        right, bottom = (left + self.width) * across, (top + self.height) * down
        box = (left * across, top * down, min(right, image.width), min(bottom, image.height))
        return image.resize((self.width, self.height), resample, box=box)

    def _longest(self, image: Image.Image) -> Image.Image:
        ratio = max(image.height / self.height, image.width / self.width)
        width, height = max(1, round(image.width / ratio)), max(1, round(image.height / ratio))
        resized = image.resize((width, height), _FILTERS[self.interpolation])
        canvas = Image.new("RGB", (self.width, self.height), (self.fill,) * 3)
        canvas.paste(resized, ((self.width - width) // 2, (self.height - height) // 2))
        return canvas
