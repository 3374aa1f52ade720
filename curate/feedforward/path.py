"""UltraFastBERT's feedforward layer: trees of single neurons, and a token uses those on its own path.

    y = b2 + sum over trees and levels of act(z) W2[node],  z = <x, W1[node]> + b1[node],  right if and only if z > 0

2 K P D multiply-adds per token for K trees of P = depth + 1 levels. Wonderful for one token; a batch does one
multiply-add per weight it reads and reuses none, so the leaf variant is the default for training.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import init

from curate.errors import UsageError
from curate.feedforward.calling import cast_together, quiet, uncompiled
from curate.kernels.fff import Activation, Paths, dispatch
from curate.kernels.fff.functions import differentiated, path_mlp

if TYPE_CHECKING:
    from curate.kernels.fff.native import Inference

# T tokens, D width in, E width out, K trees, N nodes of a tree, P levels of a path


class PathFeedforward(nn.Module):
    """Path fast feedforward, a drop-in for Linear-activation-Linear: [..., width] to [..., width_out].

    Example: PathFeedforward(768, depth=11) is UltraFastBERT's 1 x 11: one tree of 4,095 neurons, 12 of them per token.
    Errors: UsageError for impossible sizes; ValueError where x does not fit. Source: arXiv 2311.10770.
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        trees: int = 1,
        width_out: int | None = None,
        activation: Activation = "gelu",
        kernel: str = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(width, trees) < 1 or not 0 <= depth <= 20:
            raise UsageError(f"width {width}, trees {trees}, depth {depth}: at least 1, 1, and a depth from 0 to 20")
        self.width, self.width_out, self.depth, self.trees = width, width_out or width, depth, trees
        self.activation, self.kernel = activation, kernel
        self._inference: Inference | None = None
        nodes = 2 ** (depth + 1) - 1
        self.w1 = nn.Parameter(torch.empty(trees, nodes, width, device=device, dtype=dtype))
        self.b1 = nn.Parameter(torch.empty(trees, nodes, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(trees, nodes, self.width_out, device=device, dtype=dtype))
        self.b2 = nn.Parameter(torch.empty(self.width_out, device=device, dtype=dtype))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform within 1 / sqrt(fan in); fan in of the output counts the neurons a token uses."""
        inward, outward = 1 / math.sqrt(self.width), 1 / math.sqrt(self.trees * (self.depth + 1))
        for tensor, bound in ((self.w1, inward), (self.b1, inward), (self.w2, outward), (self.b2, outward)):
            init.uniform_(tensor, -bound, bound, generator=generator)

    @property
    def paths(self) -> Paths:
        """The trees' weights as the kernels take them."""
        return Paths(self.w1, self.b1, self.w2, self.b2)

    @property
    def c_fc(self) -> SimpleNamespace:
        """open_clip asks a block's `mlp.c_fc.weight` for its dtype."""
        return SimpleNamespace(weight=self.w1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width_out], in the dtype of x (or autocast's)."""
        call = self._inference
        if call is not None and quiet(self.kernel) and call.takes(x, self._parameters.values()):
            return call(x)
        return uncompiled(self._any, x)

    def _any(self, x: Tensor) -> Tensor:
        x_TD, w1, b1, w2, b2 = cast_together(x.reshape(-1, self.width), (self.w1, self.b1, self.w2, self.b2))
        paths = Paths(w1, b1, w2, b2)
        call = None if differentiated() else dispatch.path_inference(x_TD, paths, self.activation, self.kernel)
        if call is not None:
            self._inference = call
            return call(x_TD.contiguous()).reshape(*x.shape[:-1], self.width_out)
        y_TE = path_mlp(x_TD, paths, self.activation, dispatch.path_kernel(x_TD, self.kernel))
        return y_TE.reshape(*x.shape[:-1], self.width_out)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_inference": None}  # addresses are this process's own

    def extra_repr(self) -> str:
        return f"{self.width}, depth={self.depth}, trees={self.trees}, activation={self.activation}"
