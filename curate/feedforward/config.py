"""What a dense feedforward layer is to be replaced with: a small frozen value, checked once, written beside a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from curate.errors import UsageError
from curate.feedforward.leaf import FastFeedforward, Gate
from curate.feedforward.path import PathFeedforward
from curate.kernels.fff import Activation

Variant = Literal["leaf", "path"]


@dataclass(frozen=True, slots=True)
class FeedforwardConfig:
    """Sizes and training options of a fast feedforward layer; `dataclasses.asdict` writes it to a file.

    A leaf layer has 2**depth leaves of `leaf_width` neurons and `shared_width` neurons that every token uses; a path
    layer has `trees` trees of depth + 1 levels of single neurons. The rest is described at `FastFeedforward`.

    Example: FeedforwardConfig(depth=5, leaf_width=96) holds as many weights as a dense layer of 3,072 neurons.
    Errors: UsageError for impossible sizes, and for an option that the variant does not have.
    """

    variant: Variant = "leaf"
    depth: int = 5
    leaf_width: int = 0
    shared_width: int = 0
    trees: int = 1
    gate: Gate = "log"
    balance: float = 0.0
    hardening: float = 0.0
    region_leak: float = 0.0

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise UsageError(f"variant {self.variant!r} is none of {', '.join(get_args(Variant))}")
        if not 0 <= self.depth <= 20:
            raise UsageError(f"depth {self.depth} is not between 0 and 20")
        if self.variant == "path":
            self._check_path()
        else:
            self._check_leaf()

    def _check_leaf(self) -> None:
        if self.leaf_width < 1:
            raise UsageError(f"leaf_width {self.leaf_width}: a leaf has at least one neuron (96 suits a width of 768)")
        if self.shared_width < 0:
            raise UsageError(f"shared_width {self.shared_width} is below 0")
        if self.gate not in get_args(Gate):
            raise UsageError(f"gate {self.gate!r} is none of {', '.join(get_args(Gate))}")
        if not (self.balance >= 0 and self.hardening >= 0):
            raise UsageError(f"balance {self.balance} and hardening {self.hardening} are weights of 0 or more")
        if not 0 <= self.region_leak < 0.5:
            raise UsageError(f"region_leak {self.region_leak}: a share of decisions, from 0 to below 0.5")
        if self.trees != 1:
            raise UsageError(f"trees {self.trees}: only variant 'path' has several trees")

    def _check_path(self) -> None:
        if self.trees < 1:
            raise UsageError(f"trees {self.trees} is below 1")
        options = {"leaf_width": self.leaf_width, "shared_width": self.shared_width, "balance": self.balance}
        options |= {"hardening": self.hardening, "region_leak": self.region_leak}
        if given := sorted(name for name, value in options.items() if value):
            raise UsageError(f"variant 'path' has no {', '.join(given)}; its sizes are depth and trees")

    def build(
        self,
        width: int,
        *,
        width_out: int | None = None,
        activation: Activation = "gelu",
        generator: torch.Generator | None = None,
    ) -> FastFeedforward | PathFeedforward:
        """A layer of this shape with random weights, float32 on the CPU; the global random state is left as it was."""
        common: dict[str, Any] = {"depth": self.depth, "width_out": width_out, "activation": activation}
        common |= {"generator": generator, "device": "cpu", "dtype": torch.float32}
        # nn.Linear draws from the global generator before its weights are drawn from ours
        with torch.random.fork_rng(devices=[]):
            if self.variant == "path":
                return PathFeedforward(width, trees=self.trees, **common)
            return FastFeedforward(
                width,
                leaf_width=self.leaf_width,
                shared_width=self.shared_width,
                gate=self.gate,
                balance=self.balance,
                hardening=self.hardening,
                region_leak=self.region_leak,
                **common,
            )
