"""CIFAR-10 in memory, and a vision transformer of 4 x 4 tokens whose feedforward layers are handed in.

Three convolutions of stride 2 make 16 tokens of width 64, then three pre-norm blocks, the mean over tokens and a linear
head: 3.2 million multiply-adds per image with dense layers of 256 neurons, half of them in these layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
import torch
from torch import Tensor, nn
from torch.nn import functional

# B images of a batch, N images, T tokens, D width
WIDTH, BLOCKS, HEADS, CLASSES = 64, 3, 2, 10
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def load(path: Path, split: str, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of a parquet file with columns split, label (a word), jpg."""
    table = pq.read_table(path, filters=[("split", "==", split)])
    rows = table.slice(0, most or len(table)).to_pylist()
    images = np.stack([simplejpeg.decode_jpeg(row["jpg"], colorspace="RGB") for row in rows])
    return torch.from_numpy(images), torch.tensor([LABELS.index(row["label"]) for row in rows])


def normalised(images_BHWC: Tensor) -> Tensor:
    """float32 [B, 3, 32, 32] of mean 0 and deviation 1, channels last in memory."""
    return ((images_BHWC.float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)).permute(0, 3, 1, 2)


def augmented(images_BHWC: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels (its border is repeated) and flipped half of the time."""
    B, side = images_BHWC.shape[:2]
    shift_2B = torch.randint(-4, 5, (2, B), generator=generator)
    row_BH = (torch.arange(side) + shift_2B[0, :, None]).clamp(0, side - 1)
    column_BW = (torch.arange(side) + shift_2B[1, :, None]).clamp(0, side - 1)
    flip_B1 = torch.rand(B, 1, generator=generator) < 0.5
    column_BW = torch.where(flip_B1, column_BW.flip(1), column_BW)
    return images_BHWC[torch.arange(B)[:, None, None], row_BH[:, :, None], column_BW[:, None, :]]


class Block(nn.Module):
    """Attention and a feedforward layer, each on normed inputs and added to what came in."""

    def __init__(self, feedforward: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.inward, self.outward = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = feedforward

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.inward(self.norm_1(x_BTD)).view(B, T, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        seen_BTD = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + self.outward(seen_BTD)
        out_BTD: Tensor = x_BTD + self.mlp(self.norm_2(x_BTD))
        return out_BTD


class VisionTransformer(nn.Module):
    """`feedforward(block)` makes the layer of a block; everything else is the same for the same global seed."""

    def __init__(self, feedforward: Callable[[int], nn.Module]) -> None:
        super().__init__()
        widths = (3, WIDTH // 4, WIDTH // 2, WIDTH)
        stem: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            stem += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after)]
            stem += [nn.ReLU()] if number < 2 else []
        self.stem = nn.Sequential(*stem)
        self.place = nn.Parameter(torch.randn(16, WIDTH) * 0.02)
        blocks = [Block(nn.Identity()) for _ in range(BLOCKS)]
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        for number, block in enumerate(blocks):
            block.mlp = feedforward(number)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BTD = self.stem(images_BCHW).flatten(2).transpose(1, 2) + self.place
        logits_BC: Tensor = self.head(self.norm(self.blocks(x_BTD)).mean(1))
        return logits_BC
