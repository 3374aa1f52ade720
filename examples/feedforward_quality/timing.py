"""What the arms cost at the sizes of the study: a layer forward, forward with backward, and the model's training step.

    python examples/feedforward_quality/timing.py

Batches of 2,048 tokens, 128 images. The arms run in turn, so that all see the same machine; the figures are medians of
processor time on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from arms import ARMS
from study import Plan, build, optimizer_of, train_step
from torch import Tensor, nn
from vit import WIDTH

from curate.feedforward.penalties import penalty

NAMES = ("dense-256", "dense-32", "fff-32", "fff-24+8", "deep-5x8", "path-8x3", "soft")


def forward(layer: nn.Module, x_TD: Tensor) -> None:
    with torch.no_grad():
        layer.eval()(x_TD)


def backward(layer: nn.Module, x_TD: Tensor) -> None:
    (layer.train()(x_TD).sum() + penalty(layer)).backward()


def timed(work: Callable[[], object]) -> float:
    """Processor time in ms."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def main() -> None:
    torch.set_num_threads(1)
    generator, plan = torch.Generator().manual_seed(0), Plan()
    x_TD = torch.randn(2048, WIDTH, generator=generator).requires_grad_()
    images_BCHW = torch.randn(128, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    labels_B = torch.randint(10, (128,), generator=generator)
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in NAMES}
    models = {name: build(ARMS[name], 0) for name in NAMES}
    optimizers = {name: optimizer_of(model, plan) for name, model in models.items()}
    for _ in range(30):
        for name, model in models.items():
            layer = ARMS[name].layer(0)
            backward(layer, x_TD)  # the first call makes the gradients' memory
            parts = (partial(forward, layer, x_TD), partial(backward, layer, x_TD))
            step = partial(train_step, model.train(), images_BCHW, labels_B, optimizers[name], plan)
            taken[name].append(tuple(timed(work) for work in (*parts, step)))
    columns = ("arm", "operations", "forward, ms", "ratio", "with backward, ms", "ratio", "model's step, ms", "ratio")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in taken.items()}
    for name, row in medians.items():
        cells = (f"{ms:.2f} | {dense / ms:.2f} x" for ms, dense in zip(row, medians[NAMES[0]], strict=True))
        print(f"| {name} | {ARMS[name].operations:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
