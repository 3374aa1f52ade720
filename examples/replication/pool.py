"""CIFAR-10 as the study needs it: a noisy pool, clean pairs for the reference and for trust, test images; in memory.

47,000 pairs of which a share `noise` has the caption of another, random pair; 2,500 clean ones that the reference is
fitted on; 500 clean ones that are trusted; 10,000 test images. All splits are the same for every seed and noise.
"""

# N pairs, C channels, H, W height and width, T tokens

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from curate.learner.dataset import CachedPairs, Places

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
REFERENCE, TRUSTED = 2_500, 500
CAPTIONS = tuple(f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in NAMES)


@dataclass(frozen=True, slots=True)
class Cifar:
    """uint8 images [N, 3, 32, 32] and labels [N] of both splits."""

    train_NCHW: Tensor
    train_N: NDArray[np.int64]
    test_NCHW: Tensor
    test_N: NDArray[np.int64]


def read_cifar(parquet: Path) -> Cifar:
    """Decode the parquet file that `unpack_cifar10.py` reads, too."""
    table = pq.read_table(parquet)
    splits = {}
    for split in ("train", "test"):
        rows = table.filter(pq_equal(table, split)).to_pylist()
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["jpg"])).convert("RGB")) for row in rows])
        labels = np.array([NAMES.index(row["label"]) for row in rows])
        splits[split] = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)
    return Cifar(*splits["train"], *splits["test"])


def pq_equal(table: object, split: str) -> object:
    """The rows of one split."""
    import pyarrow.compute as pc

    return pc.equal(table["split"], split)  # type: ignore[index]


def split_rows() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the training split: the reference's, the trusted ones, the pool."""
    order = np.random.default_rng(7).permutation(50_000)
    return np.split(order, [REFERENCE, REFERENCE + TRUSTED])


def pairs_of(
    cifar: Cifar, row_n: NDArray[np.int64], token_10T: Tensor, noise: float = 0.0, seed: int = 0
) -> CachedPairs:
    """Pairs of these rows, a share `noise` with another's caption; places say which are clean."""
    dice = np.random.default_rng([seed, 11])
    label_n = cifar.train_N[row_n].copy()
    wrong_n = dice.random(len(row_n)) < noise
    label_n[wrong_n] = dice.choice(cifar.train_N[row_n], int(wrong_n.sum()))
    ids_n16 = np.zeros((len(row_n), 16), np.uint8)
    ids_n16[:, :8] = row_n.astype("<u8").view(np.uint8).reshape(-1, 8)
    keys = tuple(map(str, row_n.tolist()))
    places = Places(ids_n16, np.zeros(len(row_n), np.int32), row_n.astype(np.int32), keys, tuple((~wrong_n).tolist()))
    return CachedPairs(cifar.train_NCHW[row_n], token_10T[label_n], places)
