"""Put fast feedforward layers into an open_clip model, converted from its dense weights, and train on.

    python examples/fast_feedforward.py OUT
    python examples/fast_feedforward.py OUT --model ViT-B-32 --depth 5 --leaf-width 96

Prints what the conversion missed of each dense layer, what the model costs before and after, the loss of a few steps
(the layers' balance penalty included), and how evenly the leaves are used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import open_clip
import torch
from torch.utils.data import DataLoader

import curate
from curate.feedforward.penalties import penalty
from curate.feedforward.report import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output directory of `curate score`")
    parser.add_argument("--model", default="tiny", help="an open_clip architecture, or the tiny one beside this file")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--leaf-width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    torch.manual_seed(0)
    open_clip.add_model_config(Path(__file__).with_name("tiny.json"))
    model, _, preprocess = open_clip.create_model_and_transforms(args.model)
    batches = curate.SubBatches(args.out, transform=preprocess, tokenizer=open_clip.get_tokenizer(args.model))
    loader = DataLoader(batches, batch_size=None)

    config = curate.FeedforwardConfig(depth=args.depth, leaf_width=args.leaf_width, balance=0.01)
    first = next(iter(loader))
    calibration = [(first.images, first.captions)]
    print(curate.replace_feedforward(model, config, init="upcycle", calibration=calibration))

    for layer in model.modules():
        if isinstance(layer, curate.FastFeedforward):
            layer.count_usage = True
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95))
    for step, batch in zip(range(args.steps), loader, strict=False):
        loss = loss_of(*model(batch.images, batch.captions)) + penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")
    print(report(model))


if __name__ == "__main__":
    main()
