"""Fast feedforward layers as products that noise can be added to: one per leaf in use, or the neurons of each path.

    leaf   pre_t = x_t W1[e] + b1[e],  y_t = gate (act(pre_t) W2[e] + b2[e])          e the leaf of token t
    path   z_tp = <x_t, W1[n_p]> + b1[n_p],  y_t = sum_p act(z_tp) W2[n_p] + b2       n_p the nodes that token t passed

A layer's own kernel is one call, within which nothing can be disturbed; a mode sees that call (`leaf_mlp`, `path_mlp`)
and calls these instead. The gradient of a product reaches the leaves and nodes that its tokens used, and is exactly
zero elsewhere. Leaves cost the same multiply-adds as the kernels, in torch's products, about 10 us of calls per leaf; a
path gathers its neurons, a copy of P (D + E) numbers per token and tree.
"""

# T tokens, L leaves, D width in, E width out, H neurons of a leaf, K trees, N nodes, P levels of a path, B examples

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from curate.errors import UsageError
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.kernels.fff import Activation, Leaves, PathKernel, Paths
from curate.kernels.fff.activations import activate
from curate.kernels.fff.functions import leaf_mlp, path_mlp


class Product(Protocol):
    """Applies a function of x, a choice of rows and two parameters, in whatever way a mode wants it applied."""

    def __call__(self, func: Callable[..., Tensor], *operands: Tensor) -> Tensor: ...


def by_leaf(
    product: Product,
    x_TD: Tensor,
    leaf_T: Tensor,
    gate_T: Tensor | None,
    leaves: Leaves,
    activation: Activation,
    _: Any,
) -> Tensor:
    """`leaf_mlp` in two products, [T, E]."""
    pre_TH = product(leaf_product, x_TD, leaf_T, leaves.w1, leaves.b1)
    y_TE = product(leaf_product, activate(pre_TH, activation), leaf_T, leaves.w2, leaves.b2)
    return y_TE if gate_T is None else gate_T[:, None] * y_TE


def by_path(product: Product, x_TD: Tensor, paths: Paths, activation: Activation, kernel: PathKernel) -> Tensor:
    """`path_mlp` in two products along the paths that its kernel finds, [T, E]."""
    plain = (tensor.detach() for tensor in (paths.w1, paths.b1, paths.w2, paths.b2))
    x = forward_ad.unpack_dual(x_TD).primal.detach()
    node_TKP = kernel.path_forward(x, Paths(*plain), activation)[2]
    z_TKP = product(path_inward, x_TD, node_TKP, paths.w1, paths.b1)
    return product(path_outward, activate(z_TKP, activation), node_TKP, paths.w2, paths.b2)


BRANCHES: dict[Any, Callable[..., Tensor]] = {leaf_mlp: by_leaf, path_mlp: by_path}


def leaf_product(x_TD: Tensor, leaf_T: Tensor, weight_LDH: Tensor, bias_LH: Tensor) -> Tensor:
    """x_t W[leaf_t] + b[leaf_t], [T, H]: tokens sorted by leaf, one product for each leaf that has any."""
    order_T = leaf_T.argsort(stable=True)
    sizes = torch.bincount(leaf_T, minlength=len(weight_LDH)).tolist()
    # unbind: the gradient of `weight[leaf]` would be as large as all leaves, once per leaf
    segments = zip(x_TD[order_T].split(sizes), weight_LDH.unbind(0), strict=True)
    sorted_TH = torch.cat([x_nD @ weight_DH for x_nD, weight_DH in segments if len(x_nD)])
    return sorted_TH[order_T.argsort()] + bias_LH[leaf_T]


def path_inward(x_TD: Tensor, node_TKP: Tensor, w1_KND: Tensor, b1_KN: Tensor) -> Tensor:
    """What enters the neurons of each token's paths, [T, K, P]."""
    tree_K1 = _trees(node_TKP)
    return torch.einsum("td,tkpd->tkp", x_TD, w1_KND[tree_K1, node_TKP]) + b1_KN[tree_K1, node_TKP]


def path_outward(act_TKP: Tensor, node_TKP: Tensor, w2_KNE: Tensor, b2_E: Tensor) -> Tensor:
    """What leaves them, [T, E]."""
    return torch.einsum("tkp,tkpe->te", act_TKP, w2_KNE[_trees(node_TKP), node_TKP]) + b2_E


def routers(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that choose leaves. (A mixture of all leaves uses them like any other parameter.)"""
    return frozenset(name for layer, name in _nodes(module) if not layer.soft)


def idle(module: nn.Module) -> frozenset[str]:
    """Names of those that have the gradient zero: they choose, and no gate tells the loss."""
    return frozenset(
        name for layer, name in _nodes(module) if not layer.soft and (layer.gate == "none" or not layer.depth)
    )


@contextmanager
def examples_first(module: nn.Module, examples: int) -> Iterator[None]:
    """Layers flatten their tokens, so that it is asked beforehand whether the first dimension counts examples.

    Errors: UsageError from within, where it does not.
    """

    def check(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].ndim < 2 or args[0].shape[0] % examples:
            raise UsageError(f"forward-activity: {type(layer).__name__} was given {tuple(args[0].shape)}, without rows "
                             f"for each of {examples} examples in the first dimension; use forward")  # fmt: skip

    layers = [m for m in module.modules() if isinstance(m, FastFeedforward | PathFeedforward)]
    hooks = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _nodes(module: nn.Module) -> Iterator[tuple[FastFeedforward, str]]:
    for path, layer in module.named_modules():
        if isinstance(layer, FastFeedforward):
            for name in ("node_weight", "node_bias"):
                yield layer, f"{path}.{name}" if path else name


def _trees(node_TKP: Tensor) -> Tensor:
    return torch.arange(node_TKP.shape[1], device=node_TKP.device)[:, None]
