"""Drop the leaves that hardly any token uses: their weights are freed and their tokens go to the subtree next to them.

The tree keeps its 2**depth places, because the kernels descend complete trees. A node with nothing left on one side is
fixed to the other (weight 0, bias +-1e4, where a sigmoid is 0 or 1 exactly, so the node has no gradient either), and
the layer's `remap` says which stored leaf stands at a place. Tokens whose leaf stayed are computed as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curate.errors import UsageError
from curate.feedforward.leaf import FastFeedforward

# L = 2**depth places of the tree, K leaves that are stored
_FIXED = 1e4  # sigmoid is exact at 0 and 1 beyond 104 in float32, and float16 ends at 65,504


@dataclass(frozen=True, slots=True)
class Pruned:
    """Stored leaves that stayed and that were dropped, by their number before; `moved` is the share of the counted
    tokens that other leaves take over."""

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    moved: float


def prune_leaves(layer: FastFeedforward, min_usage: float) -> Pruned:
    """Drop the leaves with less than `min_usage` of the tokens in `layer.usage`, in place; the counts start anew.

    Count first: set `layer.count_usage = True` and run some batches. Optimizers made before hold parameters that are
    gone. The state dict has one entry more, `remap`; a layer of the same sizes reads it and shrinks.

    Example: counts 50, 30, 19, 1 and min_usage 0.05 drop leaf 3, whose tokens now take leaf 2. Errors: UsageError
    where nothing was counted, or no leaf would be left.
    """
    if not 0 <= min_usage <= 1:
        raise UsageError(f"min_usage {min_usage}: a share of the tokens, from 0 to 1")
    share_K = usage_of(layer)
    if not share_K.sum() > 0:
        raise UsageError("no tokens were counted: set `count_usage = True` on the layer and run some batches first")
    stays_K = share_K >= min_usage
    if not stays_K.any():
        raise UsageError(f"no leaf has {min_usage:.3g} of the tokens; the most used one has {float(share_K.max()):.3g}")
    kept_k = stays_K.nonzero().squeeze(1)
    if not stays_K.all():
        _drop(layer, share_K, stays_K, kept_k)
    dropped = (~stays_K).nonzero().squeeze(1)
    return Pruned(tuple(kept_k.tolist()), tuple(dropped.tolist()), float(share_K[~stays_K].sum()))


def usage_of(layer: FastFeedforward) -> Tensor:
    """Share of the counted tokens that each stored leaf took, float64 on the CPU [K]; zeros before any count."""
    usage_L = layer.usage.detach().cpu()
    count_K = torch.zeros(len(layer.w1), dtype=torch.int64).index_add_(0, _places(layer), usage_L)
    return count_K.double() / max(int(count_K.sum()), 1)


def _places(layer: FastFeedforward) -> Tensor:
    """The stored leaf at every place of the tree, on the CPU [L]."""
    return torch.arange(2**layer.depth) if layer.remap is None else layer.remap.detach().cpu()


def _drop(layer: FastFeedforward, share_K: Tensor, stays_K: Tensor, kept_k: Tensor) -> None:
    stored_L = _places(layer)
    stays_L = stays_K[stored_L]
    place_L = _nearest(stays_L, share_K[stored_L], layer.depth)
    number_K = torch.full_like(stored_L[: len(stays_K)], -1)
    number_K[kept_k] = torch.arange(len(kept_k))
    _fix_nodes(layer, stays_L)
    layer.keep_leaves(kept_k, number_K[stored_L[place_L]])
    layer.usage.zero_()


def _nearest(stays_L: Tensor, share_L: Tensor, depth: int) -> Tensor:
    """For every place itself, or the most used remaining place of the smallest subtree around it that has one."""
    rank_L = torch.where(stays_L, share_L, torch.full_like(share_L, -1))
    chosen_L = torch.arange(len(stays_L))
    open_L = ~stays_L
    for above in range(1, depth + 1):
        group = rank_L.view(-1, 2**above)
        best = group.argmax(1) + torch.arange(len(group)) * 2**above
        here_L = open_L & (group.max(1).values >= 0).repeat_interleave(2**above)
        chosen_L[here_L] = best.repeat_interleave(2**above)[here_L]
        open_L &= ~here_L
    return chosen_L


def _fix_nodes(layer: FastFeedforward, stays_L: Tensor) -> None:
    """Nodes with leaves on one side only always go there."""
    for level in range(layer.depth):
        left, right = stays_L.view(2**level, 2, -1).any(2).unbind(1)
        for node in (left ^ right).nonzero().squeeze(1).tolist():
            with torch.no_grad():
                layer.node_weight[2**level - 1 + node] = 0
                layer.node_bias[2**level - 1 + node] = _FIXED if bool(right[node]) else -_FIXED
