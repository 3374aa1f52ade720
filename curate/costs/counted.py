"""Count a tower that is not known by its shapes: run one blank sample forward and back under torch's counter.

The counter is told what fused attention costs, which it does not know on a CPU. Our feedforward layers stand aside
while it runs and are counted by their formula, since it sees nothing inside a compiled kernel. Costs one forward and
one backward pass of one sample, on a copy of the modules that shares the weights, and without any global switch: the
model itself may be in use by another thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from curate.costs.products import Product, feedforward_flops
from curate.errors import ModelError
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward


class _Aside(nn.Module):
    """In the place of one of our layers: the same shapes and gradients, no product."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.rows, self.live = 0, False

    @property
    def c_fc(self) -> Any:
        return self.layer.c_fc

    def forward(self, x: Tensor) -> Tensor:
        self.rows += x.numel() // x.shape[-1]
        self.live |= x.requires_grad
        trained = sum((p.sum() for p in self.layer.parameters() if p.requires_grad), torch.zeros(()).to(x))
        return x.sum(-1, keepdim=True).expand(*x.shape[:-1], self.layer.width_out) + trained.to(x)


def count_by_running(
    model: nn.Module, size: tuple[int, int] | None, tokens: int | None, *, training: bool
) -> tuple[Product, ...]:
    """The products of one image of `size` pixels or of one caption of `tokens` tokens: one for each of our layers, one
    for the rest. Errors: ModelError where the model does not run on a blank sample."""
    shared = _copy_of(model)
    aside = _stand_aside(shared)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    run: Callable[[], Any]
    if size is not None:
        run = lambda: shared.encode_image(torch.zeros(1, 3, *size, dtype=dtype, device=device))  # noqa: E731
    else:
        run = lambda: shared.encode_text(torch.ones(1, tokens or 1, dtype=torch.long, device=device))  # noqa: E731
    what = f"an image of {size[0]} x {size[1]}" if size is not None else f"a caption of {tokens} tokens"
    try:
        forward, backward = _measure(run, back=training)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        raise ModelError(f"a {type(model).__name__} could not be counted: {what} does not pass it: {error}") from error
    ours = [_product(name, layer, training) for name, layer in aside if layer.rows]
    return (Product("image tower" if size is not None else "text tower", forward, backward), *ours)


def _product(name: str, aside: _Aside, training: bool) -> Product:
    forward, backward = feedforward_flops(aside.layer, training=training, live=aside.live)
    return Product(name, aside.rows * forward, aside.rows * backward if training else 0.0)


def _copy_of(model: nn.Module) -> Any:
    """New modules around the same numbers, in evaluation mode, so that running them leaves no trace, nor a gradient."""
    alias: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    alias |= {id(buffer): buffer for buffer in model.buffers()}
    shared = copy.deepcopy(model, alias).eval()
    for module in shared.modules():
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            module.training = True  # a frozen one would take a fused kernel that the counter cannot see
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return shared


def _stand_aside(model: nn.Module) -> list[tuple[str, _Aside]]:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, FastFeedforward | PathFeedforward)]
    asides = [(name, _Aside(layer)) for name, layer in found]
    for name, aside in asides:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, aside)
    return asides


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_back(_gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products for each of the two; torch adds one that a fused kernel computes again."""
    return 2 * int(sdpa_flop_count(query, key, value))


_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def _measure(run: Callable[[], Any], *, back: bool) -> tuple[int, int]:
    """(forward, backward) FLOPs."""
    aten: Any = torch.ops.aten
    mapping = {getattr(aten, f"_scaled_dot_product_{name}"): _attention for name in _FUSED}
    mapping |= {getattr(aten, f"_scaled_dot_product_{name}_backward"): _attention_back for name in _FUSED}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.enable_grad(), counter:
        features = run()
        forward = int(counter.get_total_flops())
        embedding: Tensor = features[0] if isinstance(features, tuple) else features
        if back and embedding.requires_grad:
            embedding.sum().backward()  # type: ignore[no-untyped-call]
    return forward, int(counter.get_total_flops()) - forward
