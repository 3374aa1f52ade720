"""The matrix products of a forward pass in their order, and what each costs on the way back. Sums; nothing is run.

FLOPs are a multiplication and an addition per term of a product, as torch's counter has it: norms, activations,
softmax, biases and lookups are left out. The way back costs one product of the same size for the weight if it is
trained, and one for the input if anything before it is trained; so a whole step is 3 F less the products that freezing
saves, and less the gradient of the pixels, which nobody asks for. What a kernel computes again is not counted.
"""

# T tokens that run, W width of the tower, C channels

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.feedforward.report import per_token

Trained = Iterable[Tensor]


class UnknownLayer(Exception):
    """A layer with weights whose products are not known here; the caller counts the tower by running it."""


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product, or all of one layer: FLOPs of a sample forward, and backward with what is trained now."""

    name: str
    forward: float
    backward: float


@dataclass(slots=True)
class Walk:
    """Collects products in the order of the forward pass. `live`: does a gradient flow back to what runs now?"""

    training: bool = False
    live: bool = False
    products: list[Product] = field(default_factory=list)

    def product(self, name: str, flops: float, weights: Trained) -> None:
        """x W: once for each gradient."""
        trained = any(weight.requires_grad for weight in weights)
        self.add(name, flops, flops * (trained + self.live))
        self.live |= trained

    def activations(self, name: str, flops: float) -> None:
        """A product of two activations, as in attention: both have a gradient or neither."""
        self.add(name, flops, 2 * flops * self.live)

    def add(self, name: str, forward: float, backward: float) -> None:
        self.products.append(Product(name, float(forward), float(backward)))

    def passes(self, *parts: Any) -> None:
        """Norms, gains and embeddings: no product, but a gradient may start there."""
        tensors = [t for part in parts for t in (part.parameters() if isinstance(part, nn.Module) else [part])]
        self.live |= any(tensor is not None and tensor.requires_grad for tensor in tensors)

    @contextmanager
    def beside(self, live: bool) -> Iterator[None]:
        """A shortcut: it reads what the other branch read, when `live` held."""
        after, self.live = self.live, live
        yield
        self.live |= after

    def linear(self, name: str, layer: nn.Linear, rows: float) -> None:
        parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        self.product(name, 2 * rows * layer.in_features * layer.out_features, [layer.weight])
        self.passes(*parameters)

    def convolution(self, name: str, layer: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the height and width that come out."""
        if isinstance(layer.padding, str):
            raise UnknownLayer(f"{name}: padding {layer.padding!r}")
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        height, width = (
            (size[0] + 2 * ph - dh * (kh - 1) - 1) // sh + 1,
            (size[1] + 2 * pw - dw * (kw - 1) - 1) // sw + 1,
        )
        self.product(name, 2 * height * width * layer.weight.numel(), [layer.weight])
        self.passes(layer)
        return height, width

    def feedforward(self, name: str, layer: nn.Module, rows: float) -> None:
        """The layers between two residual sums: ours by their formula, others linear layer by linear layer."""
        if isinstance(layer, FastFeedforward | PathFeedforward):
            forward, backward = feedforward_flops(layer, training=self.training, live=self.live)
            self.add(name, rows * forward, rows * backward)
            self.passes(layer)
            return
        for child_name, child in layer.named_modules():
            if type(child) is nn.Linear:
                self.linear(f"{name}.{child_name}", child, rows)
            elif next(child.parameters(recurse=False), None) is not None:
                if not isinstance(child, nn.LayerNorm):
                    raise UnknownLayer(f"{name}.{child_name} is a {type(child).__name__}")
                self.passes(child)


def feedforward_flops(layer: nn.Module, *, training: bool, live: bool) -> tuple[float, float]:
    """(forward, backward) FLOPs of one token in one of our feedforward layers.

    Scoring costs what `curate.feedforward.report` says. In training the gate and the penalties need the logits of all
    nodes, whose way back is dense; without them the nodes have no gradient. Example: width 32, depth 2, leaves of 16
    neurons: 2 (2 * 32 + 16 * 64) = 2,176 in scoring, 2 (3 * 32 + 16 * 64) = 2,240 in training and 4,480 back.
    """
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    forward = float(per_token(layer)[1])
    if not isinstance(layer, FastFeedforward):
        return forward, forward * (trained + live)
    path, every = 2.0 * layer.width * layer.depth, 2.0 * layer.width * (2**layer.depth - 1)
    leaves = forward - path
    if layer.soft:
        one = 2.0 * layer.leaf_width * (layer.width + layer.width_out)
        leaves, nodes, back = leaves + one * (len(layer.w1) - 1), every, every
    elif layer.gate == "probability" or (training and _nodes_learn(layer)):
        nodes, back = every, every
    else:
        nodes, back = path, 0.0
    return leaves + nodes, (leaves + back) * (trained + live)


def _nodes_learn(layer: FastFeedforward) -> bool:
    return bool(layer.depth) and (layer.gate != "none" or bool(layer.balance or layer.hardening))
