"""Joint example selection inside an existing loop: the three lines marked below are all that is added.

    python examples/online_selection.py data/00000.tar data/00001.tar
    python examples/online_selection.py data/*.tar --model ViT-B-32 --reference ViT-B-32:laion2b_s34b_b79k

Takes any webdataset shards with jpg and txt. Without --reference a first model is trained plainly for an epoch and then
serves as the reference. Prints the loss per step, and how many samples were looked at and how many trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import open_clip
import torch
import webdataset as wds
from torch import Tensor, nn

import curate

Batches = Iterable[tuple[Tensor, Tensor]]


def super_batches(shards: list[str], size: int, model: str) -> tuple[nn.Module, Batches]:
    """A fresh model, and a loader of (images, tokens) prepared for it."""
    network, _, preprocess = open_clip.create_model_and_transforms(model)
    tokenizer = open_clip.get_tokenizer(model)
    pairs = wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg;jpeg;png;webp", "txt")
    prepared = pairs.map_tuple(preprocess, lambda text: tokenizer([text])[0])
    return network, prepared.batched(size, partial=False)


def train(model: nn.Module, loader: Batches) -> int:
    """One epoch of plain contrastive training; returns the samples trained on."""
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95))
    samples = 0
    for step, (images, texts) in enumerate(loader):
        loss = loss_of(*model(images, texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        samples += len(images)
        print(f"  step {step}: {len(images)} samples, loss {loss.item():.3f}")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="webdataset shards")
    parser.add_argument("--model", default="tiny", help="an open_clip architecture, or the tiny one beside this file")
    parser.add_argument("--reference", help="a pretrained model of the same preprocessing, architecture:tag")
    parser.add_argument("--super-batch", type=int, default=20)
    parser.add_argument("--keep", type=float, default=0.2)
    args = parser.parse_args()

    torch.manual_seed(0)
    open_clip.add_model_config(Path(__file__).with_name("tiny.json"))
    reference: nn.Module | str = args.reference
    if not reference:
        print("reference, one plain epoch")
        reference, loader = super_batches(args.shards, args.super_batch, args.model)
        train(reference, loader)

    print("learner, one epoch of selected sub-batches")
    model, loader = super_batches(args.shards, args.super_batch, args.model)
    selector = curate.JointSelector(reference, model, keep=args.keep)  # 1
    loader = selector.wrap(loader)  # 2
    samples = train(model, loader)  # 3: the loop itself is unchanged
    print(f"{loader.step} super-batches of {args.super_batch} looked at, {samples} samples trained on")


if __name__ == "__main__":
    main()
