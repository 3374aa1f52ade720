"""Conditional matrix multiplication: a token pays for the neurons on its own branch of a tree, not for all of them.

Mathematics. Two variants, both after Belcak & Wattenhofer (arXiv 2308.14711, 2311.10770).

    leaf   y_t = g_t (act(x_t W1[e] + b1[e]) W2[e] + b2[e]),  e = leaf_t        one small MLP of L, chosen beforehand
    path   y_t = b2 + sum_k sum_p act(z_tkp) W2[k, n_p],  z_tkp = <x_t, W1[k, n_p]> + b1[k, n_p]
           n_0 = 0, n_{p+1} = 2 n_p + 1 + [z_tkp > 0]                           K trees of single neurons, P levels

`leaf_of` turns node logits into leaves. **Ties go left**: the right child is taken if and only if z > 0, in every
kernel, in training and in evaluation; so does NaN.

Cost per token, forward, in multiply-adds: leaf H (D + E), path K P (D + E), against H_dense (D + E) of a dense layer.

Contract. A kernel is a module with the functions of `LeafKernel` and `PathKernel` over plain tensors, which know
nothing of autograd; `functions.py` gives them forward, backward, jvp and vmap. All floating tensors of a call have one
dtype and one device. Sums are taken in fp32 at least; `pre`, the values before the activation, comes back in the dtype
of x. Any T including 0, any strides. A gradient of a leaf or node that no token reached is exactly zero. A NaN in one
token reaches that token's output alone (and the gradients of its own leaf). The same call gives the same bits, whatever
the number of threads.

`plain.py` is the oracle; `grouped.py` needs nothing but torch; `native.py` is C++; `on_gpu.py` is Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

# T tokens, D width in, E width out, L leaves, H neurons of a leaf, N nodes of a tree, K trees, P levels of a path
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True, slots=True)
class Leaves:
    """L small MLPs: w1 [L, D, H], b1 [L, H], w2 [L, H, E], b2 [L, E]. Also holds their gradients."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


@dataclass(frozen=True, slots=True)
class LeafTangents:
    """Directions for every input of `leaf_forward`, of the same shapes; None stands for zero."""

    x: Tensor | None = None
    gate: Tensor | None = None
    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Paths:
    """K trees of N = 2**P - 1 neurons: w1 [K, N, D], b1 [K, N], w2 [K, N, E], b2 [E]. Also holds their gradients."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


@dataclass(frozen=True, slots=True)
class PathTangents:
    """Directions for every input of `path_forward`, of the same shapes; None stands for zero."""

    x: Tensor | None = None
    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None


class LeafKernel(Protocol):
    """The leaf variant. `leaf_T` is int64 in 0..L-1, `gate_T` a factor per token or None for ones."""

    def leaf_forward(
        self, x_TD: Tensor, leaf_T: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: Activation
    ) -> tuple[Tensor, Tensor]:
        """(y [T, E], pre [T, H]): the output, and what went into the activation."""

    def leaf_backward(
        self,
        grad_TE: Tensor,
        x_TD: Tensor,
        leaf_T: Tensor,
        gate_T: Tensor | None,
        pre_TH: Tensor,
        leaves: Leaves,
        activation: Activation,
    ) -> tuple[Tensor, Tensor, Leaves]:
        """(dx [T, D], dgate [T], gradients of the leaves) from dy; `dgate` also where `gate_T` is None."""

    def leaf_jvp(
        self,
        tangents: LeafTangents,
        x_TD: Tensor,
        leaf_T: Tensor,
        gate_T: Tensor | None,
        pre_TH: Tensor,
        leaves: Leaves,
        activation: Activation,
    ) -> Tensor:
        """The directional derivative of y, [T, E]."""


class PathKernel(Protocol):
    """The path variant. `node_TKP` int64 are the nodes a token passed, `pre_TKP` their z."""

    def path_forward(self, x_TD: Tensor, paths: Paths, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
        """(y [T, E], pre [T, K, P], node [T, K, P])."""

    def path_backward(
        self, grad_TE: Tensor, x_TD: Tensor, pre_TKP: Tensor, node_TKP: Tensor, paths: Paths, activation: Activation
    ) -> tuple[Tensor, Paths]:
        """(dx [T, D], gradients of the trees) from dy; the choice of the path has no gradient."""

    def path_jvp(
        self,
        tangents: PathTangents,
        x_TD: Tensor,
        pre_TKP: Tensor,
        node_TKP: Tensor,
        paths: Paths,
        activation: Activation,
    ) -> Tensor:
        """The directional derivative of y along the path that was taken, [T, E]."""


def leaf_of(logits_TN: Tensor) -> Tensor:
    """The leaf [T] int64 of every token, from the logits of all N = L - 1 nodes in breadth-first order; O(T log L).

    Example: a tree of depth 2 has nodes 0, then 1 and 2; logits (1.0, -3.0, 0.0) go right at node 0, left (a tie) at
    node 2, and so to leaf 2. No nodes at all is the tree of depth 0 with its one leaf.
    """
    depth = depth_of(logits_TN.shape[-1] + 1)
    node_T = torch.zeros(logits_TN.shape[:-1], dtype=torch.int64, device=logits_TN.device)
    for _ in range(depth):
        right_T = logits_TN.gather(-1, node_T.unsqueeze(-1)).squeeze(-1) > 0
        node_T = 2 * node_T + 1 + right_T
    return node_T - logits_TN.shape[-1]


def depth_of(leaves: int) -> int:
    """log2 of a number of leaves; ValueError unless it is a power of two."""
    if leaves < 1 or leaves & (leaves - 1):
        raise ValueError(f"{leaves} leaves are no power of two: a tree of depth d has 2**d")
    return leaves.bit_length() - 1


def check_leaves(x_TD: Tensor, leaf_T: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: str) -> None:
    """ValueError unless shapes, dtypes and devices fit together; the message names what does not."""
    _check_activation(activation)
    if x_TD.ndim != 2:
        raise ValueError(f"x has shape {tuple(x_TD.shape)}, not [T, D]: flatten its leading dimensions")
    T, D = x_TD.shape
    L, H, E = leaves.w1.shape[0], leaves.w1.shape[-1], leaves.w2.shape[-1]
    _check_shapes(
        {"w1": leaves.w1, "b1": leaves.b1, "w2": leaves.w2, "b2": leaves.b2, "leaf": leaf_T}
        | ({} if gate_T is None else {"gate": gate_T}),
        {"w1": (L, D, H), "b1": (L, H), "w2": (L, H, E), "b2": (L, E), "leaf": (T,), "gate": (T,)},
    )
    if leaf_T.dtype != torch.int64:
        raise ValueError(f"leaf is {leaf_T.dtype}, not int64")
    _check_alike(x_TD, (leaves.w1, leaves.b1, leaves.w2, leaves.b2, *(() if gate_T is None else (gate_T,))))


def check_paths(x_TD: Tensor, paths: Paths, activation: str) -> None:
    """ValueError unless shapes, dtypes and devices fit together; the message names what does not."""
    _check_activation(activation)
    if x_TD.ndim != 2:
        raise ValueError(f"x has shape {tuple(x_TD.shape)}, not [T, D]: flatten its leading dimensions")
    D, (K, N), E = x_TD.shape[1], paths.w1.shape[:2], paths.w2.shape[-1]
    _check_shapes(
        {"w1": paths.w1, "b1": paths.b1, "w2": paths.w2, "b2": paths.b2},
        {"w1": (K, N, D), "b1": (K, N), "w2": (K, N, E), "b2": (E,)},
    )
    depth_of(N + 1)
    _check_alike(x_TD, (paths.w1, paths.b1, paths.w2, paths.b2))


def _check_activation(activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(f"activation {activation!r} is none of {', '.join(get_args(Activation))}")


def _check_shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shapes[name]} as x and w1 ask for")


def _check_alike(x_TD: Tensor, others: tuple[Tensor, ...]) -> None:
    if not x_TD.is_floating_point():
        raise ValueError(f"x is {x_TD.dtype}, not floating point")
    for other in others:
        if other.dtype != x_TD.dtype or other.device != x_TD.device:
            raise ValueError(f"x is {x_TD.dtype} on {x_TD.device}, a weight {other.dtype} on {other.device}")
