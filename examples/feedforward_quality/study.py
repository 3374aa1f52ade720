"""Does a fast feedforward layer learn as well as a dense one? Trains the arms of `arms.py` on CIFAR-10.

    python examples/feedforward_quality/study.py cifar10.parquet
    python examples/feedforward_quality/study.py cifar10.parquet --arms no-balance no-gate soft --seeds 0

Every arm of a seed starts from the same weights outside its feedforward layers and sees the same images in the same
order. Each finished run is put into --results at once, and a run that is there already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, MAIN, Arm
from torch import Tensor, nn
from torch.nn import functional
from vit import VisionTransformer, augmented, load, normalised

from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.penalties import penalty

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run is trained; the same for every arm."""

    epochs: int = 4
    batch: int = 128
    rate: float = 2e-3
    warm_up: float = 0.1
    decay: float = 0.05
    smoothing: float = 0.1


def build(arm: Arm, seed: int) -> VisionTransformer:
    """A model with the arm's layers; what is not theirs depends on the seed only."""
    torch.manual_seed(seed)
    return VisionTransformer(lambda block: arm.layer(1000 * seed + block)).to(memory_format=torch.channels_last)


def trees(model: nn.Module) -> list[FastFeedforward]:
    """The layers that route, from the first block to the last."""
    return [module for module in model.modules() if isinstance(module, FastFeedforward)]


def optimizer_of(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """AdamW that leaves biases, norms and places alone."""
    named = list(model.named_parameters())
    weights = [p for name, p in named if p.ndim > 1 and name.split(".")[-1] not in ("b1", "b2", "place")]
    kept = {id(p) for p in weights}
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": [p for _, p in named if id(p) not in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.rate, weight_decay=plan.decay, fused=True)


def rate_at(done: float, plan: Plan) -> float:
    """Share of the full rate: up in a line, then down along a cosine; `done` is from 0 to 1."""
    if done < plan.warm_up:
        return done / plan.warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - plan.warm_up) / (1 - plan.warm_up)))


def train_step(model: nn.Module, images_BCHW: Tensor, labels_B: Tensor, optimizer: Any, plan: Plan) -> Tensor:
    """One step of the optimizer; the loss without penalties."""
    loss = functional.cross_entropy(model(images_BCHW), labels_B, label_smoothing=plan.smoothing)
    optimizer.zero_grad()
    (loss + penalty(model)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def train(model: nn.Module, data: Split, test: Split, plan: Plan, seed: int, *, say: str = "") -> dict[str, list[Any]]:
    """Train for plan.epochs; per epoch: loss, test accuracy, tokens per leaf of the test images, median step in ms.

    Milliseconds of processor time, of all threads together: other programs on the machine count for little.
    """
    images, labels = data
    optimizer, generator = optimizer_of(model, plan), torch.Generator().manual_seed(seed)
    steps = len(labels) // plan.batch
    log: dict[str, list[Any]] = {"loss": [], "accuracy": [], "usage": [], "step_ms": []}
    for epoch in range(plan.epochs):
        model.train()
        losses, seconds = [], []
        for step, rows in enumerate(torch.randperm(len(labels), generator=generator).split(plan.batch)[:steps]):
            batch = normalised(augmented(images[rows], generator))
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * rate_at((epoch * steps + step + 1) / (plan.epochs * steps), plan)
            started = time.process_time()
            losses.append(train_step(model, batch, labels[rows], optimizer, plan))
            seconds.append(time.process_time() - started)
        accuracy, usage = evaluate(model, test)
        found = (torch.stack(losses).mean().item(), accuracy, usage, 1000 * statistics.median(seconds))
        for name, value in zip(log, found, strict=True):
            log[name].append(value if isinstance(value, list) else round(value, 4))
        evenness = " ".join(f"{effective_leaves(counts):.1f}" for counts in usage)
        print(f"{say} epoch {epoch + 1}: loss {found[0]:.3f}, test {accuracy:.2%}, {found[3]:.0f} ms"
              + (f", leaves {evenness}" if usage else ""), flush=True)  # fmt: skip
    return log


def evaluate(model: nn.Module, test: Split, batch: int = 500) -> tuple[float, list[list[int]]]:
    """Share of images named rightly, and for every layer that routes hard the tokens in each leaf."""
    model.eval()
    layers, right = trees(model), 0
    for layer in layers:
        layer.usage.zero_()
        layer.count_usage = True
    with torch.no_grad():
        for images, labels in zip(test[0].split(batch), test[1].split(batch), strict=True):
            right += int((model(normalised(images)).argmax(1) == labels).sum())
    for layer in layers:
        layer.count_usage = False
    return right / len(test[1]), [layer.usage.tolist() for layer in layers if not layer.soft]


def effective_leaves(counts: list[int]) -> float:
    """exp of the entropy of the shares: as many leaves as are used, if they were used alike."""
    share = torch.tensor(counts, dtype=torch.float64) / max(sum(counts), 1)
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def run(arm: Arm, seed: int, data: Split, test: Split, plan: Plan, save: Path | None) -> dict[str, Any]:
    """Train one arm from one seed; a soft one is measured routed hard as well."""
    model = build(arm, seed)
    started = time.perf_counter()
    log: dict[str, Any] = train(model, data, test, plan, seed, say=f"{arm.name} seed {seed}")
    log["minutes"] = round((time.perf_counter() - started) / 60, 2)
    log |= {"active": arm.active, "operations": arm.operations, "weights": sum(p.numel() for p in model.parameters())}
    if arm.soft:
        for layer in trees(model):
            layer.soft = False
        log["hardened_accuracy"], usage = evaluate(model, test)
        log["hardened_usage"] = usage
        print(f"{arm.name} seed {seed} hardened: test {log['hardened_accuracy']:.2%}")
    if save:
        save.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), save / f"{arm.name}-{seed}.pt")
    return log


def read(path: Path) -> dict[str, Any]:
    """The runs written so far, by "arm/seed"."""
    runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return runs


def write(path: Path, results: dict[str, Any]) -> None:
    """One line per run, under its name only when complete."""
    lines = ",\n".join(f'"{name}": {json.dumps(log, separators=(",", ":"))}' for name, log in results.items())
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + lines + "\n}\n")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="parquet with columns split (train, test), label (a word) and jpg")
    parser.add_argument("--arms", nargs="+", default=MAIN, choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--epochs", type=int, default=Plan().epochs)
    parser.add_argument("--images", type=int, help="train on the first so many, test on as many")
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    parser.add_argument("--save", type=Path, help="folder for the trained weights")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    plan = Plan(epochs=args.epochs)
    data, test = (load(args.data, split, args.images) for split in ("train", "test"))
    for seed in args.seeds:
        for name in args.arms:
            if f"{name}/{seed}" not in read(args.results):
                log = run(ARMS[name], seed, data, test, plan, args.save)
                write(args.results, {**read(args.results), f"{name}/{seed}": log})


if __name__ == "__main__":
    main()
