"""Which kernels work on this machine, and from how many tokens on a fast feedforward layer beats the dense one here.

Compiling what was never compiled takes some ten seconds, once; the measurements about two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

REFERENCE: Final = (768, 5, 96)  # width, depth and leaf width that the measurements are taken at: a ViT-B block
TOKENS: Final = (1, 32, 512)
SOURCES: Final = {
    "fast feedforward": "fff/leaf.cpp",
    "path feedforward": "fff/path.cpp",
    "selection": "selection/pairs.cpp",
}


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """A C++ kernel: whether it is there, how long compiling took just now (0.0: found compiled), and why it is not."""

    job: str
    built: bool
    threaded: bool
    seconds: float
    why_not: str | None


@dataclass(frozen=True, slots=True)
class Crossover:
    """One measured size: how many times faster than the dense layer each kernel is, and which one dispatch takes."""

    dtype: str
    tokens: int
    chosen: str
    over_dense: dict[str, float]

    @property
    def quickest(self) -> str:
        """The kernel that was the quickest in this measurement."""
        return max(self.over_dense, key=lambda name: self.over_dense[name])


def native_kernels() -> tuple[NativeKernel, ...]:
    """Compile the C++ kernels, or find them compiled."""
    from curate.kernels.compiled import build

    found = ((job, build(source)) for job, source in SOURCES.items())
    return tuple(NativeKernel(job, b.path is not None, b.threaded, round(b.seconds, 1), b.why_not) for job, b in found)


def crossovers(shape: tuple[int, int, int] = REFERENCE, tokens: tuple[int, ...] = TOKENS) -> tuple[Crossover, ...]:
    """Measure the leaf variant of a (width, depth, leaf width), and say what dispatch would take.

    In fp32, and in bf16 where the hardware multiplies it: elsewhere torch's own bf16 takes seconds, and nobody uses it.
    """
    import torch

    from curate.kernels.fff import Leaves, dispatch
    from curate.kernels.fff.crossovers import Shape, measure
    from curate.models.precision import has_native_bf16

    width, depth, leaf_width = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for dtype in ("float32", "bfloat16") if has_native_bf16(torch.device(device)) else ("float32",):
        kind = getattr(torch, dtype)
        sizes = (
            (2**depth, width, leaf_width),
            (2**depth, leaf_width),
            (2**depth, leaf_width, width),
            (2**depth, width),
        )
        leaves = Leaves(*(torch.empty(size, dtype=kind, device="meta") for size in sizes))
        for rung in measure(Shape(width, 2**depth, leaf_width, dtype, device), tokens):
            chosen = dispatch.leaf_choice(torch.empty(rung.tokens, width, dtype=kind, device=device), leaves)
            over = {name: round(rung.dense / seconds, 2) for name, seconds in rung.seconds.items()}
            found.append(Crossover(dtype, rung.tokens, chosen, over))
    return tuple(found)
