"""Forward gradients: push a random tangent through the model once, and move along it as far as the loss asks for.

    g_hat = 1/K sum_k (g . v_k) v_k,   E[v v^T] = I:   unbiased,  E|g_hat|^2 / |g|^2 = 1 + (d - 1) / K

No backward pass; memory does not grow with depth. One tangent costs 2 forward passes with rank-1 directions and 3 with
dense ones (backprop: 3), K of them K times that. Sources: Baydin et al. (arXiv 2202.08587); Ren et al. (2210.03310).
`push` and `settle` are the two halves between which data-parallel workers exchange embeddings.
"""

# B batch, D embedding width, K tangents

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from curate.errors import CurateError, UsageError
from curate.estimators.problem import Embeddings, Head, Problem, head_of, trainable
from curate.estimators.products import RankOneProducts
from curate.estimators.report import GradReport, Layout, RowSlopes
from curate.estimators.swapping import Rewind, attention_for_tangents, swapped
from curate.estimators.tangents import Tangents, dimensions, fill_from
from curate.estimators.touched import Touched, Watch, coupled

MOST_EXACT = 2_048  # numbers; beyond that backprop is the exact one


@dataclass(frozen=True, slots=True)
class Pushed:
    """Embeddings of a batch, detached, their tangents [K][embedding] (None: no dependence), and what was touched."""

    embeddings: Embeddings
    tangents: tuple[tuple[Tensor | None, ...], ...]
    touched: tuple[Touched, ...]


@dataclass(frozen=True, slots=True)
class Forward:
    """`forward` (rank-1) and `forward-dense`; K = `tangents`. `disjoint` tangents share no row, and reach d / K.

    Leaves, nodes and vocabulary rows that the batch did not touch get exactly zero, the others the shares of the
    examples that touched them. Errors: UsageError for K < 1, for weights that no rule reaches and for recurrent layers;
    CurateError where no tangent arrives at the embeddings.
    """

    name: str = "forward"
    layout: Layout = "rank-1"
    tangents: int = 1
    disjoint: bool = False

    def __post_init__(self) -> None:
        if self.tangents < 1:
            raise UsageError(f"{self.name}: {self.tangents} tangents; at least 1 is needed")

    def directions(self, module: nn.Module, *, seed: int, step: int) -> Tangents:
        """The tangents of a step."""
        return Tangents(trainable(module), self.layout, seed, step, self.tangents, self.disjoint)

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`."""
        began, tangents = time.perf_counter(), self.directions(problem.module, seed=seed, step=step)
        pushed = push(problem, batch, tangents)
        report = settle(problem, pushed, tangents, head_of(problem, pushed.embeddings), name=self.name)
        fill_from(report, tangents.parameters)
        return replace(report, seconds=time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class ForwardExact:
    """`forward-exact`: one tangent per number, hence the gradient itself; 3 d forward passes. An oracle, d <= 2,048."""

    name: str = "forward-exact"

    def estimate(self, problem: Problem, batch: Any, *, seed: int, step: int) -> GradReport:
        """See `GradientEstimator`. Errors: UsageError for more than 2,048 numbers."""
        d = dimensions(trainable(problem.module))
        if d > MOST_EXACT:
            raise UsageError(f"forward-exact: {d:,} numbers take as many passes; it is for at most {MOST_EXACT:,}")
        return Forward(self.name, "basis", d).estimate(problem, batch, seed=seed, step=step)


def push(problem: Problem, batch: Any, tangents: Tangents) -> Pushed:
    """Embed a batch with each tangent in turn. Dropout, buffers and region leak see one pass, not K."""
    again, found, pushed = Rewind(problem.module), [], None
    for k in range(tangents.count):
        if k:
            again.rewind()
        embeddings, of_tangent, touched = _push_one(problem, batch, tangents, k)
        found.append(of_tangent)
        pushed = Pushed(embeddings, tuple(found), touched)
    assert pushed is not None
    return pushed


def settle(
    problem: Problem, pushed: Pushed, tangents: Tangents, head: Head, *, name: str, first: int = 0
) -> GradReport:
    """Derivatives from the embeddings' exact gradient. `head` may be of a larger batch, in which `pushed` starts at row
    `first`: a worker then reports its own part."""
    _check_alive(tangents, pushed, head)
    share_K = [_shares(of_tangent, head, first) for of_tangent in pushed.tangents]
    scale = 1.0 if tangents.disjoint or tangents.layout == "basis" else 1 / tangents.count
    return GradReport(
        estimator=name,
        layout=tangents.layout,
        loss=head.loss,
        seed=tangents.seed,
        step=tangents.step,
        tangents=tangents.count,
        names=tuple(tangents.parameters),
        dimensions=dimensions(tangents.parameters),
        seconds=0.0,
        slopes=tuple(float(sum(s.sum() for s in shares if s is not None)) for shares in share_K),
        loss_slopes=tuple(_through_loss(tangents, head, k) for k in range(tangents.count)),
        coefficient=scale,
        disjoint=tangents.disjoint,
        rows=tuple(_row_slopes(problem, touched, share_K) for touched in pushed.touched),
    )


def _push_one(
    problem: Problem, batch: Any, tangents: Tangents, k: int
) -> tuple[Embeddings, tuple[Tensor | None, ...], tuple[Touched, ...]]:
    module = problem.module
    names = {parameter: name for name, parameter in tangents.parameters.items()}
    products = _of_products(module, names) if tangents.layout == "rank-1" else {}
    _refuse_recurrent(module, names)
    with torch.no_grad(), attention_for_tangents(), Watch(module, names) as watch, forward_ad.dual_level():
        dual = {
            parameter: forward_ad.make_dual(parameter.detach(), tangents.whole(name, k))
            for parameter, name in names.items()
            if parameter not in products
        }
        rules = RankOneProducts(products, lambda name: tangents.factors(name, k))
        with swapped(module, dual), rules:
            embeddings = problem.embed(batch)
        if rules.unmet:
            raise UsageError(f"{sorted(rules.unmet)[0]}: no rule for forward derivatives met this weight, so its "
                             "derivative would be lost; freeze it if the model does not use it, "
                             "or use forward-dense")  # fmt: skip
        unpacked = [forward_ad.unpack_dual(z) for z in embeddings]
        return (
            tuple(z.primal.detach() for z in unpacked),
            tuple(None if z.tangent is None else z.tangent.detach() for z in unpacked),
            _attributable(watch.touched(len(embeddings[0])), embeddings),
        )


def _attributable(touched: tuple[Touched, ...], embeddings: Embeddings) -> tuple[Touched, ...]:
    """Without the nodes where an embedding belongs to no example: penalties reach those that no token met."""
    if all(z.ndim for z in embeddings):
        return touched
    return tuple(t for t in touched if not any(name.endswith(("node_weight", "node_bias")) for name in t.names))


def _of_products(module: nn.Module, names: dict[nn.Parameter, str]) -> dict[nn.Parameter, str]:
    """Weights that are only used in products with rules of their own, with their names."""
    found: list[Any] = []
    for owner in module.modules():
        if isinstance(owner, nn.Linear | nn.Conv2d | nn.Embedding):
            found.append(owner._parameters.get("weight"))
        if isinstance(owner, nn.MultiheadAttention):
            found.append(owner.in_proj_weight)
    return {p: names[p] for p in found if p is not None and p in names}


def _refuse_recurrent(module: nn.Module, names: dict[nn.Parameter, str]) -> None:
    for path, owner in module.named_modules():
        if isinstance(owner, nn.RNNBase) and any(p in names for p in owner.parameters()):
            raise UsageError(f"{path}: recurrent layers of torch keep their weights where tangents do not reach; "
                             "use backprop or zeroth-order, or freeze the layer")  # fmt: skip


def _check_alive(tangents: Tangents, pushed: Pushed, head: Head) -> None:
    if set(tangents.parameters) <= set(head.parameters):
        return  # the loss's own parameters only
    for k, of_tangent in enumerate(pushed.tangents):
        if tangents.layout != "basis" and not any(z is not None and bool(z.any()) for z in of_tangent):
            raise CurateError(f"tangent {k} of step {tangents.step}: nothing of it arrived at the embeddings; a layer "
                              "drops forward derivatives (torch.compile and custom operators do), or the embeddings "
                              "do not depend on any trainable parameter")  # fmt: skip


def _shares(of_tangent: tuple[Tensor | None, ...], head: Head, first: int) -> list[Tensor | None]:
    """c_n = <G_n, zdot_n> for every example of every embedding, [B] float64; None where nothing depends. The share of
    an embedding that belongs to no example is a number."""
    return [
        None
        if z is None or g is None
        else (g.double() * z.double()).cpu()
        if not z.ndim
        else (g[first : first + len(z)].double() * z.double()).flatten(1).sum(1).cpu()
        for z, g in zip(of_tangent, head.gradient, strict=True)
    ]


def _through_loss(tangents: Tangents, head: Head, k: int) -> float:
    own = (name for name in head.parameters if name in tangents.parameters)
    return sum(float((head.parameters[name].double() * tangents.whole(name, k).double()).sum()) for name in own)


def _row_slopes(problem: Problem, touched: Touched, share_K: list[list[Tensor | None]]) -> RowSlopes:
    """A row's share of the embedding that depends on it, or of all of them; and whatever belongs to no example."""
    side = problem.side(touched.names[0])
    wanted = [[s for i, s in enumerate(shares) if s is not None and s.ndim and side in (None, i)] for shares in share_K]
    share_KB = torch.stack([sum(shares[1:], start=shares[0]) for shares in wanted])
    common_K = [float(sum(s for s in shares if s is not None and not s.ndim)) for shares in share_K]
    return touched.slopes(share_KB, common_K, coupled=coupled(problem.module))
