"""Inputs, tolerances and a second derivation for the fast feedforward tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from curate.kernels.fff import Activation, LeafKernel, LeafTangents, Leaves, PathKernel, Paths, PathTangents, plain

# T tokens, D width in, E width out, L leaves, H neurons of a leaf, N nodes of a tree, K trees, P levels of a path

# Largest error allowed, relative to the largest value of the tensor that is compared.
TOLERANCE = {
    torch.float64: 1e-12,  # another order of summation
    torch.float32: 2e-5,  # the same, over a few hundred terms, and polynomials for erf and exp
    torch.bfloat16: 2e-2,  # 8 bits of mantissa, rounded at the output and at `pre`
    torch.float16: 4e-3,  # 11 bits
}


@dataclass(frozen=True, slots=True)
class LeafCase:
    """A call of the leaf variant, with an upstream gradient and a direction for every input."""

    x: Tensor
    leaf: Tensor
    gate: Tensor | None
    leaves: Leaves
    grad: Tensor
    tangents: LeafTangents


@dataclass(frozen=True, slots=True)
class PathCase:
    """The same of the path variant."""

    x: Tensor
    paths: Paths
    grad: Tensor
    tangents: PathTangents


# name -> (T, D, H, E, depth)
LEAF_SHAPES = {
    "usual": (50, 32, 16, 32, 3),
    "odd": (37, 80, 24, 50, 2),
    "one-neuron": (19, 33, 1, 7, 4),
    "one-token": (1, 40, 96, 40, 5),
    "dense": (23, 24, 40, 24, 0),
    "none": (0, 16, 8, 16, 2),
    "many": (300, 64, 48, 64, 1),
}


def leaf_case(
    name: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, gated: bool = True, only_leaf: int | None = None
) -> LeafCase:
    """A case of `LEAF_SHAPES`; `only_leaf` sends all tokens to one leaf, and the last leaf is always empty."""
    T, D, H, E, depth = LEAF_SHAPES[name]
    L, draw = 2**depth, _drawer(dtype, seed)
    leaf_T = torch.randint(max(L - 1, 1), (T,), generator=torch.Generator().manual_seed(seed))
    if only_leaf is not None:
        leaf_T.fill_(only_leaf)
    shapes = ((L, D, H), (L, H), (L, H, E), (L, E))
    gate_T = draw(T) if gated else None
    tangents = LeafTangents(draw(T, D), draw(T) if gated else None, *(draw(*shape) for shape in shapes))
    leaves = Leaves(*(draw(*shape, scale=shape[-2] ** -0.5) for shape in shapes))
    return LeafCase(draw(T, D), leaf_T, gate_T, leaves, draw(T, E), tangents)


# name -> (T, D, E, K, P)
PATH_SHAPES = {
    "usual": (40, 32, 32, 2, 4),
    "odd": (17, 37, 21, 3, 3),
    "one-token": (1, 80, 80, 1, 7),
    "one-node": (5, 16, 8, 2, 1),
    "none": (0, 16, 16, 1, 3),
}


def path_case(name: str, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> PathCase:
    """A case of `PATH_SHAPES`."""
    T, D, E, K, P = PATH_SHAPES[name]
    N, draw = 2**P - 1, _drawer(dtype, seed)
    shapes = ((K, N, D), (K, N), (K, N, E), (E,))
    paths = Paths(draw(*shapes[0], scale=D**-0.5), *(draw(*shape, scale=0.3) for shape in shapes[1:]))
    return PathCase(draw(T, D), paths, draw(T, E), PathTangents(draw(T, D), *(draw(*shape) for shape in shapes)))


def leaf_errors(kernel: LeafKernel, case: LeafCase, activation: Activation) -> dict[str, float]:
    """Largest relative errors of a kernel's outputs against the oracle's, computed in fp64 from the same numbers."""
    wide = _widened(case)
    y, pre = kernel.leaf_forward(case.x, case.leaf, case.gate, case.leaves, activation)
    back = kernel.leaf_backward(case.grad, case.x, case.leaf, case.gate, pre, case.leaves, activation)
    dy = kernel.leaf_jvp(case.tangents, case.x, case.leaf, case.gate, pre, case.leaves, activation)
    y_true, pre_true = plain.leaf_forward(wide.x, wide.leaf, wide.gate, wide.leaves, activation)
    back_true = plain.leaf_backward(wide.grad, wide.x, wide.leaf, wide.gate, pre_true, wide.leaves, activation)
    dy_true = plain.leaf_jvp(wide.tangents, wide.x, wide.leaf, wide.gate, pre_true, wide.leaves, activation)
    found = {"y": (y, y_true), "pre": (pre, pre_true), "dy": (dy, dy_true)}
    found |= {"dx": (back[0], back_true[0]), "dgate": (back[1], back_true[1])}
    found |= {f.name: (getattr(back[2], f.name), getattr(back_true[2], f.name)) for f in fields(Leaves)}
    return {name: relative_error(*pair) for name, pair in found.items()}


def path_errors(kernel: PathKernel, case: PathCase, activation: Activation) -> dict[str, float]:
    """The same of the path variant; paths are the kernel's own, since a rounded tie may go either way."""
    wide = _widened(case)
    y, pre, node = kernel.path_forward(case.x, case.paths, activation)
    back = kernel.path_backward(case.grad, case.x, pre, node, case.paths, activation)
    dy = kernel.path_jvp(case.tangents, case.x, pre, node, case.paths, activation)
    y_true, pre_true, node_true = plain.path_forward(wide.x, wide.paths, activation)
    assert torch.equal(node, node_true), "another path was taken"
    back_true = plain.path_backward(wide.grad, wide.x, pre_true, node_true, wide.paths, activation)
    dy_true = plain.path_jvp(wide.tangents, wide.x, pre_true, node_true, wide.paths, activation)
    found = {"y": (y, y_true), "pre": (pre, pre_true), "dy": (dy, dy_true), "dx": (back[0], back_true[0])}
    found |= {f.name: (getattr(back[1], f.name), getattr(back_true[1], f.name)) for f in fields(Paths)}
    return {name: relative_error(*pair) for name, pair in found.items()}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, over the largest magnitude wanted; infinite where shapes or finiteness differ."""
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    difference = (found.double().cpu() - wanted.double().cpu()).abs().max()
    return float(difference / wanted.double().abs().max().clamp_min(1e-30)) if torch.isfinite(difference) else math.inf


def _drawer(dtype: torch.dtype, seed: int):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return draw


def _widened(value):  # type: ignore[no-untyped-def]
    """The same case in fp64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if value is None:
        return None
    return type(value)(*(_widened(getattr(value, field.name)) for field in fields(value)))
