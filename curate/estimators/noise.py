"""The two passes of `forward-activity` as modes: operations that mix parameters with examples, and noise upon them.

`TangentNoise` adds signs times the spread of an output to its tangent; `NoiseGradient` makes the same noise again and
takes each operation's own gradient of it, so that nothing is kept between operations. An operation is known by its
parameters; its noise is named after the first of them and the number of the call.
"""

# B batch, C columns: activations of one example, S sides: embeddings with a derivative, and penalties last
# T tokens, N nodes of a tree

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from curate.errors import UsageError
from curate.estimators.branches import BRANCHES, routers
from curate.estimators.penalised import Penalised
from curate.estimators.problem import Problem
from curate.estimators.products import RankOneProducts, asks
from curate.estimators.report import GradReport
from curate.estimators.signs import key_of, signs
from curate.feedforward.penalties import weighed

_ELEMENTWISE = {f"{before}{name}{after}" for name in ("add", "sub", "mul") for before, after in
                (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))}  # fmt: skip


class Noise(RankOneProducts):
    """Finds the operations that mix parameters with examples. Parameters, and what is made of them alone, are known by
    `requires_grad`: examples run without."""

    def __init__(self, named: dict[str, nn.Parameter], problem: Problem, place: tuple[int, int, int]) -> None:
        super().__init__({}, _no_factors)
        self._place, self._problem, self.examples = place, problem, 0
        self._routers, self._logits = routers(problem.module), list[Tensor]()
        self.penalised = isinstance(problem, Penalised)
        self._roots: dict[int, tuple[Tensor, frozenset[str]]] = {
            id(p): (p, frozenset({name})) for name, p in named.items()
        }
        self._calls: Counter[str] = Counter()
        self._batch_dim = 0
        self.met: set[str] = set()

    def sized(self, batch: Any) -> Any:
        """Learn the number of examples from the first tensor of the batch."""
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
        if not tensors:
            raise UsageError("forward-activity: the batch holds no tensor with one row per example")
        self.examples = len(tensors[0])
        return batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BRANCHES:
            return self._branches(func, args)
        if func is weighed:
            return self._penalty(*args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        live = [t for t in tensors if id(t) in self._roots]
        if asks(func) or not live:
            return super().__torch_function__(func, types, args, kwargs)
        if func is functional.linear:
            return self.linear(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._own_attention(*args, **kwargs)
        if len(live) == len(tensors):
            return self._derived(func, live, args, kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate, torch.stack):
            pieces = [self._noisy(torch.Tensor.clone, (t,), {}) if id(t) in self._roots else t for t in args[0]]
            return func(pieces, *args[1:], **kwargs)
        return self._noisy(func, args, kwargs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        live = [t for t in (weight, bias) if t is not None and id(t) in self._roots]
        if not live:
            return super().linear(x, weight, bias)
        own, route = (x, weight, bias), self._behind(live) <= self._routers
        made: Tensor = self._route(live, own) if route else self._noisy(functional.linear, own, {})
        return made

    def rows(self, weight: Tensor, part: slice) -> Tensor:
        if id(weight) not in self._roots:
            return weight[part]
        made: Tensor = self._derived(Tensor.__getitem__, [weight], (weight, part), {})
        return made

    def _route(self, live: list[Tensor], own: Any) -> Tensor:
        """Logits of a tree: their choice has no derivative; what else is made of them keeps the graph to the nodes."""
        made: Tensor = self._derived(functional.linear, live, own, {})
        self._logits.append(made)
        return made

    def _branches(self, func: Any, args: Any) -> Tensor:
        """The end of a fast feedforward layer: noise where a token's own leaf or path is computed."""
        for logits in self._logits:
            self._roots.pop(id(logits), None)  # or the graphs of all layers would stay in memory
        self._logits.clear()
        return BRANCHES[func](self._product, *args)

    def _product(self, func: Any, *operands: Tensor) -> Tensor:
        live = any(id(t) in self._roots for t in operands)
        made: Tensor = self._noisy(func, operands, {}) if live else func(*operands)
        return made

    def _penalty(self, logits_TN: Tensor, leaf_T: Tensor, *weights: float) -> Tensor:
        """The value alone: its derivative is dealt with here, at the logits."""
        raise NotImplementedError

    def _own_attention(self, *args: Any, **kwargs: Any) -> Any:
        self._batch_dim = 1  # torch and open_clip call it with time first
        done = self._attention(*args, **kwargs)
        self._batch_dim = 0
        if done is NotImplemented:
            raise UsageError("forward-activity: attention with dropout, a padding mask, returned weights or extra keys "
                             "is not known; freeze that layer, or use forward")  # fmt: skip
        return done

    def _derived(self, func: Any, live: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Made of parameters alone: keep the graph to them."""
        with torch.enable_grad():
            made = func(*args, **kwargs)
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            if tensor.requires_grad:
                self._roots[id(tensor)] = (tensor, self._behind(live))
        return made

    def _behind(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        return frozenset().union(*(self._roots[id(t)][1] for t in tensors if id(t) in self._roots))

    def _noisy(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = self._behind(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.met |= names
        label = f"{min(names)} activity"
        self._calls[label] += 1
        return self._apply(func, args, kwargs, names, f"{label} {self._calls[label]}")

    def _apply(self, func: Any, args: Any, kwargs: Any, names: frozenset[str], label: str) -> Any:
        raise NotImplementedError

    def _dim(self, func: Any, made: Any, operands: Any, label: str) -> int:
        """Which dimension of an output counts examples (dimension 0 may count several rows for each)."""
        B = self.examples
        if isinstance(made, Tensor) and getattr(func, "__name__", "") in _ELEMENTWISE:
            mine = [t for t in operands if isinstance(t, Tensor) and id(t) in self._roots]
            for dim, size in enumerate(made.shape):
                if size == B and all(_size(t, dim - made.ndim) == 1 for t in mine):
                    return dim
        dim = self._batch_dim
        if not isinstance(made, Tensor) or made.ndim <= dim or made.shape[dim] % B or (dim and made.shape[dim] != B):
            shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise UsageError(f"forward-activity: {label.split(' ')[0]} makes {shape}, without a row for each of {B} "
                             "examples; use forward")  # fmt: skip
        return dim

    def _signs(self, label: str, like: Tensor, dim: int) -> Tensor:
        """Noise shaped like the output: example n's depends on n and on the place in its own activations."""
        B = self.examples
        noise_BC = signs(key_of(*self._place, label), B, like.numel() // B, device=like.device, dtype=like.dtype)
        if not dim:
            return noise_BC.view(like.shape)
        others = [size for i, size in enumerate(like.shape) if i != dim]
        return noise_BC.view(B, *others).movedim(0, dim)


class TangentNoise(Noise):
    """First pass: noise joins the tangent. `penalty_B`: every example's share of the penalties, float64."""

    penalty_B: Tensor

    def sized(self, batch: Any) -> Any:
        given = super().sized(batch)
        self.penalty_B = torch.zeros(self.examples, dtype=torch.float64)
        return given

    def _penalty(self, logits_TN: Tensor, leaf_T: Tensor, *weights: float) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(logits_TN)
        still_TN = primal.detach()
        with torch.enable_grad():
            made = weighed(still_TN.requires_grad_(), leaf_T, *weights)
        if self.penalised and tangent is not None:
            (slope_TN,) = torch.autograd.grad(made, still_TN)
            share_TN = slope_TN.double() * tangent.detach().double()
            self.penalty_B += share_TN.view(self.examples, -1).sum(1).cpu()
        return made.detach()

    def _apply(self, func: Any, args: Any, kwargs: Any, names: frozenset[str], label: str) -> Any:  # noqa: ARG002
        still_args, still_kwargs = tree_map(self._still, (args, kwargs))
        made = RankOneProducts.__torch_function__(self, func, (), still_args, still_kwargs)
        dim = self._dim(func, made, (*tree_leaves(args), *tree_leaves(kwargs)), label)
        primal, tangent = forward_ad.unpack_dual(made)
        u = self._signs(label, primal, dim) * _spread(primal)
        return forward_ad.make_dual(primal, u if tangent is None else tangent + u)

    def _still(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) not in self._roots:
            return value
        primal, tangent = forward_ad.unpack_dual(value)  # logits have one, from what lies before the layer
        return primal.detach() if tangent is None else forward_ad.make_dual(primal.detach(), tangent.detach())


class NoiseGradient(Noise):
    """Second pass: each operation's parameters get the gradient of c_n u_n, and nothing flows further back."""

    def __init__(
        self, named: dict[str, nn.Parameter], problem: Problem, gradient: dict[str, Tensor], report: GradReport, k: int
    ) -> None:
        super().__init__(named, problem, (report.seed, report.step, k))
        self._named, self._gradient = named, gradient
        self._slopes, self._scale, self._tangent = report.slopes, report.coefficient, k
        self._count = report.tangents

    def _apply(self, func: Any, args: Any, kwargs: Any, names: frozenset[str], label: str) -> Any:
        with torch.enable_grad():
            made = func(*args, **kwargs)
        wanted = sorted(names)
        dim = self._dim(func, made, (*tree_leaves(args), *tree_leaves(kwargs)), label)
        still = made.detach()
        output = self._signs(label, still, dim) * self._weights(wanted[0], still, dim) / _spread(still)
        self._add(wanted, made, output)
        return made.detach()

    def _penalty(self, logits_TN: Tensor, leaf_T: Tensor, *weights: float) -> Tensor:
        names = sorted(self._behind([logits_TN]))
        with torch.enable_grad():
            made = weighed(logits_TN, leaf_T, *weights)
        if self.penalised and names:
            self._add(names, made, torch.full_like(made, self._scale))
        return made.detach()

    def _add(self, names: list[str], made: Tensor, output: Tensor) -> None:
        roots = [self._named[name] for name in names]
        found = torch.autograd.grad(made, roots, output, retain_graph=True, allow_unused=True)
        for name, own in zip(names, found, strict=True):
            if own is not None:
                self._gradient[name] += own

    def _weights(self, name: str, made: Tensor, dim: int) -> Tensor:
        """Every example's scaled share, to be multiplied with an output."""
        B = self.examples
        if len(self._slopes) % (self._count * B):
            raise UsageError(f"the report is not of a batch of {B} examples")
        share_SB = torch.tensor(self._slopes, dtype=torch.float64).view(self._count, -1, B)[self._tangent]
        side = self._problem.side(name)
        share_B = share_SB.sum(0) if side is None else share_SB[side]
        if side is not None and self.penalised:
            share_B = share_B + share_SB[-1]
        share_B = share_B * self._scale
        repeated = share_B.to(made).repeat_interleave(made.shape[dim] // B)
        return repeated.view(*(1 for _ in range(dim)), -1, *(1 for _ in range(made.ndim - dim - 1)))


def _spread(made: Tensor) -> Tensor:
    """Root mean square of an output: noise in units of what it disturbs."""
    return made.square().mean().sqrt().clamp(min=torch.finfo(made.dtype).tiny ** 0.5)


def _size(tensor: Tensor, dim: int) -> int:
    """Size along a dimension counted from the end; 1 where there is none."""
    return tensor.shape[dim] if -dim <= tensor.ndim else 1


def _no_factors(name: str) -> tuple[Tensor, Tensor]:
    raise AssertionError(name)
