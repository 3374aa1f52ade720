"""Perturb activations instead of weights, and tell every example its own share of the derivative ("embedding split").

Noise u is added to the tangent of each operation that meets a parameter. With the exact G = dL/dZ at the embeddings,
c_n = <G_n, zdot_n> is example n's share, and the operation's parameters get the gradient of c_n u, locally:

    g_hat = sum over operations and examples of c_n / sigma^2 (d operation_n / d parameter)^T u_n,   u = +-sigma

with sigma the root mean square of the operation's output: against unit noise that divided the variance by 6 to 80 on
vision transformers of width 64 and 128, where a few operations of small output otherwise drown the rest. Unbiased where
examples do not meet before the embeddings. There are as many directions as activations of *one* example, fewer than
weights, and no example suffers from another's noise (with one scalar for all it is worse than perturbing weights).
Two passes, 4 forward passes' worth of work, memory flat in depth: the second pass rebuilds the noise. The loss's own
parameters get their exact gradient. After Ren et al. (arXiv 2210.03310).
"""

# B batch, C columns: activations of one example, K tangents, S sides: embeddings with a derivative

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from curate.errors import CurateError, UsageError
from curate.estimators.problem import Head, Problem, head_of, trainable
from curate.estimators.products import RankOneProducts, asks
from curate.estimators.report import GradReport
from curate.estimators.signs import key_of, signs
from curate.estimators.swapping import Rewind, attention_for_tangents
from curate.estimators.tangents import dimensions
from curate.estimators.touched import coupled

_ELEMENTWISE = {f"{before}{name}{after}" for name in ("add", "sub", "mul") for before, after in
                (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ForwardActivity:
    """`forward-activity`, with K = `tangents` independent draws of the noise, averaged.

    Errors: UsageError for K < 1, for BatchNorm in training, and for a parameter that meets no torch operation with a
    row per example (fast feedforward leaves): leave those to `forward` in a hybrid.
    """

    name: str = "forward-activity"
    tangents: int = 1

    def __post_init__(self) -> None:
        if self.tangents < 1:
            raise UsageError(f"{self.name}: {self.tangents} tangents; at least 1 is needed")

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`."""
        began, named = time.perf_counter(), trainable(problem.module)
        if coupled(problem.module):
            raise UsageError("forward-activity: BatchNorm in training couples the examples of a batch, so that none "
                             "has a share of its own; put it in evaluation mode, or use forward")  # fmt: skip
        _refuse_time_first(problem.module)
        again, slopes, loss = Rewind(problem.module), [], 0.0
        for k in range(self.tangents):
            again.rewind()
            share_SB, head = _measure(problem, batch, named, (seed, step, k))
            slopes += share_SB.flatten().tolist()
            loss = head.loss
        report = GradReport(
            estimator=self.name,
            layout="activity",
            loss=loss,
            seed=seed,
            step=step,
            tangents=self.tangents,
            names=tuple(named),
            dimensions=dimensions(named),
            seconds=time.perf_counter() - began,
            slopes=tuple(slopes),
            coefficient=1 / self.tangents,
        )
        again.rewind()
        fill_activity(report, problem, batch)
        return report


def fill_activity(report: GradReport, problem: Problem, batch: Any) -> None:
    """The second pass: `.grad` from a report and the batch it was made of. Errors: UsageError for another batch."""
    every = dict(problem.module.named_parameters())
    named = {name: every[name] for name in report.names}
    gradient = {name: torch.zeros_like(p) for name, p in named.items()}
    again, head = Rewind(problem.module), None
    for k in range(report.tangents):
        again.rewind()
        noise = _Gradient(named, problem, gradient, report, k)
        with torch.no_grad(), forward_ad.dual_level(), attention_for_tangents(), noise:
            embeddings = problem.embed(noise.sized(batch))
        head = head_of(problem, embeddings)
    assert head is not None
    for name, parameter in named.items():
        own = head.parameters.get(name)
        parameter.grad = gradient[name] if own is None else gradient[name] + own


def _measure(
    problem: Problem, batch: Any, named: dict[str, nn.Parameter], place: tuple[int, int, int]
) -> tuple[Tensor, Head]:
    """The first pass: shares [S, B] float64, and the loss."""
    noise = _Tangent(named, place)
    with torch.no_grad(), forward_ad.dual_level(), attention_for_tangents():
        with noise:
            embeddings = problem.embed(noise.sized(batch))
        unpacked = [forward_ad.unpack_dual(z) for z in embeddings]
        primal = tuple(z.primal.detach() for z in unpacked)
        of_noise = [None if z.tangent is None else z.tangent.detach() for z in unpacked]
    head = head_of(problem, primal)
    if not all(z.ndim for z in primal):
        raise UsageError("forward-activity: penalties of fast feedforward layers belong to no example; use forward")
    if unmet := sorted(set(named) - noise.met - set(head.parameters)):
        raise UsageError(f"forward-activity: {unmet[0]} meets no torch operation that noise could be added to; freeze "
                         "it if the model does not use it, or give it to forward in a hybrid")  # fmt: skip
    if noise.met and not any(z is not None and bool(z.any()) for z in of_noise):
        raise CurateError(
            "forward-activity: no tangent arrived at the embeddings; some layer drops forward derivatives"
        )
    rows = [
        torch.zeros(len(z), dtype=torch.float64) if t is None else (g.double() * t.double()).flatten(1).sum(1).cpu()
        for z, g, t in zip(primal, head.gradient, of_noise, strict=True)
        if g is not None
    ]
    return torch.stack(rows), head


class _Noise(RankOneProducts):
    """Finds the operations that mix parameters with examples. Parameters, and what is made of them alone, are known by
    `requires_grad`: examples run without."""

    def __init__(self, named: dict[str, nn.Parameter], place: tuple[int, int, int]) -> None:
        super().__init__({}, _no_factors)
        self._place, self._examples = place, 0
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
        self._examples = len(tensors[0])
        return batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        live = [t for t in tensors if id(t) in self._roots]
        if asks(func) or not live:
            return super().__torch_function__(func, types, args, kwargs)
        if func is torch.nn.functional.multi_head_attention_forward:
            return self._own_attention(*args, **kwargs)
        if len(live) == len(tensors):
            return self._derived(func, live, args, kwargs)
        if func in (torch.cat, torch.concat, torch.concatenate, torch.stack):
            pieces = [self._noisy(torch.Tensor.clone, (t,), {}) if id(t) in self._roots else t for t in args[0]]
            return func(pieces, *args[1:], **kwargs)
        return self._noisy(func, args, kwargs)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if any(id(t) in self._roots for t in (weight, bias)):
            made: Tensor = self._noisy(torch.nn.functional.linear, (x, weight, bias), {})
            return made
        return super().linear(x, weight, bias)

    def rows(self, weight: Tensor, part: slice) -> Tensor:
        if id(weight) not in self._roots:
            return weight[part]
        made: Tensor = self._derived(Tensor.__getitem__, [weight], (weight, part), {})
        return made

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
        B = self._examples
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
        B = self._examples
        noise_BC = signs(key_of(*self._place, label), B, like.numel() // B, device=like.device, dtype=like.dtype)
        if not dim:
            return noise_BC.view(like.shape)
        others = [size for i, size in enumerate(like.shape) if i != dim]
        return noise_BC.view(B, *others).movedim(0, dim)


class _Tangent(_Noise):
    """First pass: noise joins the tangent."""

    def _apply(self, func: Any, args: Any, kwargs: Any, names: frozenset[str], label: str) -> Any:  # noqa: ARG002
        still_args, still_kwargs = tree_map(self._still, (args, kwargs))
        made = RankOneProducts.__torch_function__(self, func, (), still_args, still_kwargs)
        dim = self._dim(func, made, (*tree_leaves(args), *tree_leaves(kwargs)), label)
        primal, tangent = forward_ad.unpack_dual(made)
        u = self._signs(label, primal, dim) * _spread(primal)
        return forward_ad.make_dual(primal, u if tangent is None else tangent + u)

    def _still(self, value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and id(value) in self._roots else value


class _Gradient(_Noise):
    """Second pass: each operation's parameters get the gradient of c_n u_n, and nothing flows further back."""

    def __init__(
        self, named: dict[str, nn.Parameter], problem: Problem, gradient: dict[str, Tensor], report: GradReport, k: int
    ) -> None:
        super().__init__(named, (report.seed, report.step, k))
        self._named, self._problem, self._gradient = named, problem, gradient
        self._slopes, self._scale, self._tangent = report.slopes, report.coefficient, k
        self._count = report.tangents

    def _apply(self, func: Any, args: Any, kwargs: Any, names: frozenset[str], label: str) -> Any:
        with torch.enable_grad():
            made = func(*args, **kwargs)
        wanted = sorted(names)
        roots = [self._named[name] for name in wanted]
        dim = self._dim(func, made, (*tree_leaves(args), *tree_leaves(kwargs)), label)
        still = made.detach()
        output = self._signs(label, still, dim) * self._weights(wanted[0], still, dim) / _spread(still)
        found = torch.autograd.grad(made, roots, output, retain_graph=True, allow_unused=True)
        for name, own in zip(wanted, found, strict=True):
            if own is not None:
                self._gradient[name] += own
        return made.detach()

    def _weights(self, name: str, made: Tensor, dim: int) -> Tensor:
        """Every example's scaled share, to be multiplied with an output."""
        B = self._examples
        if len(self._slopes) % (self._count * B):
            raise UsageError(f"the report is not of a batch of {B} examples")
        share_SB = torch.tensor(self._slopes, dtype=torch.float64).view(self._count, -1, B)[self._tangent]
        side = self._problem.side(name)
        share_B = (share_SB.sum(0) if side is None else share_SB[side]) * self._scale
        repeated = share_B.to(made).repeat_interleave(made.shape[dim] // B)
        return repeated.view(*(1 for _ in range(dim)), -1, *(1 for _ in range(made.ndim - dim - 1)))


def _refuse_time_first(module: nn.Module) -> None:
    for path, owner in module.named_modules():
        if isinstance(owner, nn.MultiheadAttention) and not owner.batch_first:
            raise UsageError(f"forward-activity: {path} is not batch_first, and examples are looked for in the first "
                             "dimension; build the model with batch_first=True, or use forward")  # fmt: skip


def _spread(made: Tensor) -> Tensor:
    """Root mean square of an output: noise in units of what it disturbs."""
    return made.square().mean().sqrt().clamp(min=torch.finfo(made.dtype).tiny ** 0.5)


def _size(tensor: Tensor, dim: int) -> int:
    """Size along a dimension counted from the end; 1 where there is none."""
    return tensor.shape[dim] if -dim <= tensor.ndim else 1


def _no_factors(name: str) -> tuple[Tensor, Tensor]:
    raise AssertionError(name)
