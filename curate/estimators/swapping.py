"""Borrow a module for a while: other tensors in place of its parameters, frozen parts, buffers and random state kept.

Everything here is a context manager that puts back what it took, after exceptions too. Nothing is copied but buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def swapped(module: nn.Module, replacement: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Put tensors where parameters are, wherever in the module a parameter is used."""
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter in replacement
    ]
    try:
        for owner, name, parameter in places:
            owner._parameters[name] = replacement[parameter]  # type: ignore[assignment]
        yield
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


@contextlib.contextmanager
def only_trainable(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Freeze every parameter that is not named; afterwards each requires a gradient as before."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in names)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextlib.contextmanager
def attention_for_tangents() -> Iterator[None]:
    """Attention that has forward derivatives: no fused kernel, in training (first switch) or evaluation (second)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Rewind:
    """Several passes over a module as if they were one: the same dropout, region leak and running statistics.

    Made before the first pass; `rewind()` before each later one. Costs a copy of the buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind(self) -> None:
        """Back to where the first pass started."""
        with torch.no_grad():
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
        torch.set_rng_state(self._cpu)
        if self._gpu:
            torch.cuda.set_rng_state_all(self._gpu)
