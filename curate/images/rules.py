"""The pixel rules: one way, whatever the decoder, from what an image stores to 8-bit RGB as a person would see it.

grey -> three equal channels; palette -> its colours; CMYK -> Pillow's conversion (Adobe's inversion heeded); alpha or a
transparent colour -> composited on white; 16 bits -> the high byte; animation -> frame 0; EXIF orientation applied;
colour profiles and gamma ignored. Cost: one pass over the pixels for each rule that applies, none for plain RGB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


def to_rgb(image: PillowImage) -> NDArray[np.uint8]:
    """HWC uint8 RGB of a loaded Pillow image of any mode. Frame 0, orientation as stored."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _on_white(image.convert("RGBA"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def orient(rgb_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply EXIF orientation 1..8: the picture as the camera was held. 6, a phone held upright, swaps the two sides."""
    if orientation == 1:
        return rgb_HWC
    turned = rgb_HWC.swapaxes(0, 1) if orientation >= 5 else rgb_HWC
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    return np.ascontiguousarray(turned)


def _from_wide(grey_HW: NDArray[np.generic]) -> NDArray[np.uint8]:
    high_HW = (np.clip(grey_HW.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
    return np.repeat(high_HW[:, :, None], 3, axis=2)


def _on_white(rgba: PillowImage) -> PillowImage:
    canvas = Image.new("RGB", rgba.size, (255, 255, 255))
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas
