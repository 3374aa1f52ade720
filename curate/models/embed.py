"""Embed images and captions with one loaded open_clip model: uint8 and token ids in, unit vectors in float32 out.

Methods may be called from several Python threads at once. With one intra-op thread (`torch.set_num_threads(1)`) a batch
gives the same bits whichever thread runs it, so a run does not depend on the number of workers. The cost of a sample is
the forward pass of both towers, `flops_per_sample`; a caption costs its own length where `causal_text` holds.
"""

# B batch, C channels, H, W height and width, R values of a row of pixels (W C), T tokens, D embedding width

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from curate.costs.flops import image_work, text_work
from curate.models.identity import ModelIdentity
from curate.models.precision import DTYPES
from curate.models.preprocess import Preprocess
from curate.models.towers import TextParts, encode_text_trimmed


@dataclass(frozen=True, eq=False)
class DualEncoder:
    """A loaded model. Made by `curate.models.load.load_model`.

    `module` and `tokenizer` are open_clip's own; `fast_image`, `text` and `fast_tokens` are the shorter paths that were
    verified against them, or None.
    `scale` is exp(logit_scale), `bias` is logit_bias or 0; `rounding` is the largest change of a cosine that the
    precision makes on the probe batch, 0.0 for fp32.
    """

    identity: ModelIdentity
    module: Any
    tokenizer: Any
    rule: Preprocess
    device: torch.device
    loss: Literal["sigmoid", "softmax"]
    scale: float
    bias: float
    width: int
    context_length: int
    fast_image: Callable[[Tensor], Tensor] | None
    text: TextParts | None
    fast_tokens: Callable[[Sequence[str]], Tensor] | None = None
    rounding: float = 0.0
    _flops: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def image_size(self) -> int:
        """The longer side of the model's input in pixels."""
        return max(self.rule.height, self.rule.width)

    @property
    def min_side(self) -> int:
        """What to pass to `decode_rgb(min_side=...)`."""
        return self.rule.min_side

    @property
    def causal_text(self) -> bool:
        """Are captions cut at their end rather than padded to the context length?"""
        return self.text is not None

    def preprocess(self, rgb_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop a decoded image to [3, height, width] uint8, with the model's own rule."""
        return self.rule(rgb_HWC)

    def preprocess_batch(self, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
        """The same for several images, [B, 3, height, width] uint8, laid out as `embed_images` reads it fastest."""
        return self.stack([self.rule.pixels(rgb_HWC) for rgb_HWC in pixels])

    def stack(self, resized: Sequence[NDArray[np.uint8]]) -> Tensor:
        """The same for images that `rule.pixels` has made."""
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids [n, context_length], int64; longer captions are cut by the tokenizer's own rule."""
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.long)
        tokens: Tensor = (self.fast_tokens or self.tokenizer)(list(captions))
        return tokens

    def embed_images(self, image_BCHW: Tensor) -> Tensor:
        """Unit vectors [B, D] in float32 on the CPU, from uint8 images as `preprocess` gives them.

        Example: 32 images of a ViT-S-32-alt, uint8 [32, 3, 224, 224], give float32 [32, 256].
        """
        if not len(image_BCHW):
            return torch.zeros(0, self.width)
        with torch.inference_mode():
            features_BD = encode_images(self, image_BCHW)
        return _finish(features_BD)

    def embed_texts(self, token_BT: Tensor) -> Tensor:
        """Unit vectors [B, D] in float32 on the CPU, from token ids as `tokenize` gives them."""
        if not len(token_BT):
            return torch.zeros(0, self.width)
        with torch.inference_mode():
            features_BD = encode_texts(self, token_BT)
        return _finish(features_BD)

    @property
    def flops_image(self) -> float:
        """Multiplications and additions of one image's forward pass."""
        return self._counted(0)

    def flops_text(self, caption_tokens: int) -> float:
        """The same for one caption of `caption_tokens` tokens, start and end tokens included."""
        tokens = min(max(caption_tokens, 1), self.context_length) if self.causal_text else self.context_length
        return self._counted(tokens)

    def flops_per_sample(self, caption_tokens: int) -> float:
        """Forward cost of one pair. Example: about 2.4e9 for ViT-S-32-alt and a caption of 12 tokens."""
        return self.flops_image + self.flops_text(caption_tokens)

    def _counted(self, tokens: int) -> float:
        with self._lock:
            if tokens not in self._flops:
                self._flops[tokens] = _count_flops(self, tokens)
            return self._flops[tokens]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a loaded model is not pickled; send its spec and call load_model there")


def encode_images(model: DualEncoder, image_BCHW: Tensor) -> Tensor:
    """Normalise uint8 images with the model's mean and std, and encode them; not L2-normalised."""
    x_BHWC = image_BCHW.to(model.device).permute(0, 2, 3, 1).contiguous().float()
    B, H, W, C = x_BHWC.shape
    offset_R, factor_R = _affine(model.rule.mean, model.rule.std, W, str(model.device))
    x_BHWC.view(B * H, W * C).sub_(offset_R).mul_(factor_R)
    x_BCHW = x_BHWC.permute(0, 3, 1, 2).to(DTYPES[model.identity.precision])
    return model.fast_image(x_BCHW) if model.fast_image is not None else plain_image(model.module, x_BCHW)


def encode_texts(model: DualEncoder, token_BT: Tensor) -> Tensor:
    """Encode captions, cut at their end where the tower is causal; not L2-normalised."""
    token_BT = token_BT.to(model.device)
    return encode_text_trimmed(model.text, token_BT) if model.text is not None else plain_text(model.module, token_BT)


def plain_image(module: nn.Module, x_BCHW: Tensor) -> Tensor:
    features: Any = module.encode_image(x_BCHW)  # type: ignore[operator]
    embedding: Tensor = features[0] if isinstance(features, tuple) else features
    return embedding


def plain_text(module: nn.Module, token_BT: Tensor) -> Tensor:
    features: Any = module.encode_text(token_BT)  # type: ignore[operator]
    embedding: Tensor = features[0] if isinstance(features, tuple) else features
    return embedding


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], W: int, device: str) -> tuple[Tensor, Tensor]:
    # (x / 255 - mean) / std with one subtraction and one multiplication on the bytes; for a whole row of pixels,
    # because three channels are too short a line for vector instructions
    mean_C, std_C = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    return (255 * mean_C).float().repeat(W).to(device), (1 / (255 * std_C)).float().repeat(W).to(device)


def _finish(features_BD: Tensor) -> Tensor:
    # outside inference mode: normalising makes an ordinary tensor, which a caller may use in training
    return functional.normalize(features_BD.float(), dim=-1).cpu()


def _count_flops(model: DualEncoder, tokens: int) -> float:
    """One sample's forward pass on the path that is taken here; 0 tokens stands for the image."""
    if tokens:
        return text_work(model.module, tokens, short=model.text is not None).forward
    size = (model.rule.height, model.rule.width)
    return image_work(model.module, size=size, short=model.fast_image is not None).forward
