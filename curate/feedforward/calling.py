"""What both layers do around a kernel: keep out of compiled graphs, follow autocast, and recognise a quiet moment."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curate.kernels.fff import dispatch
from curate.kernels.fff.functions import differentiated

# Looked up once: one token takes microseconds, and so does finding functions by name.
_casts, _compiling = torch._C._is_any_autocast_enabled, torch.compiler.is_compiling


def uncompiled(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a layer; under torch.compile outside the graph, which would drop its jvp and cannot see into C++."""
    return _outside(layer, x) if torch.compiler.is_compiling() else layer(x)


@torch.compiler.disable
def _outside(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x)


def quiet(kernel: str) -> bool:
    """Is nothing going on that changes what a CPU call means: no derivative, no batching, no autocast, no kernel chosen
    by hand, no compiling?"""
    return not (_casts() or differentiated() or _compiling()) and dispatch.unforced(kernel)


def cast_together(x_TD: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x and the weights, in autocast's dtype where it is on."""
    if not torch.is_autocast_enabled(x_TD.device.type):
        return (x_TD, *weights)
    dtype = torch.get_autocast_dtype(x_TD.device.type)
    return tuple(tensor.to(dtype) for tensor in (x_TD, *weights))
