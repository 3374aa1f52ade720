"""Keep what the products of a forward pass return, and answer them with some rows of it in a later pass.

A `TorchDispatchMode` stands below autograd: by the time it is asked, the node is made and its true inputs are saved, so
that an answer from elsewhere changes no gradient. Products are met in their order, which a trial has found
(`curate.learner.trial`); at another one the pass is given up.
"""

# b rows taken, k values between rows: heads, or tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_ATEN: Any = torch.ops.aten
_PRODUCTS: Final = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.convolution}
_ATTENTION: Final = {
    getattr(_ATEN, f"_scaled_dot_product_{kind}")
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
}


class OtherCourseError(Exception):
    """A forward pass did not run the operations of the trial."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor keeps its rows: in dimension `dim`, as [rows, k] (`outer`) or as [k, rows]."""

    dim: int
    outer: bool

    def select(self, tensor: Tensor, rows: int, row_b: Tensor) -> Tensor:
        """Those rows of a tensor of `rows` rows, laid out in memory as the tensor is."""
        k = tensor.shape[self.dim] // rows
        order = _outermost_first(tensor)
        at = order.index(self.dim)
        split = tensor.permute(order).unflatten(at, (rows, k) if self.outer else (k, rows))
        taken: Tensor = split.index_select(at if self.outer else at + 1, row_b).flatten(at, at + 1)
        return taken.permute([order.index(d) for d in range(tensor.ndim)])

    def join(self, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Rows of several tensors, one after another, in the memory layout of the first."""
        if len(parts) == 1:
            return parts[0]
        order = _outermost_first(parts[0])
        at = order.index(self.dim)
        moved = [part.permute(order) for part in parts]
        if self.outer:
            joined = torch.cat(moved, at)
        else:
            split = [part.unflatten(at, (-1, count)) for part, count in zip(moved, counts, strict=True)]
            joined = torch.cat(split, at + 1).flatten(at, at + 1)
        return joined.permute([order.index(d) for d in range(joined.ndim)])


@dataclass(frozen=True, slots=True)
class Operation:
    """One product of a tower's forward pass: what runs, and where each of its outputs keeps its rows.

    No places: it is computed again. A place of None: the output is none of a row's (a seed, a length) and is kept.
    """

    packet: Any
    places: tuple[Place | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The products of a tower in their order, and the bytes that a row leaves. `why_not`: no reuse, and the reason."""

    operations: tuple[Operation, ...] = ()
    row_bytes: float = 0.0
    why_not: str | None = None
    aside: tuple[nn.Module, ...] = ()  # our own layers, whose products run in kernels and are computed again


@dataclass(slots=True)
class Tape:
    """What a tower's products returned, by operation and micro-batch, until the chosen rows are taken from it."""

    plan: Plan
    counts: list[int] = field(default_factory=list)
    kept: list[list[tuple[Any, ...]]] = field(default_factory=list)

    def record(self, run: Callable[[], Tensor], rows: int) -> Tensor:
        """Run a micro-batch of `rows` rows and keep its products; the embedding, without a graph."""
        mode = _Record(self.plan.operations)
        with _no_memory(), mode, mode.outside(self.plan.aside):
            embedding = run()
        mode.finish()
        self.counts.append(rows)
        self.kept.append(mode.kept)
        return embedding.detach()

    def give_up(self, reason: str) -> None:
        """Let go of everything; from here on rows are computed."""
        self.plan = Plan(why_not=reason)
        self.counts.clear()
        self.kept.clear()

    def replay(self, run: Callable[[], Tensor], row_b: Tensor) -> tuple[Tensor, float]:
        """Run rows, ascending, with a graph; what is kept is let go on the way. The embedding, and the FLOPs saved."""
        mode = _Replay(self.plan.operations, self.counts, self.kept, row_b)
        with torch.enable_grad(), mode, mode.outside(self.plan.aside):
            embedding = run()
        mode.finish()
        return embedding, mode.saved


class Mode(TorchDispatchMode):
    """Meets the products of a forward pass one after another, and lets everything else run."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        super().__init__()
        self._operations, self.at, self._aside = operations, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, getattr(func, "overloadpacket", None)
        if self._aside or (packet not in _PRODUCTS and packet not in _ATTENTION):
            return func(*args, **kwargs)
        return self.product(packet, func, args, kwargs)

    def product(self, packet: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer one product."""
        raise NotImplementedError

    def expected(self, packet: Any) -> Operation:
        """The operation of the trial that stands here."""
        if self.at >= len(self._operations) or self._operations[self.at].packet is not packet:
            raise OtherCourseError
        self.at += 1
        return self._operations[self.at - 1]

    def finish(self) -> None:
        """Nothing of the trial may be missing."""
        if self.at != len(self._operations):
            raise OtherCourseError

    @contextmanager
    def outside(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Products within these modules are none of ours."""

        def enter(*_: Any) -> None:
            self._aside += 1

        def leave(*_: Any) -> None:
            self._aside -= 1

        handles: list[Any] = [module.register_forward_pre_hook(enter) for module in modules]
        handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Record(Mode):
    """Keeps the products that have places."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        super().__init__(operations)
        self.kept: list[tuple[Any, ...]] = []

    def product(self, packet: Any, func: Any, args: Any, kwargs: Any) -> Any:
        operation, made = self.expected(packet), func(*args, **kwargs)
        keep = outputs_of(made) if operation.places else ()
        self.kept.append(tuple(x.detach() if isinstance(x, Tensor) else x for x in keep))
        return made


class _Replay(Mode):
    """Answers products that have places with the kept rows."""

    def __init__(
        self, operations: Sequence[Operation], counts: Sequence[int], kept: list[list[tuple[Any, ...]]], row_b: Tensor
    ) -> None:
        super().__init__(operations)
        self._kept, self.saved, self._parts, first = kept, 0.0, [], 0
        for part, count in enumerate(counts):
            local = row_b[(row_b >= first) & (row_b < first + count)] - first
            first += count
            if len(local):
                self._parts.append((part, count, local))

    def product(self, packet: Any, func: Any, args: Any, kwargs: Any) -> Any:
        operation, at = self.expected(packet), self.at - 1
        if not operation.places:
            return func(*args, **kwargs)
        made = tuple(self._rows(at, output, place) for output, place in enumerate(operation.places))
        for part in self._kept:
            part[at] = ()
        if not _fits(packet, args, made[0]):
            raise OtherCourseError
        self.saved += _flops(packet, args, kwargs, made[0])
        return made if len(made) > 1 else made[0]

    def _rows(self, at: int, output: int, place: Place | None) -> Any:
        if place is None:
            return self._kept[0][at][output]
        parts = [place.select(self._kept[part][at][output], count, local) for part, count, local in self._parts]
        return place.join(parts, [len(local) for _, _, local in self._parts])


def _outermost_first(tensor: Tensor) -> list[int]:
    """The dimensions in the order of the tensor's memory."""
    stride = list(tensor.stride())
    return sorted(range(tensor.ndim), key=lambda d: (-stride[d], d))


def _fits(packet: Any, args: Any, made: Tensor) -> bool:
    """Has a kept output the shape that the operation would return?"""
    first: Tensor = args[1] if packet in (_ATEN.addmm, _ATEN.baddbmm) else args[0]
    if packet is _ATEN.convolution:
        return len(made) == len(first)
    return made.shape[:-1] == first.shape[:-1]


def _flops(packet: Any, args: Any, kwargs: Any, made: Tensor) -> float:
    if packet in _ATTENTION:
        return float(sdpa_flop_count(*(x.shape for x in args[:3])))
    return float(flop_registry[packet](*args, **kwargs, out_val=made))


@contextmanager
def _no_memory() -> Iterator[None]:
    """A graph that keeps no tensor, so that the same operations run as in training, at the memory of none."""

    def gone(_: Any) -> Any:
        raise RuntimeError("the scoring pass has no backward pass")

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, gone):
        yield


def outputs_of(made: Any) -> tuple[Any, ...]:
    return tuple(made) if isinstance(made, tuple | list) else (made,)
