"""The activations of the fast feedforward layers, with their derivatives, as whole-tensor operations in torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from curate.kernels.fff import Activation

_QUICK = 1.702
_TANH = math.sqrt(2 / math.pi)
_CUBE = 0.044715


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation, elementwise; `gelu` is the one with erf, `quick_gelu` is x sigmoid(1.702 x)."""
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        return x * torch.sigmoid(_QUICK * x)
    return functional.relu(x)


def slope(x: Tensor, activation: Activation) -> Tensor:
    """The derivative of `activate`; 0 at 0 for relu, as torch has it."""
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        tanh = torch.tanh(_TANH * (x + _CUBE * x**3))
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * _TANH * (1 + 3 * _CUBE * x * x)
    if activation == "quick_gelu":
        sigmoid = torch.sigmoid(_QUICK * x)
        return sigmoid * (1 + _QUICK * x * (1 - sigmoid))
    return (x > 0).to(x.dtype)
