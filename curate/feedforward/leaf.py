"""A feedforward layer in which a token pays for one leaf of a tree: hard routing, log-gate, always-on shared part.

    node logits z = x Wn^T + bn,  leaf e by descending the tree (right if and only if z > 0),
    y = shared(x) + gate (act(x W1[e] + b1[e]) W2[e] + b2[e])

Multiply-adds per token: depth D for the nodes in C++ (N D elsewhere, and for the gate's gradient), 2 H D for the leaf,
2 S D for the shared part, against 2 h D of a dense layer of width h = 2**depth H. In training and in evaluation the
same kernels run on the same numbers, so evaluation gives the bits of training (without region leak).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional, init
from torch.nn.utils import skip_init

from curate.errors import UsageError
from curate.feedforward.calling import cast_together, quiet, uncompiled
from curate.feedforward.penalties import leaf_probabilities, log_path_probability, weighed
from curate.kernels.fff import Activation, Leaves, dispatch, leaf_of
from curate.kernels.fff.activations import activate
from curate.kernels.fff.functions import differentiated, leaf_mlp, route

if TYPE_CHECKING:
    from curate.kernels.fff.native import Inference

# T tokens, D width in, E width out, L leaves, H neurons of a leaf, N = L - 1 nodes, S shared neurons
Gate = Literal["none", "log", "probability"]
_FEW = 16  # tokens whose call is so short that looking for the kernel would be half of it


class FastFeedforward(nn.Module):
    """Leaf fast feedforward, a drop-in for Linear-activation-Linear: [..., width] to [..., width_out].

    `depth`: 2**depth leaves of `leaf_width` neurons; depth 0 is the dense layer. `shared_width`: neurons that every
    token uses. `gate`: "log" leaves the value alone and gives the nodes a gradient; "probability" multiplies by the
    path's probability; "none" gives the nodes none. `balance`, `hardening`: weights of the penalties, which a forward
    pass in training leaves in `penalty`. `region_leak`: share of decisions that are turned round in training.
    `soft = True` mixes all leaves by their probability, at more than the dense layer's cost: for research. `kernel`
    is "auto" or one of `curate.kernels.fff.dispatch.NAMES`.

    Example: FastFeedforward(768, depth=5, leaf_width=96) holds 32 leaves, 4.7 million weights like a dense layer of
    3,072 neurons, and uses 96 neurons per token. Errors: UsageError for impossible sizes; ValueError where x does not
    fit. Sources: arXiv 2308.14711, 2405.16836 (shared part and balance).
    """

    usage: Tensor
    leak_step: Tensor

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        leaf_width: int,
        shared_width: int = 0,
        width_out: int | None = None,
        activation: Activation = "gelu",
        gate: Gate = "log",
        balance: float = 0.0,
        hardening: float = 0.0,
        region_leak: float = 0.0,
        kernel: str = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(width, depth, leaf_width, shared_width, activation, gate, region_leak)
        self.width, self.width_out, self.depth, self.leaf_width = width, width_out or width, depth, leaf_width
        self.shared_width, self.activation, self.gate = shared_width, activation, gate
        self.balance, self.hardening, self.region_leak, self.kernel = balance, hardening, region_leak, kernel
        self.soft, self.count_usage = False, False
        self.penalty: Tensor | None = None
        self._inference: Inference | None = None
        leaves, nodes = 2**depth, 2**depth - 1
        made: dict[str, Any] = {"device": device or torch.get_default_device(), "dtype": dtype}
        self.node_weight = nn.Parameter(torch.empty(nodes, width, **made))
        self.node_bias = nn.Parameter(torch.empty(nodes, **made))
        self.w1 = nn.Parameter(torch.empty(leaves, width, leaf_width, **made))
        self.b1 = nn.Parameter(torch.empty(leaves, leaf_width, **made))
        self.w2 = nn.Parameter(torch.empty(leaves, leaf_width, self.width_out, **made))
        self.b2 = nn.Parameter(torch.empty(leaves, self.width_out, **made))
        # skip_init: their own initialisation would draw from the global generator
        self.shared_in = skip_init(nn.Linear, width, shared_width, **made) if shared_width else None
        self.shared_out = (
            skip_init(nn.Linear, shared_width, self.width_out, bias=False, **made) if shared_width else None
        )
        self.register_buffer("usage", torch.zeros(leaves, dtype=torch.int64, device=device), persistent=False)
        self.remap: Tensor | None
        self.register_buffer("remap", None)  # after `prune_leaves`: the stored leaf at every place of the tree
        if region_leak:
            self.register_buffer("leak_step", torch.zeros((), dtype=torch.int64, device=device))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Uniform within 1 / sqrt(fan in), as `nn.Linear` draws them; fan in counts the neurons a token uses."""
        inward, outward = 1 / math.sqrt(self.width), 1 / math.sqrt(self.leaf_width + self.shared_width)
        bounds: list[tuple[Tensor, float]] = [
            (self.node_weight, inward),
            (self.node_bias, inward),
            (self.w1, inward),
            (self.b1, inward),
        ]
        bounds += [(self.w2, outward), (self.b2, outward)]
        if self.shared_in is not None and self.shared_out is not None:
            bounds += [
                (self.shared_in.weight, inward),
                (self.shared_in.bias, inward),
                (self.shared_out.weight, outward),
            ]
        for tensor, bound in bounds:
            init.uniform_(tensor, -bound, bound, generator=generator)

    @property
    def leaves(self) -> Leaves:
        """The leaves' weights as the kernels take them."""
        return Leaves(self.w1, self.b1, self.w2, self.b2)

    @property
    def c_fc(self) -> SimpleNamespace:
        """open_clip asks a block's `mlp.c_fc.weight` for its dtype."""
        return SimpleNamespace(weight=self.w1)

    def leaf_indices(self, x: Tensor) -> Tensor:
        """The leaf of every token, int64 [T], as evaluation routes them."""
        with torch.no_grad():
            return self._route(*self._cast(x.reshape(-1, self.width))[:3])[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width_out], in the dtype of x (or autocast's)."""
        call = self._inference
        if call is not None and self._plain(x) and quiet(self.kernel) and call.takes(x, self._parameters.values()):
            return call(x)
        return uncompiled(self._any, x)

    def _any(self, x: Tensor) -> Tensor:
        x_TD, node_weight, node_bias, leaves = self._cast(x.reshape(-1, self.width))
        call = None
        if self._plain_inference():
            own = (x_TD, node_weight, node_bias, leaves, self.activation, self.kernel)
            call = self._inference = dispatch.leaf_inference(*own)
        if self.soft:
            y_TE = self._mixture(x_TD, node_weight, node_bias, leaves)
        elif call is not None:
            y_TE = call(x_TD.contiguous())
        else:
            y_TE = self._hard(x_TD, node_weight, node_bias, leaves)
        if self.shared_in is not None and self.shared_out is not None:
            y_TE = y_TE + self.shared_out(activate(self.shared_in(x_TD), self.activation))
        return y_TE.reshape(*x.shape[:-1], self.width_out)

    def _plain(self, x: Tensor) -> bool:
        """Is a call nothing but one leaf for each of a few tokens? (Kernels for more of them are chosen by number.)"""
        return not (
            self.soft
            or self.shared_width
            or self.count_usage
            or self.gate == "probability"
            or self._buffers["remap"] is not None
            or x.numel() > _FEW * self.width
        )

    def _hard(self, x_TD: Tensor, node_weight: Tensor, node_bias: Tensor, leaves: Leaves) -> Tensor:
        logits_TN, leaf_T = self._route(x_TD, node_weight, node_bias)
        if self.count_usage:
            self.usage += torch.bincount(leaf_T, minlength=len(self.usage))
        gate_T = None
        if self.depth and (self.gate == "probability" or (self.gate == "log" and differentiated())):
            logits_TN = functional.linear(x_TD, node_weight, node_bias) if logits_TN is None else logits_TN
            log_T = log_path_probability(logits_TN, leaf_T)
            gate_T = (log_T if self.gate == "probability" else log_T - log_T.detach()).exp().to(x_TD.dtype)
        if self._penalised():
            logits_TN = functional.linear(x_TD, node_weight, node_bias) if logits_TN is None else logits_TN
            self._penalise(logits_TN, leaf_T)
        leaf_T = leaf_T if self.remap is None else self.remap[leaf_T]
        return leaf_mlp(x_TD, leaf_T, gate_T, leaves, self.activation, dispatch.leaf_kernel(x_TD, leaves, self.kernel))

    def _route(self, x_TD: Tensor, node_weight: Tensor, node_bias: Tensor) -> tuple[Tensor | None, Tensor]:
        """(logits of all nodes or None, leaves [T]): the C++ kernel lets each token descend by itself."""
        if not self.depth:
            return None, torch.zeros(len(x_TD), dtype=torch.int64, device=x_TD.device)
        if not (self.training and self.region_leak) and dispatch.routes(x_TD, self.kernel):
            return None, route(x_TD, node_weight, node_bias, dispatch.route_tokens)
        logits_TN = functional.linear(x_TD, node_weight, node_bias)
        decided_TN = logits_TN.detach()
        if self.training and self.region_leak:
            decided_TN = torch.where(self._leaks(decided_TN), -decided_TN, decided_TN)
        return logits_TN, leaf_of(decided_TN)

    def _leaks(self, logits_TN: Tensor) -> Tensor:
        """Which decisions to turn round at this step; a hash of the step seeds them, so a resumed run repeats them."""
        step = self.leak_step
        generator = torch.Generator(logits_TN.device).manual_seed(int(step))
        step += 1
        return torch.rand(logits_TN.shape, generator=generator, device=logits_TN.device) < self.region_leak

    def _mixture(self, x_TD: Tensor, node_weight: Tensor, node_bias: Tensor, leaves: Leaves) -> Tensor:
        logits_TN = functional.linear(x_TD, node_weight, node_bias)
        if self._penalised():
            self._penalise(logits_TN, leaf_of(logits_TN.detach()))
        share_TL = leaf_probabilities(logits_TN)
        if self.remap is not None:
            share_TL = share_TL.new_zeros(len(x_TD), len(self.w1)).index_add(1, self.remap, share_TL)
        y_TE = share_TL @ leaves.b2
        for leaf, share_T in enumerate(share_TL.unbind(1)):
            act_TH = activate(x_TD @ leaves.w1[leaf] + leaves.b1[leaf], self.activation)
            y_TE = y_TE + (share_T[:, None] * act_TH) @ leaves.w2[leaf]
        return y_TE

    def _penalised(self) -> bool:
        return self.training and self.depth > 0 and bool(self.balance or self.hardening)

    def _penalise(self, logits_TN: Tensor, leaf_T: Tensor) -> None:
        self.penalty = weighed(logits_TN, leaf_T, self.balance, self.hardening)

    def _plain_inference(self) -> bool:
        return (
            not differentiated()
            and not self.soft
            and self.gate != "probability"
            and self.depth > 0
            and not self.count_usage
            and self.remap is None
        )

    def _cast(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Leaves]:
        """x and the weights, in autocast's dtype where it is on."""
        weights = (self.node_weight, self.node_bias, self.w1, self.b1, self.w2, self.b2)
        x_TD, node_weight, node_bias, w1, b1, w2, b2 = cast_together(x_TD, weights)
        return x_TD, node_weight, node_bias, Leaves(w1, b1, w2, b2)

    def __getstate__(self) -> dict[str, Any]:
        # a penalty belongs to a graph, which neither deepcopy nor pickle can take, and addresses to this process
        return self.__dict__ | {"penalty": None, "_inference": None}

    def keep_leaves(self, kept_k: Tensor, remap_L: Tensor) -> None:
        """Store these leaves only; `remap_L` int64 [2**depth] says which of them stands at each place of the tree."""
        for name in ("w1", "b1", "w2", "b2"):
            old = getattr(self, name)
            kept = old.detach()[kept_k.to(old.device)].clone()
            setattr(self, name, nn.Parameter(kept, requires_grad=old.requires_grad))
        self.remap = remap_L.to(self.w1.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """The state of a pruned layer shrinks this one first."""
        remap_L = state_dict.get(f"{prefix}remap")
        if remap_L is not None and self.remap is None and len(remap_L) == len(self.usage):
            stored = len(state_dict.get(f"{prefix}w1", self.w1))
            self.keep_leaves(torch.arange(min(stored, len(self.w1))), remap_L)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return (
            f"{self.width}, depth={self.depth}, leaf_width={self.leaf_width}, shared_width={self.shared_width}, "
            f"activation={self.activation}, gate={self.gate}"
        )


def _check(
    width: int, depth: int, leaf_width: int, shared_width: int, activation: str, gate: str, region_leak: float
) -> None:
    if min(width, leaf_width) < 1 or min(depth, shared_width) < 0:
        raise UsageError(
            f"width {width}, leaf width {leaf_width}, depth {depth}, shared width {shared_width}: "
            "widths are at least 1, depth and shared width at least 0"
        )
    if depth > 20:
        raise UsageError(f"depth {depth} would make {2**depth} leaves; 20 is the deepest")
    for value, kind in ((activation, Activation), (gate, Gate)):
        if value not in get_args(kind):
            raise UsageError(f"{value!r} is none of {', '.join(get_args(kind))}")
    if not 0 <= region_leak < 0.5:
        raise UsageError(f"region leak {region_leak}: a share of decisions, from 0 to below 0.5")
