"""Train on the sub-batches exactly as they were selected, in a plain torch loop.

    python examples/torch_loop.py OUT
    python examples/torch_loop.py OUT --model ViT-B-32 --epochs 1

Each sub-batch is one optimizer step: the sampler chose its members for one another. Prints the mean loss per epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import open_clip
import torch
from torch.utils.data import DataLoader

import curate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output directory of `curate score`")
    parser.add_argument("--model", default="tiny", help="an open_clip architecture, or the tiny one beside this file")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(0)
    open_clip.add_model_config(Path(__file__).with_name("tiny.json"))
    model, _, preprocess = open_clip.create_model_and_transforms(args.model)
    batches = curate.SubBatches(args.out, transform=preprocess, tokenizer=open_clip.get_tokenizer(args.model))
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers)

    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95))
    for epoch in range(args.epochs):
        losses = []
        for batch in loader:
            loss = loss_of(*model(batch.images, batch.captions))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: {len(losses)} sub-batches, mean loss {sum(losses) / len(losses):.3f}")


if __name__ == "__main__":
    main()
