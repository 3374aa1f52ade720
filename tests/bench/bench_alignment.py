"""Alignment scores: one pass with tangents against a backward pass per candidate.

    python -m tests.bench.bench_alignment [--model curate-tiny] [--candidates 64] [--rounds 5] [--threads 2]

Both sides score the same candidates along the same direction, and nothing is printed unless they agree to 1e-4. The
other side comes in two forms. `own terms` takes the gradient of each candidate's term in its scoring batch from one
kept graph: the same number. `alone` runs forward and backward for each candidate by itself, without any negatives:
another number, and the least that a method with one backward pass per candidate can cost. Beside them stand a plain
forward pass of all candidates, and the backward pass that makes the direction. Figures are medians over rounds in turn;
of the passes per candidate `--timed` are run, and multiplied.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curate.estimators.problem import DualEncoderProblem
from curate.models.build import build_untrained
from curate.models.configs import CONFIGS, PREPROCESS, with_loss
from curate.selection.alignment import directional_derivatives, own_terms, trusted_gradient
from tests.bench.machine import conditions

VIT: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "layers": 6, "width": 192, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}
MODELS = {"curate-tiny": CONFIGS["curate-tiny"], "curate-small": CONFIGS["curate-small"], "vit": VIT}
Batch = tuple[Tensor, Tensor]


def drawn(model: Any, count: int, seed: int) -> Batch:
    """Random pictures, and captions of 8 to 20 tokens."""
    dice = torch.Generator().manual_seed(seed)
    side = model.visual.image_size
    height, width = side if isinstance(side, tuple) else (side, side)
    image = torch.randint(0, 256, (count, 3, height, width), generator=dice, dtype=torch.uint8)
    token = torch.zeros(count, model.context_length, dtype=torch.int64)
    for row, length in enumerate(torch.randint(7, 20, (count,), generator=dice).tolist()):
        token[row, :length] = torch.randint(1, 49_000, (length,), generator=dice)
        token[row, length] = 49_407
    return image, token


def terms_of(model: Any, batch: Batch) -> Tensor:
    """Each candidate's own term in the batch, with a graph."""
    embedded = DualEncoderProblem(model).embed(batch)
    return own_terms(*embedded, model.logit_scale.exp(), model.logit_bias)


def slope(term: Tensor, named: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
    """One backward pass, and its product with the direction; the graph is kept."""
    gradients = torch.autograd.grad(term, [named[name] for name in direction], retain_graph=True, allow_unused=True)
    return sum(float((g * v).sum()) for g, v in zip(gradients, direction.values(), strict=True) if g is not None)


def own_gradients(model: Any, direction: dict[str, Tensor], batch: Batch, count: int) -> Callable[[], list[float]]:
    """A backward pass per candidate, for the first `count`, from a graph that is built once beforehand."""
    named, term_B = dict(model.named_parameters()), terms_of(model, batch)
    return lambda: [slope(term_B[i], named, direction) for i in range(count)]


def alone(model: Any, direction: dict[str, Tensor], batch: Batch, count: int) -> list[float]:
    """Forward and backward of each candidate by itself: the similarity of its pair in place of its term."""
    named, slopes = dict(model.named_parameters()), []
    for i in range(count):
        image_1D, text_1D = DualEncoderProblem(model).embed((batch[0][i : i + 1], batch[1][i : i + 1]))
        slopes.append(slope((image_1D * text_1D).sum(), named, direction))
    return slopes


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str, candidates: int, timed: int, rounds: int) -> str:
    """One row of the table. Ends the process where the two sides disagree."""
    model: Any = build_untrained(with_loss(MODELS[name], "sigmoid"), seed=0, preprocess=PREPROCESS).eval()
    batch = drawn(model, candidates, 1)
    trusted = drawn(model, candidates, 2)
    direction = trusted_gradient(model, trusted)
    passes = own_gradients(model, direction, batch, timed)
    expected, found = torch.tensor(passes()), directional_derivatives(model, direction, batch)[:timed]
    error = float((found - expected).abs().max() / expected.square().mean().sqrt())
    if not error <= 1e-4:
        sys.exit(f"{name}: the two sides differ by {error:.1e} of their size; nothing is measured")
    sides: dict[str, tuple[Callable[[], object], float]] = {
        "scores": (lambda: directional_derivatives(model, direction, batch), 1),
        "forward": (lambda: _forward(model, batch), 1),
        "direction": (lambda: trusted_gradient(model, trusted), 1),
        "own": (passes, candidates / timed),
        "alone": (lambda: alone(model, direction, batch, timed), candidates / timed),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (work, factor) in sides.items():
            times[side].append(seconds(work) * factor)
    ms = {side: 1000 * statistics.median(found) for side, found in times.items()}
    return (
        f"{name:<13}{ms['scores']:>9.0f}{ms['forward']:>10.0f}{ms['scores'] / ms['forward']:>8.2f}"
        f"{ms['direction']:>11.0f}{ms['own']:>11.0f}{ms['own'] / ms['scores']:>8.1f}"
        f"{ms['alone']:>9.0f}{ms['alone'] / ms['scores']:>8.1f}{error:>10.1e}"
    )


@torch.no_grad()
def _forward(model: Any, batch: Batch) -> None:
    DualEncoderProblem(model).embed(batch)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), nargs="*", default=list(MODELS))
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--timed", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    print(conditions())
    print(
        f"{chosen.candidates} candidates, {chosen.threads} threads, sigmoid loss; ms, medians of {chosen.rounds} rounds"
    )
    heads = {"model": -13, "scores": 9, "forward": 10, "x": 8, "direction": 11, "own terms": 11, "x ": 8, "alone": 9}
    print("".join(f"{head:{'<' if n < 0 else '>'}{abs(n)}}" for head, n in (heads | {" x": 8, "error": 10}).items()))
    for name in chosen.model:
        print(measure(name, chosen.candidates, chosen.timed, chosen.rounds), flush=True)


if __name__ == "__main__":
    main()
