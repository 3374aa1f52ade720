"""From a trained dense model to a tree of leaves: what conversion alone keeps, and what one epoch more gives back.

    python examples/feedforward_quality/study.py cifar10.parquet --arms dense-256 --seeds 0 --save weights
    python examples/feedforward_quality/upcycling.py cifar10.parquet weights/dense-256-0.pt

Every layer is converted in turn on what the converted layers before it give. `pruned` is the same conversion to one
leaf, which is a dense layer of equal active width; `continued` is the dense model with the same further training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from arms import ARMS
from study import Plan, Split, build, evaluate, read, train, write
from torch import Tensor, nn
from vit import VisionTransformer, load, normalised

from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.conversion import unexplained, upcycle
from curate.feedforward.dense import DenseParts, dense_of
from curate.feedforward.surgery import inputs_of

CONFIGS = {
    "upcycled-32": FeedforwardConfig(depth=3, leaf_width=32, balance=0.01),
    "upcycled-24+8": FeedforwardConfig(depth=3, leaf_width=24, shared_width=8, balance=0.01),
    "pruned": FeedforwardConfig(depth=0, leaf_width=32),
    "continued": None,
}


def inputs_to(layer: nn.Module, model: VisionTransformer, images: Tensor) -> Tensor:
    """What goes into a layer of the model, [n, D]."""
    with inputs_of({"layer": layer}) as kept, torch.no_grad():
        for rows in images.split(500):
            model(normalised(rows))
    return kept["layer"]


def converted(model: VisionTransformer, config: FeedforwardConfig, images: Tensor, held: Tensor) -> list[float]:
    """Replace the layers in place; the share of each dense output's variance that is missed on held-out images."""
    missed = []
    blocks: list[Any] = list(model.blocks)
    model.eval()
    for block in blocks:
        dense = dense_of(DenseParts(block.mlp[0], block.mlp[2], "gelu"))
        layer = upcycle(dense, config, inputs_to(block.mlp, model, images))
        missed.append(round(unexplained(layer, dense, inputs_to(block.mlp, model, held)), 3))
        block.mlp = layer
    return missed


def run(name: str, weights: Path, data: Split, test: Split, plan: Plan) -> dict[str, Any]:
    """Convert, measure, train on, measure again."""
    model, config = build(ARMS["dense-256"], 0), CONFIGS[name]
    log: dict[str, Any] = {}
    model.load_state_dict(torch.load(weights))
    if config is not None:
        log["unexplained"] = converted(model, config, data[0][:2048], test[0][:512])
    log["at_once"], log["usage_at_once"] = evaluate(model, test)
    print(f"{name}: test {log['at_once']:.2%}, unexplained {log.get('unexplained')}", flush=True)
    log |= train(model, data, test, plan, 1000, say=name)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="as for study.py")
    parser.add_argument("weights", type=Path, help="a dense-256 model of study.py")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, help="train on the first so many, test on as many")
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    plan = Plan(epochs=args.epochs, rate=5e-4)
    data, test = (load(args.data, split, args.images) for split in ("train", "test"))
    for name in CONFIGS:
        log = run(name, args.weights, data, test, plan)
        write(args.results, {**read(args.results), f"{name}/0": log})


if __name__ == "__main__":
    main()
