"""The layers that are compared: what each arm puts into a block, what it costs, and its name in the log.

A dense layer of `h` neurons and width D costs 4 D h operations per token; a tree of depth d with leaves of l neurons
and s shared ones 4 D (l + s) + 2 D d; K paths of P levels 4 D K P.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vit import WIDTH

from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to fill the feedforward layers. `neurons` is the width of a dense layer; the rest goes to the tree."""

    name: str
    neurons: int = 0
    tree: dict[str, Any] = field(default_factory=dict)
    soft: bool = False

    @property
    def active(self) -> int:
        """Neurons that a token uses."""
        if "trees" in self.tree:
            return int(self.tree["trees"] * (self.tree["depth"] + 1))
        return int(self.neurons or self.tree["leaf_width"] + self.tree.get("shared_width", 0))

    @property
    def operations(self) -> int:
        """Floating-point operations of one layer for one token: 2 per multiply-add, activations not counted."""
        routing = 2 * WIDTH * self.tree["depth"] if "leaf_width" in self.tree else 0
        everyone = 2 ** self.tree["depth"] if self.soft else 1
        return int(4 * WIDTH * self.active * everyone + routing)

    def layer(self, seed: int) -> nn.Module:
        """A fresh layer; a dense one is torch's own, drawn from the same distribution as the leaves."""
        if self.neurons:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return nn.Sequential(nn.Linear(WIDTH, self.neurons), nn.GELU(), nn.Linear(self.neurons, WIDTH))
        generator = torch.Generator().manual_seed(seed)
        if "trees" in self.tree:
            return PathFeedforward(WIDTH, generator=generator, **self.tree)
        layer = FastFeedforward(WIDTH, generator=generator, **self.tree)
        layer.soft = self.soft
        return layer


def _fff(name: str, *, soft: bool = False, **changed: Any) -> Arm:
    return Arm(name, tree={"depth": 3, "leaf_width": 32, "balance": 0.01, **changed}, soft=soft)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("dense-256", neurons=256),
        Arm("dense-32", neurons=32),
        Arm("dense-4", neurons=4),  # nearly none: what the layers are worth at all
        _fff("fff-32"),
        _fff("fff-24+8", leaf_width=24, shared_width=8),
        _fff("no-balance", balance=0.0),
        _fff("balance-0.1", balance=0.1),
        _fff("no-gate", gate="none"),
        _fff("random-nodes", gate="none", balance=0.0),  # which have no gradient at all
        _fff("probability-gate", gate="probability"),
        _fff("hardening", hardening=0.01),
        _fff("region-leak", region_leak=0.05),
        _fff("soft", soft=True),
        _fff("deep-5x8", depth=5, leaf_width=8),
        _fff("deep-5x32", depth=5),
        Arm("path-8x3", tree={"trees": 8, "depth": 3}),
    )
}
MAIN = ("dense-256", "dense-32", "fff-32", "fff-24+8")
