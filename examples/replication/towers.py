"""The models of the study: a three-layer ConvNet, and a small vision transformer for the FFF arms; 3 MFLOP an image."""

# B images, C channels, H, W height and width, D width of the embedding

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.surgery import replace_feedforward
from curate.models.build import build_untrained
from curate.models.configs import PREPROCESS, SIGMOID_START

CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    **SIGMOID_START,
}
LEAVES = FeedforwardConfig(depth=3, leaf_width=32, balance=0.01)  # of 256 neurons, 32 for each token


class ConvNet(nn.Module):
    """Three convolutions, two pools, a projection: open_clip's interface for an image tower. 16 pixels will do, too."""

    def __init__(self, template: nn.Module, widths: tuple[int, int, int] = (24, 48, 96), embed_dim: int = 64) -> None:
        super().__init__()
        a, b, c = widths
        self.image_size, self.preprocess_cfg = template.image_size, template.preprocess_cfg
        self.layers = nn.Sequential(
            nn.Conv2d(3, a, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * c, embed_dim),
        )  # fmt: skip

    def forward(self, image_BCHW: Tensor) -> Tensor:
        embedding_BD: Tensor = self.layers(image_BCHW)
        return embedding_BD


def build(tower: str, seed: int) -> nn.Module:
    """`tower` is "convnet", "vit" or "vit-fff"; the same seed gives the same weights."""
    module: Any = build_untrained(CONFIG, seed=seed, preprocess=PREPROCESS)
    if tower == "convnet":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module.visual = ConvNet(module.visual).to(memory_format=torch.channels_last)
    elif tower == "vit-fff":
        dice = torch.Generator().manual_seed(seed)
        replace_feedforward(module, LEAVES, where="vision", generator=dice)
    elif tower != "vit":
        raise ValueError(f"{tower!r} is none of convnet, vit, vit-fff")
    return module
