"""Find out what of a tower's forward pass can be reused: what rules it out by name, and a trial for the rest.

Three rows of noise run, then two of them alone. Each product must return the same rows for them, in one of the two
ways in which rows are laid out; so the trial also finds towers whose rows depend on each other or on chance. Costs a
forward pass of five samples.
"""

# r rows of a run

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from open_clip.transformer import PatchDropout
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from curate.costs.flops import Size
from curate.estimators.swapping import Rewind
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.learner.tape import Mode, Operation, Place, Plan, outputs_of
from curate.models.towers import text_parts

_TRIAL, _AGAIN = 3, [2, 0]  # rows of the trial, and those of them that run again


def why_not(tower: nn.Module) -> str | None:
    """What in a tower makes a row's activations depend on other rows or on chance, in its present mode; None: nothing.

    Example: "BatchNorm2d in training normalises by the batch".
    """
    for module in tower.modules():
        kind = type(module).__name__
        if not module.training:
            continue
        if isinstance(module, _BatchNorm):
            return f"{kind} in training normalises by the batch"
        if isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention | PatchDropout):
            share = module.dropout if isinstance(module, nn.MultiheadAttention) else getattr(module, "p", 0.0)
            if share or getattr(module, "prob", 0.0):
                return f"{kind} drops at random in training"
        if getattr(module, "drop_prob", 0.0):
            return f"{kind} drops paths at random in training"
        if getattr(module, "region_leak", 0.0):
            return f"{kind} turns decisions round at random in training"
        if getattr(module, "grad_checkpointing", False):
            return f"{kind} computes its blocks again in the backward pass"
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in tower.modules()):
        return "compiled modules hide their products"
    return None


def plan_of(module: Any, side: str, input_3X: Tensor, embed: Callable[[Tensor], Tensor]) -> Plan:
    """Try three rows, then two of them, and see where each product keeps its rows."""
    tower = _tower(module, side)
    if (reason := why_not(tower)) is not None:
        return Plan(why_not=f"{side} tower: {reason}")
    aside = tuple(m for m in tower.modules() if isinstance(m, FastFeedforward | PathFeedforward))
    before, runs = Rewind(module), []
    for input_rX in (input_3X, input_3X[_AGAIN]):
        mode = _Trial()
        with torch.enable_grad(), mode, mode.outside(aside):
            embedding = embed(input_rX)
        runs.append([*mode.seen, (None, (embedding,))])
        before.rewind()
    first, again = runs
    if [packet for packet, _ in first] != [packet for packet, _ in again]:
        return Plan(why_not=f"{side} tower: what runs depends on the rows")
    operations = []
    for (packet, made), (_, fewer) in zip(first, again, strict=True):
        places = _places(made, fewer)
        if places is None:
            return Plan(why_not=f"{side} tower: a row's activations depend on other rows or on chance")
        operations.append(Operation(packet, places))
    operations.pop()  # the embedding itself
    kept = [made for (_, made), operation in zip(first, operations, strict=False) if operation.places]
    if not kept:
        return Plan(why_not=f"{side} tower: no product whose rows can be told apart")
    size = sum(x.nbytes for made in kept for x in made if isinstance(x, Tensor))
    return Plan(tuple(operations), size / _TRIAL, None, aside)


def _places(made: tuple[Any, ...], fewer: tuple[Any, ...]) -> tuple[Place | None, ...] | None:
    """Where the outputs of one product keep their rows; (): compute it again; None: it depends on more than its row."""
    places: list[Place | None] = []
    for output, (x, y) in enumerate(zip(made, fewer, strict=True)):
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            if x is not y and x != y:
                return ()
            places.append(None)
            continue
        if x.shape == y.shape:
            same = bool(torch.equal(x, y))
            if output == 0:
                return () if same else None
            if not same and x.numel():
                return ()
            places.append(None)
            continue
        found = _found(x.detach(), y.detach())
        if not found and output == 0:
            return None
        if len(found) != 1:
            return ()
        places.append(found[0])
    written = any(isinstance(x, Tensor) and x._version for x in (*made, *fewer))
    return () if written else tuple(places)


def _found(x: Tensor, y: Tensor) -> list[Place]:
    """Places under which the rows of y are the trial's rows of x."""
    differ = [d for d in range(x.ndim) if x.ndim == y.ndim and x.shape[d] != y.shape[d]]
    if len(differ) != 1 or x.shape[differ[0]] * len(_AGAIN) != y.shape[differ[0]] * _TRIAL:
        return []
    k = x.shape[differ[0]] // _TRIAL
    places = [Place(differ[0], True)] + ([Place(differ[0], False)] if k > 1 else [])
    row_2 = torch.tensor(_AGAIN, device=x.device)
    return [place for place in places if _alike(place.select(x, _TRIAL, row_2), y)]


def _alike(x: Tensor, y: Tensor) -> bool:
    # another number of rows may be summed in another order; rows in the wrong place differ by their own size
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((x.float() - y.float()).abs().max() <= tolerance * y.float().abs().max())


class _Trial(Mode):
    """Keeps every product, and its version, to see whether something writes to it later."""

    def __init__(self) -> None:
        super().__init__(())
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def product(self, packet: Any, func: Any, args: Any, kwargs: Any) -> Any:
        made = func(*args, **kwargs)
        self.seen.append((packet, outputs_of(made)))
        return made


def _tower(module: Any, side: str) -> nn.Module:
    if side == "image":
        visual: nn.Module = module.visual
        return visual
    text = getattr(module, "text", None)
    return (
        text if isinstance(text, nn.Module) else nn.ModuleList(m for n, m in module.named_children() if n != "visual")
    )


def noise_images(size: Size, device: torch.device) -> Tensor:
    dice = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (_TRIAL, 3, *size), generator=dice, dtype=torch.uint8).to(device)


def noise_tokens(module: Any, device: torch.device) -> Tensor:
    """Captions of the whole context, all different, the end token last where the tower looks for one."""
    owner: Any = getattr(module, "text", module)
    length = int(getattr(owner, "context_length", None) or module.context_length)
    embedding = getattr(owner, "token_embedding", None)
    vocabulary = embedding.num_embeddings if embedding is not None else int(getattr(owner, "vocab_size", 16))
    parts = text_parts(module)
    end = vocabulary - 1 if parts is None or parts.pool_type == "argmax" else int(parts.eos_id or 0)
    token_3T = torch.randint(0, vocabulary, (_TRIAL, length), generator=torch.Generator().manual_seed(0))
    token_3T[token_3T == end] = (end + 1) % vocabulary
    token_3T[:, -1] = end
    return token_3T.to(device)
