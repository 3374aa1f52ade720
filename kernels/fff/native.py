"""Fast feedforward in C++ on the CPU: tokens grouped by leaf through register tiles, or each walked down its path.

fp32 and bf16, sums in fp32; `supports` says whether. Tokens are gathered and scattered inside the tiles, weights read
where they lie: nothing is copied that is contiguous. Cost of a call besides the arithmetic: a few microseconds, most of
them torch's (the output, 0.1 us for every look at a tensor). Arguments travel as one packed `bytes`, since ctypes takes
0.3 us to convert each of thirty.

`leaf.cpp`, `path.cpp` and `../native/tiles.hpp` say how. `route_tokens`, `leaf_inference` and `path_inference` are
extra: what one token needs, in one call.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Collection
from operator import is_
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
# `struct Core` and `struct Call` of the two sources: x, y, T and threads, then what a layer does not change
_LEAF_CORE, _LEAF_CALL = struct.Struct("16q").pack, struct.Struct("33q").pack
_PATH_CORE, _PATH_CALL = struct.Struct("15q").pack, struct.Struct("30q").pack
_OWN, _LEAF_LAYER, _PATH_LAYER = (struct.Struct(form).pack for form in ("4q", "12q", "11q"))
_data_ptr = Tensor.data_ptr
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
    own = (x.data_ptr(), leaf_T.data_ptr(), T, torch.get_num_threads())
    layer = (0, 0, 0, 0, weight.data_ptr(), bias.data_ptr(), D, 0, L, 0, x.dtype is torch.bfloat16, 0)
    _check(_function("route_tokens")(_LEAF_CORE(*own, *layer)))
    return leaf_T


def leaf_inference(
    x_TD: Tensor, node_weight_ND: Tensor, node_bias_N: Tensor, leaves: Leaves, activation: Activation
) -> Inference:
    """`route_tokens` and `leaf_forward` without a gate in one call, with the same bits; checked once, for any
    contiguous x of this dtype."""
    check_leaves(x_TD, x_TD.new_empty(len(x_TD), dtype=torch.int64), None, leaves, activation)
    _check_nodes(x_TD, node_weight_ND, node_bias_N)
    (L, H, E), D = leaves.w2.shape, x_TD.shape[1]
    given = (node_weight_ND, node_bias_N, leaves.w1, leaves.b1, leaves.w2, leaves.b2)
    held = tuple(tensor.detach().contiguous() for tensor in given)
    sizes = (D, E, L, H, x_TD.dtype is torch.bfloat16, _NUMBER[activation])
    layer = _LEAF_LAYER(*map(_address, (*held[2:], *held[:2])), *sizes)
    return Inference(_function("leaf_infer"), layer, D, E, x_TD.dtype, given, held)


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
    core = _contiguous(dtype, (x_TD, y, leaves.w1, leaves.b1, leaves.w2, leaves.b2, None, None))
    more = _contiguous(dtype, (gate_T, pre, grad, pre_out, *out, *tangents))
    leaf = leaf_T.contiguous()
    own = (_address(core[0]), _address(core[1]), T, torch.get_num_threads())
    sizes = (D, E, L, H, dtype is torch.bfloat16, _NUMBER[activation])
    packed = _LEAF_CALL(*own, *map(_address, core[2:]), *sizes, leaf.data_ptr(), *map(_address, more))
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


def path_inference(x_TD: Tensor, paths: Paths, activation: Activation) -> Inference:
    """`path_forward` with the same bits and nothing kept for a backward pass; checked once, for any contiguous x of
    this dtype."""
    check_paths(x_TD, paths, activation)
    _check_supported(x_TD)
    (K, N, E), D = paths.w2.shape, x_TD.shape[1]
    given = (paths.w1, paths.b1, paths.w2, paths.b2)
    held = tuple(tensor.detach().contiguous() for tensor in given)
    sizes = (D, E, K, N, depth_of(N + 1), x_TD.dtype is torch.bfloat16, _NUMBER[activation])
    layer = _PATH_LAYER(*map(_address, held), *sizes)
    return Inference(_function("path_infer"), layer, D, E, x_TD.dtype, given, held)


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
    core = _contiguous(dtype, (x_TD, y, paths.w1, paths.b1, paths.w2, paths.b2))
    given, more = _contiguous(dtype, (pre, grad)), _contiguous(dtype, (*out, *tangents))
    nodes = None if node is None else node.contiguous()
    own = (_address(core[0]), _address(core[1]), T, torch.get_num_threads())
    sizes = (D, E, K, N, depth_of(N + 1), dtype is torch.bfloat16, _NUMBER[activation])
    more_addresses = map(_address, (*given, nodes, pre_out, node_out, *more))
    packed = _PATH_CALL(*own, *map(_address, core[2:]), *sizes, *more_addresses)
    _check(_function(name)(packed))


# ---- calls ----


class Inference:
    """A layer's inference with everything checked beforehand but x: one token takes microseconds, and checks as many.

    It holds on to the weights' memory, so an address that is still the same is still the same memory; weights that had
    to be copied are never taken for the same.
    """

    __slots__ = ("_dtype", "_function", "_given", "_held", "_layer", "_same", "_size", "_where", "_width")

    def __init__(
        self,
        function: Callable[[bytes], int],
        layer: bytes,
        width: int,
        size: int,
        dtype: torch.dtype,
        given: tuple[Tensor, ...],
        held: tuple[Tensor, ...],
    ) -> None:
        self._function, self._layer, self._width, self._size, self._dtype = function, layer, width, size, dtype
        self._given, self._held, self._same = given, held, width == size
        own = zip(given, held, strict=True)
        self._where = [tensor.data_ptr() if copy.data_ptr() == tensor.data_ptr() else -1 for tensor, copy in own]

    def takes(self, x: Tensor, weights: Collection[Tensor | None]) -> bool:
        """Whether x can be given as it is, and the weights (nodes first) are those of the beginning, unmoved and
        uncopied."""
        return (
            type(x) is Tensor
            and x.is_cpu
            and x.dtype is self._dtype
            and x.is_contiguous()
            and all(map(is_, weights, self._given))
            and list(map(_data_ptr, weights)) == self._where  # type: ignore[arg-type]  # they are the given ones
            and x.shape[-1] == self._width
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] to [..., E], for an x that it `takes`."""
        y = torch.empty_like(x) if self._same else x.new_empty((*x.shape[:-1], self._size))
        own = _OWN(x.data_ptr(), y.data_ptr(), x.numel() // self._width, torch.get_num_threads())
        outcome = self._function(own + self._layer)
        if outcome:
            _check(outcome)
        return y


def _contiguous(dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype).contiguous() for t in tensors]


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
    "Inference",
    "leaf_backward",
    "leaf_forward",
    "leaf_inference",
    "leaf_jvp",
    "path_backward",
    "path_forward",
    "path_inference",
    "path_jvp",
    "route_tokens",
    "supports",
    "why_not",
]
