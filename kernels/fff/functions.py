"""Fast feedforward for autograd: forward, backward, jvp and vmap of both variants over any kernel.

A kernel sees plain tensors only. Each derivative is an `autograd.Function` of its own with its own vmap rule, so that
`vmap(jvp(...))` and `vmap(grad(...))` reach the kernels as plain tensors too. (`torch.library.custom_op` with
`register_autograd` would answer `torch.func.jvp` with a zero tangent and no error; `torch.compile` drops a custom jvp,
so it is kept out.) First derivatives in either mode; for second ones use the plain kernel, which is made of torch
operations and differentiates to any order. A `TorchFunctionMode` sees each call of `leaf_mlp` and `path_mlp`, as it
does those of torch's own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_unary

from curate.kernels.fff import Activation, LeafKernel, LeafTangents, Leaves, PathKernel, Paths, PathTangents, plain

# T tokens, D width in, E width out, L leaves, H neurons of a leaf, K trees, P levels of a path, V vmapped
_SECOND = "the fast kernels have first derivatives only; choose kernel='plain' for derivatives of derivatives"


def leaf_mlp(
    x_TD: Tensor, leaf_T: Tensor, gate_T: Tensor | None, leaves: Leaves, activation: Activation, kernel: LeafKernel
) -> Tensor:
    """gate (act(x W1[leaf] + b1[leaf]) W2[leaf] + b2[leaf]), [T, E]; differentiable in x, gate and the weights.

    Errors: ValueError where shapes, dtypes or leaf indices do not fit. Source: arXiv 2308.14711.
    """
    if has_torch_function_unary(x_TD):
        own = (x_TD, leaf_T, gate_T, leaves, activation, kernel)
        seen: Tensor = handle_torch_function(leaf_mlp, (x_TD,), *own)
        return seen
    if kernel is plain or not differentiated():
        return kernel.leaf_forward(x_TD, leaf_T, gate_T, leaves, activation)[0]
    weights = (leaves.w1, leaves.b1, leaves.w2, leaves.b2)
    y_TE: Tensor = _applied(_Leaf, x_TD, leaf_T, gate_T, *weights, activation, kernel)[0]
    return y_TE


def path_mlp(x_TD: Tensor, paths: Paths, activation: Activation, kernel: PathKernel) -> Tensor:
    """b2 + sum of act(z) W2 over the nodes on each token's path, [T, E]; differentiable in x and the weights.

    Errors: ValueError where shapes or dtypes do not fit. Source: arXiv 2311.10770.
    """
    if has_torch_function_unary(x_TD):
        seen: Tensor = handle_torch_function(path_mlp, (x_TD,), x_TD, paths, activation, kernel)
        return seen
    if kernel is plain or not differentiated():
        return kernel.path_forward(x_TD, paths, activation)[0]
    y_TE: Tensor = _applied(_Path, x_TD, paths.w1, paths.b1, paths.w2, paths.b2, activation, kernel)[0]
    return y_TE


def route(x_TD: Tensor, node_weight_ND: Tensor, node_bias_N: Tensor, tokens: Callable[..., Tensor]) -> Tensor:
    """Leaves [T] int64 from a function that routes plain tensors; has no derivative, and a vmap of its own."""
    if not differentiated():
        return tokens(x_TD, node_weight_ND, node_bias_N)
    leaf_T: Tensor = _applied(_Route, x_TD, node_weight_ND, node_bias_N, tokens)
    return leaf_T


@torch.compiler.disable
def _applied(function: Any, *inputs: Any) -> Any:
    return function.apply(*inputs)


_recording, _transformed = torch.is_grad_enabled, torch._C._are_functorch_transforms_active


def differentiated() -> bool:
    """May anybody ask for a derivative, or batch this call? If not, the kernel can be called without ceremony."""
    return _recording() or _transformed() or forward_ad._current_level >= 0


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(x_TD: Tensor, node_weight_ND: Tensor, node_bias_N: Tensor, tokens: Callable[..., Tensor]) -> Tensor:
        return tokens(x_TD, node_weight_ND, node_bias_N)

    @staticmethod
    def setup_context(ctx: Any, _inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(_ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _each(_Route.apply, info, in_dims, inputs)


class _Last(torch.autograd.Function):
    """A derivative that is not differentiated again; vmapped, it is called once per item."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_SECOND)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_SECOND)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _each(cls.apply, info, in_dims, inputs)


class _Leaf(torch.autograd.Function):
    @staticmethod
    def forward(
        x_TD: Tensor,
        leaf_T: Tensor,
        gate_T: Tensor | None,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        activation: Activation,
        kernel: LeafKernel,
    ) -> tuple[Tensor, Tensor]:
        return kernel.leaf_forward(x_TD, leaf_T, gate_T, Leaves(w1, b1, w2, b2), activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.activation, ctx.kernel = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor, _: Tensor) -> tuple[Any, ...]:
        x_TD, leaf_T, gate_T, w1, b1, w2, b2, pre_TH = ctx.saved_tensors
        dx, dgate, *dweights = _LeafGradients.apply(
            grad_TE, x_TD, leaf_T, gate_T, w1, b1, w2, b2, pre_TH, ctx.activation, ctx.kernel
        )
        return dx, None, None if gate_T is None else dgate, *dweights, None, None

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> tuple[Tensor, None]:
        dx, _, *rest = directions[:7]
        return _LeafTangent.apply(dx, *rest, *ctx.saved_tensors, ctx.activation, ctx.kernel), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        x, leaf, gate, *weights, activation, kernel = inputs
        if any(dim is not None for dim in in_dims[3:]) or in_dims[0] is None or in_dims[1] is None:
            return _each(_Leaf.apply, info, in_dims, inputs)
        if gate is not None:
            gate = _front(gate, in_dims[2], info.batch_size).flatten(0, 1)
        folded = (x.movedim(in_dims[0], 0).flatten(0, 1), leaf.movedim(in_dims[1], 0).flatten(0, 1), gate)
        outputs = _Leaf.apply(*folded, *weights, activation, kernel)
        return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0, 0)


class _LeafGradients(_Last):
    @staticmethod
    def forward(grad_TE: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        x_TD, leaf_T, gate_T, w1, b1, w2, b2, pre_TH, activation, kernel = rest
        leaves = Leaves(w1, b1, w2, b2)
        dx, dgate, summed = kernel.leaf_backward(grad_TE, x_TD, leaf_T, gate_T, pre_TH, leaves, activation)
        return dx, dgate, summed.w1, summed.b1, summed.w2, summed.b2


class _LeafTangent(_Last):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        directions, (x_TD, leaf_T, gate_T, w1, b1, w2, b2, pre_TH, activation, kernel) = inputs[:6], inputs[6:]
        leaves = Leaves(w1, b1, w2, b2)
        dy: Tensor = kernel.leaf_jvp(LeafTangents(*directions), x_TD, leaf_T, gate_T, pre_TH, leaves, activation)
        return dy


class _Path(torch.autograd.Function):
    @staticmethod
    def forward(
        x_TD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: Activation, kernel: PathKernel
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernel.path_forward(x_TD, Paths(w1, b1, w2, b2), activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.activation, ctx.kernel = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.save_for_forward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor, *_: Tensor) -> tuple[Any, ...]:
        return *_PathGradients.apply(grad_TE, *ctx.saved_tensors, ctx.activation, ctx.kernel), None, None

    @staticmethod
    def jvp(ctx: Any, *directions: Tensor | None) -> tuple[Tensor, None, None]:
        dy: Tensor = _PathTangent.apply(*directions[:5], *ctx.saved_tensors, ctx.activation, ctx.kernel)
        return dy, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        x, *weights, activation, kernel = inputs
        if any(dim is not None for dim in in_dims[1:]):
            return _each(_Path.apply, info, in_dims, inputs)
        outputs = _Path.apply(x.movedim(in_dims[0] or 0, 0).flatten(0, 1), *weights, activation, kernel)
        return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0, 0, 0)


class _PathGradients(_Last):
    @staticmethod
    def forward(grad_TE: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        x_TD, w1, b1, w2, b2, pre_TKP, node_TKP, activation, kernel = rest
        dx, summed = kernel.path_backward(grad_TE, x_TD, pre_TKP, node_TKP, Paths(w1, b1, w2, b2), activation)
        return dx, summed.w1, summed.b1, summed.w2, summed.b2


class _PathTangent(_Last):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        directions, (x_TD, w1, b1, w2, b2, pre_TKP, node_TKP, activation, kernel) = inputs[:5], inputs[5:]
        paths = Paths(w1, b1, w2, b2)
        dy: Tensor = kernel.path_jvp(PathTangents(*directions), x_TD, pre_TKP, node_TKP, paths, activation)
        return dy


def _front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The vmapped dimension first; a tensor without one is repeated (as a view)."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _each(
    apply: Callable[..., Any], info: Any, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[Any, Any]:
    """Call once per vmapped item, and stack: the weights differ, so there is no larger product to make of them."""
    calls = []
    for item in range(info.batch_size):
        own = [v if dim is None else v.select(dim, item) for v, dim in zip(inputs, in_dims, strict=True)]
        calls.append(apply(*own))
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])
