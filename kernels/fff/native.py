"""Fast feedforward in C++ on the CPU: tokens grouped by leaf through register tiles, or each walked down its path.

fp32 and bf16, sums in fp32; `supports` says whether. Tokens are gathered and scattered inside the tiles, weights read
where they lie: nothing is copied that is contiguous. Cost of a call besides the arithmetic: a few microseconds, most of
them torch's (the output, 0.1 us for every look at a tensor). Arguments travel as one packed `bytes`, since ctypes takes
0.3 us to convert each of thirty.

`leaf.cpp`, `path.cpp` and `../native/tiles.hpp` say how. `leaf_infer`, `route_tokens` and `path_infer` are extra: what
one token needs, in one call.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from curate.kernels import compiled
from curate.kernels.fff import (
    Activation,
    LeafTangents,
    Leaves,
    Paths,
    PathTangents,
    check_leaves,
    check_paths,
    depth_of,
)

# T tokens, D width in, E width out, L leaves, H neurons of a leaf, N nodes of a tree, K trees, P levels of a path
_SOURCES = ("fff/leaf.cpp", "fff/path.cpp")
_DTYPES = (torch.float32, torch.bfloat16)
_NUMBER: dict[str, int] = {name: number for number, name in enumerate(get_args(Activation))}  # as in vector_math.hpp
# `struct Core` and `struct Call` of the two sources
_LEAF_CORE, _LEAF_CALL = struct.Struct("16q").pack, struct.Struct("33q").pack
_PATH_CORE, _PATH_CALL = struct.Struct("15q").pack, struct.Struct("30q").pack
_NONE6: tuple[Tensor | None, ...] = (None,) * 6
_NONE5: tuple[Tensor | None, ...] = (None,) * 5


def supports(x: Tensor) -> bool:
    """Whether these kernels take `x`: on the CPU, fp32 or bf16, and the libraries are built."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and why_not() is None


@functools.cache
def why_not() -> str | None:
    """Why the libraries are not there; None where they are."""
    return next((reason for source in _SOURCES if (reason := compiled.why_not(source)) is not None), None)


# ---- leaves ----


def leaf_forward(
    x_TD: Tensor, leaf_T: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: Activation
) -> tuple[Tensor, Tensor]:
    """See `LeafKernel`. ValueError where a leaf is not in 0..L-1."""
    y_TE, pre_TH = x_TD.new_empty(len(x_TD), leaves.w2.shape[2]), x_TD.new_empty(len(x_TD), leaves.w2.shape[1])
    _leaf_call("leaf_forward", x_TD, leaf_T, gate_T, leaves, activation, y=y_TE, pre_out=pre_TH)
    return y_TE, pre_TH


def leaf_backward(
    grad_TE: Tensor,
    x_TD: Tensor,
    leaf_T: Tensor,
    gate_T: Tensor | None,
    pre_TH: Tensor,
    leaves: Leaves,
    activation: Activation,
) -> tuple[Tensor, Tensor, Leaves]:
    """See `LeafKernel`. Twice the forward's multiply-adds, and L (D + E) H numbers written."""
    dx_TD, dgate_T = x_TD.new_empty(x_TD.shape), x_TD.new_empty(len(x_TD))
    d = Leaves(*(w.new_empty(w.shape) for w in (leaves.w1, leaves.b1, leaves.w2, leaves.b2)))
    out = (dx_TD, dgate_T, d.w1, d.b1, d.w2, d.b2)
    _leaf_call("leaf_backward", x_TD, leaf_T, gate_T, leaves, activation, pre=pre_TH, grad=grad_TE, out=out)
    return dx_TD, dgate_T, d


def leaf_jvp(
    tangents: LeafTangents,
    x_TD: Tensor,
    leaf_T: Tensor,
    gate_T: Tensor | None,
    pre_TH: Tensor,
    leaves: Leaves,
    activation: Activation,
) -> Tensor:
    """See `LeafKernel`. A product per tangent of x, w1 and w2, and one for what reaches w2."""
    dy_TE = x_TD.new_empty(len(x_TD), leaves.w2.shape[2])
    t = (tangents.x, tangents.gate, tangents.w1, tangents.b1, tangents.w2, tangents.b2)
    _leaf_call("leaf_jvp", x_TD, leaf_T, gate_T, leaves, activation, y=dy_TE, pre=pre_TH, tangents=t)
    return dy_TE


def route_tokens(x_TD: Tensor, node_weight_ND: Tensor, node_bias_N: Tensor) -> Tensor:
    """The leaf [T] int64 of every token: log2 L products of rows, where dense logits take L - 1.

    Right if and only if z > 0, as `leaf_of`; a z within rounding of 0 may differ from that of dense logits.
    """
    x, weight, bias = x_TD.contiguous(), node_weight_ND.contiguous(), node_bias_N.contiguous()
    (T, D), L = x.shape, len(bias) + 1
    _check_nodes(x, weight, bias)
    leaf_T = torch.empty(T, dtype=torch.int64)
    sizes = (T, D, 0, L, 0, x.dtype is torch.bfloat16, 0, torch.get_num_threads())
    pointers = (x.data_ptr(), 0, 0, 0, 0, weight.data_ptr(), bias.data_ptr(), leaf_T.data_ptr())
    _check(_function("route_tokens")(_LEAF_CORE(*pointers, *sizes)))
    return leaf_T


def leaf_infer(
    x_TD: Tensor, node_weight_ND: Tensor, node_bias_N: Tensor, leaves: Leaves, activation: Activation
) -> Tensor:
    """y [T, E]: `route_tokens` and `leaf_forward` without a gate in one call, with the same bits, for few tokens."""
    w1, b1, w2, b2 = leaves.w1, leaves.b1, leaves.w2, leaves.b2
    (T, D), (L, H, E), dtype = x_TD.shape, w2.shape, x_TD.dtype
    tensors = (x_TD, w1, b1, w2, b2, node_weight_ND, node_bias_N)
    if not (
        w1.shape == (L, D, H)
        and b1.shape == (L, H)
        and b2.shape == (L, E)
        and node_weight_ND.shape == (L - 1, D)
        and node_bias_N.shape == (L - 1,)
        and activation in _NUMBER
        and _ready(tensors, dtype)
    ):
        check_leaves(x_TD, x_TD.new_empty(T, dtype=torch.int64), None, leaves, activation)
        _check_nodes(x_TD, node_weight_ND, node_bias_N)
        x, w1, b1, w2, b2, weight, bias = [t.contiguous() for t in tensors]
        return leaf_infer(x, weight, bias, Leaves(w1, b1, w2, b2), activation)
    y_TE = torch.empty_like(x_TD) if E == D else torch.empty((T, E), dtype=dtype)  # the first is 0.8 us faster
    pointers = [t.data_ptr() for t in tensors]
    sizes = (T, D, E, L, H, dtype is torch.bfloat16, _NUMBER[activation], torch.get_num_threads())
    _check(_function("leaf_infer")(_LEAF_CORE(*pointers, y_TE.data_ptr(), *sizes)))
    return y_TE


def _leaf_call(
    name: str,
    x_TD: Tensor,
    leaf_T: Tensor,
    gate_T: Tensor | None,
    leaves: Leaves,
    activation: Activation,
    *,
    y: Tensor | None = None,
    pre: Tensor | None = None,
    grad: Tensor | None = None,
    pre_out: Tensor | None = None,
    out: tuple[Tensor | None, ...] = _NONE6,
    tangents: tuple[Tensor | None, ...] = _NONE6,
) -> None:
    """Call a function that takes leaves, with contiguous tensors of x's dtype."""
    check_leaves(x_TD, leaf_T, gate_T, leaves, activation)
    _check_supported(x_TD)
    (T, D), (L, H, E), dtype = x_TD.shape, leaves.w2.shape, x_TD.dtype
    # these lists are what keeps the copies alive until the call is over
    core = _contiguous(dtype, (x_TD, leaves.w1, leaves.b1, leaves.w2, leaves.b2, None, None, y))
    more = _contiguous(dtype, (gate_T, pre, grad, pre_out, *out, *tangents))
    leaf = leaf_T.contiguous()
    sizes = (T, D, E, L, H, dtype is torch.bfloat16, _NUMBER[activation], torch.get_num_threads())
    packed = _LEAF_CALL(*map(_address, core), *sizes, leaf.data_ptr(), *map(_address, more))
    _check(_function(name)(packed))


def _check_nodes(x_TD: Tensor, node_weight_ND: Tensor, node_bias_N: Tensor) -> None:
    _check_supported(x_TD)
    depth_of(len(node_bias_N) + 1)
    shapes = tuple(node_weight_ND.shape), tuple(node_bias_N.shape)
    if shapes != ((len(node_bias_N), x_TD.shape[1]), (len(node_bias_N),)):
        raise ValueError(f"node weight and bias have shapes {shapes}, not [N, D] and [N] with D = {x_TD.shape[1]}")
    for tensor in (node_weight_ND, node_bias_N):
        if tensor.dtype != x_TD.dtype or tensor.device != x_TD.device:
            raise ValueError(f"x is {x_TD.dtype} on {x_TD.device}, a node {tensor.dtype} on {tensor.device}")


# ---- paths ----


def path_forward(x_TD: Tensor, paths: Paths, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """See `PathKernel`."""
    T, (K, N, E) = len(x_TD), paths.w2.shape
    P = depth_of(N + 1)
    y_TE, pre_TKP = x_TD.new_empty(T, E), x_TD.new_empty(T, K, P)
    node_TKP = torch.empty(T, K, P, dtype=torch.int64)
    _path_call("path_forward", x_TD, paths, activation, y=y_TE, pre_out=pre_TKP, node_out=node_TKP)
    return y_TE, pre_TKP, node_TKP


def path_backward(
    grad_TE: Tensor, x_TD: Tensor, pre_TKP: Tensor, node_TKP: Tensor, paths: Paths, activation: Activation
) -> tuple[Tensor, Paths]:
    """See `PathKernel`. ValueError where a node is not in 0..N-1."""
    dx_TD = x_TD.new_empty(x_TD.shape)
    d = Paths(*(w.new_empty(w.shape) for w in (paths.w1, paths.b1, paths.w2, paths.b2)))
    out = (dx_TD, d.w1, d.b1, d.w2, d.b2)
    _path_call("path_backward", x_TD, paths, activation, pre=pre_TKP, grad=grad_TE, node=node_TKP, out=out)
    return dx_TD, d


def path_jvp(
    tangents: PathTangents,
    x_TD: Tensor,
    pre_TKP: Tensor,
    node_TKP: Tensor,
    paths: Paths,
    activation: Activation,
) -> Tensor:
    """See `PathKernel`."""
    dy_TE = x_TD.new_empty(len(x_TD), paths.w2.shape[2])
    t = (tangents.x, tangents.w1, tangents.b1, tangents.w2, tangents.b2)
    _path_call("path_jvp", x_TD, paths, activation, y=dy_TE, pre=pre_TKP, node=node_TKP, tangents=t)
    return dy_TE


def path_infer(x_TD: Tensor, paths: Paths, activation: Activation) -> Tensor:
    """y [T, E] of `path_forward`, with the same bits, for few tokens: nothing is kept for a backward pass."""
    w1, b1, w2, b2 = paths.w1, paths.b1, paths.w2, paths.b2
    (T, D), (K, N, E), dtype = x_TD.shape, w2.shape, x_TD.dtype
    tensors = (x_TD, w1, b1, w2, b2)
    if not (
        w1.shape == (K, N, D)
        and b1.shape == (K, N)
        and b2.shape == (E,)
        and N & (N + 1) == 0
        and activation in _NUMBER
        and _ready(tensors, dtype)
    ):
        check_paths(x_TD, paths, activation)
        _check_supported(x_TD)
        x, *weights = [t.contiguous() for t in tensors]
        return path_infer(x, Paths(*weights), activation)
    y_TE = torch.empty_like(x_TD) if E == D else torch.empty((T, E), dtype=dtype)  # the first is 0.8 us faster
    pointers = [t.data_ptr() for t in tensors]
    sizes = (T, D, E, K, N, N.bit_length(), dtype is torch.bfloat16, _NUMBER[activation], torch.get_num_threads())
    _check(_function("path_infer")(_PATH_CORE(*pointers, y_TE.data_ptr(), *sizes)))
    return y_TE


def _path_call(
    name: str,
    x_TD: Tensor,
    paths: Paths,
    activation: Activation,
    *,
    y: Tensor | None = None,
    pre: Tensor | None = None,
    grad: Tensor | None = None,
    node: Tensor | None = None,
    pre_out: Tensor | None = None,
    node_out: Tensor | None = None,
    out: tuple[Tensor | None, ...] = _NONE5,
    tangents: tuple[Tensor | None, ...] = _NONE5,
) -> None:
    """Call a function that takes paths, with contiguous tensors of x's dtype."""
    check_paths(x_TD, paths, activation)
    _check_supported(x_TD)
    (T, D), (K, N, E), dtype = x_TD.shape, paths.w2.shape, x_TD.dtype
    core = _contiguous(dtype, (x_TD, paths.w1, paths.b1, paths.w2, paths.b2, y))
    given, more = _contiguous(dtype, (pre, grad)), _contiguous(dtype, (*out, *tangents))
    nodes = None if node is None else node.contiguous()
    sizes = (T, D, E, K, N, depth_of(N + 1), dtype is torch.bfloat16, _NUMBER[activation], torch.get_num_threads())
    packed = _PATH_CALL(*map(_address, core), *sizes, *map(_address, (*given, nodes, pre_out, node_out, *more)))
    _check(_function(name)(packed))


# ---- calls ----


def _contiguous(dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype).contiguous() for t in tensors]


def _ready(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
    """Whether a call can take all of them as they are."""
    for tensor in tensors:  # a generator in `all` would take twice as long
        if not (tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous()):
            return False
    return dtype in _DTYPES


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_supported(x: Tensor) -> None:
    if x.device.type != "cpu" or x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype} on {x.device}: the C++ kernels take float32 and bfloat16 on the CPU")


def _check(outcome: int) -> None:
    if outcome == 1:
        raise ValueError("a token's leaf (or node) lies outside 0..L-1 (or 0..N-1)")
    if outcome:
        raise MemoryError("no memory for the scratch of a fast feedforward kernel")


@functools.cache
def _function(name: str) -> Callable[[bytes], int]:
    source = _SOURCES[name.startswith("path")]
    library = compiled.library(source)
    if library is None:
        raise RuntimeError(f"the C++ kernels are not built: {compiled.why_not(source)}")
    function: Callable[[bytes], int] = getattr(library, name)
    return function


__all__ = [
    "leaf_backward",
    "leaf_forward",
    "leaf_infer",
    "leaf_jvp",
    "path_backward",
    "path_forward",
    "path_infer",
    "path_jvp",
    "route_tokens",
    "supports",
    "why_not",
]
