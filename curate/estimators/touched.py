"""Which rows of a parameter a batch used, and which examples used them: leaves, nodes and words.

A leaf that no token reached has the gradient zero, so noise there is only noise. And a leaf takes part in nothing but
the examples whose tokens reached it, so the shares c_n = <G_n, zdot_n> of the others are noise to it as well:

    g_hat of leaf e = (sum of c_n over the examples n that reached e) v_e      unbiased, since E[c_n v_e] = dL_n/de

where examples do not meet before the embeddings (a BatchNorm in training couples them: then every touched row gets the
whole sum). Costs the routing once more, depth D multiply-adds per token.
"""

# B examples, R touched rows, n (row, example) pairs, P levels of a tree

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from curate.errors import UsageError
from curate.estimators.report import RowSlopes
from curate.feedforward.leaf import FastFeedforward
from curate.models.towers import pooled_position, text_parts


@dataclass(frozen=True, slots=True)
class Touched:
    """Rows in ascending order, int64 [R], and pairs: row `rows_R[row_n[i]]` was used by example `example_n[i]`.

    `example_n` is None where the module was not called with one row per example.
    """

    names: tuple[str, ...]
    rows_R: Tensor
    row_n: Tensor
    example_n: Tensor | None

    def slopes(self, share_KB: Tensor, common_K: Sequence[float], *, coupled: bool) -> RowSlopes:
        """Sum each row's examples, and add what belongs to none; float64."""
        share_KB = share_KB.double().cpu()
        if coupled or self.example_n is None:
            value_KR = share_KB.sum(1, keepdim=True).expand(len(share_KB), len(self.rows_R))
        else:
            value_KR = torch.zeros(len(share_KB), len(self.rows_R), dtype=torch.float64)
            value_KR.index_add_(1, self.row_n, share_KB[:, self.example_n])
        value_KR = value_KR + torch.tensor(common_K, dtype=torch.float64).unsqueeze(1)
        return RowSlopes(self.names, tuple(self.rows_R.tolist()), tuple(tuple(row) for row in value_KR.tolist()))


class Watch:
    """A context in which fast feedforward layers and embeddings note what they use; `touched` tells afterwards."""

    def __init__(self, module: nn.Module, names: dict[nn.Parameter, str]) -> None:
        self._names = names
        self._notes: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)  # [examples, ...] of row numbers
        self._hooks: list[Any] = []
        owners: dict[nn.Parameter, int] = defaultdict(int)
        for owner in module.modules():
            for parameter in owner._parameters.values():
                if parameter is not None:
                    owners[parameter] += 1
        # a weight that is also used elsewhere (a tied head) is touched everywhere
        self._single = {parameter for parameter, count in owners.items() if count == 1}
        parts = text_parts(module)
        # a causal tower reads nothing behind the pooled token, whatever leaves the padding went to
        self._parts = parts
        self._last_B: Tensor | None = None
        self._embedding = None if parts is None else parts.token_embedding
        self._causal = set() if parts is None else set(parts.transformer.modules())
        self._watched = [m for m in module.modules() if isinstance(m, FastFeedforward | nn.Embedding)]

    def __enter__(self) -> Watch:
        if self._embedding is not None:
            self._hooks.append(self._embedding.register_forward_pre_hook(self._find_last))
        for module in self._watched:
            note = self._tree(module) if isinstance(module, FastFeedforward) else self._words(module)
            if note is not None:
                self._hooks.append(module.register_forward_pre_hook(note))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def touched(self, examples: int) -> tuple[Touched, ...]:
        """What was used, for a batch of so many examples."""
        return tuple(_pairs(names, notes, examples) for names, notes in self._notes.items())

    def _find_last(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._last_B = pooled_position(self._parts, args[0]) if self._parts and args[0].ndim == 2 else None

    def _until_last(self, row_BT: Tensor) -> Tensor:
        """-1 for what stands behind the pooled token of a caption; [B, T] or [B, T, P]."""
        if self._last_B is None or row_BT.ndim < 2 or len(row_BT) != len(self._last_B):
            return row_BT
        behind_BT = torch.arange(row_BT.shape[1], device=row_BT.device) > self._last_B[:, None]
        return row_BT.masked_fill(behind_BT if row_BT.ndim == 2 else behind_BT.unsqueeze(-1), -1)

    def _known(self, *parameters: nn.Parameter) -> tuple[str, ...]:
        return tuple(self._names[p] for p in parameters if p in self._single and p in self._names)

    def _words(self, module: Any) -> Any:
        names = self._known(module.weight)
        if not names or module.max_norm is not None:
            return None

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            padding = -1 if module.padding_idx is None else module.padding_idx
            read = torch.where(args[0] == padding, -1, args[0])
            self._notes[names].append(self._until_last(read) if module is self._embedding else read)

        return note

    def _tree(self, module: Any) -> Any:
        leaf_names = self._known(module.w1, module.b1, module.w2, module.b2)
        node_names = self._known(module.node_weight, module.node_bias)
        if module.soft or not (leaf_names or node_names):
            return None
        if module.training and module.region_leak:
            raise UsageError("a fast feedforward layer with region_leak in training turns decisions round at random, "
                             "which leaf attribution cannot follow; set region_leak = 0 or use backprop")  # fmt: skip

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = forward_ad.unpack_dual(args[0]).primal
            leaf = module.leaf_indices(x).view(x.shape[:-1])
            whole = self._until_last if module in self._causal and leaf.ndim == 2 else _as_it_is
            if leaf_names:
                self._notes[leaf_names].append(whole(leaf if module.remap is None else module.remap[leaf]))
            if node_names:
                self._notes[node_names].append(whole(_path(leaf, module.depth, module.gate)))

        return note


def coupled(module: nn.Module) -> bool:
    """Do examples meet before the embeddings, in batch statistics?"""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())


def _as_it_is(row: Tensor) -> Tensor:
    return row


def _path(leaf: Tensor, depth: int, gate: str) -> Tensor:
    """The nodes above every leaf, [..., P]; none where the gate gives nodes no gradient."""
    level_P = torch.arange(depth if gate != "none" else 0, device=leaf.device)
    node: Tensor = ((leaf.unsqueeze(-1) + 2**depth) >> (depth - level_P)) - 1
    return node


def _pairs(names: tuple[str, ...], notes: list[Tensor], examples: int) -> Touched:
    own = all(note.ndim and len(note) == examples for note in notes)
    if not own:
        rows_R = torch.unique(torch.cat([note.flatten() for note in notes]).cpu())
        return Touched(names, rows_R[rows_R >= 0], torch.zeros(0, dtype=torch.int64), None)
    both = torch.cat([_beside(note.cpu()) for note in notes])
    pair_n2 = torch.unique(both[both[:, 0] >= 0], dim=0)
    rows_R, row_n = torch.unique(pair_n2[:, 0], return_inverse=True)
    return Touched(names, rows_R, row_n, pair_n2[:, 1])


def _beside(note: Tensor) -> Tensor:
    """(row, example) for every entry, [n, 2]."""
    flat_BX = note.reshape(len(note), -1)
    example_BX = torch.arange(len(note)).unsqueeze(1).expand_as(flat_BX)
    return torch.stack((flat_BX.flatten(), example_BX.flatten()), dim=1)
