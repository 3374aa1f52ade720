"""Forward derivatives of matrix products with rank-1 tangents: the primal product, the tangent product, little else.

    y = x W^T,  W' = a b^T:   y' = x' W^T + (x b) a^T         2 products; torch's own rule takes 3 (and a dense W')

A TorchFunctionMode sees each call of linear, conv2d, embedding and multi-head attention and applies the rule, whoever
calls them; any other operation on such a weight gets its dense tangent. A weight that none of this reaches (a custom
autograd.Function, say) would have a zero tangent without a word, so `unmet` names it. Run inside a dual level.
"""

# B batch, T tokens, W width, H heads, O outputs, I inputs

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_QUESTIONS = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "stride"}
_QUESTIONS |= {"is_contiguous", "element_size", "get_device", "data_ptr", "storage_offset", "__len__", "has_names"}
Factors = tuple[Tensor, Tensor]


class RankOneProducts(TorchFunctionMode):
    """Applies the rules to `names`, the weights (by parameter) whose tangents are rank-1."""

    def __init__(self, names: dict[nn.Parameter, str], factors: Callable[[str], Factors]) -> None:
        super().__init__()
        self._names = {id(parameter): name for parameter, name in names.items()}
        self._make = factors
        self._factors: dict[int, Factors] = {}
        self._kept: list[Tensor] = []  # an id is only unique while its tensor lives
        self.unmet = set(names.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            done = rule(self, *args, **kwargs)
            if done is not NotImplemented:
                return done
        if asks(func):
            return func(*args, **kwargs)
        return func(*tree_map(self._dual, args), **tree_map(self._dual, kwargs))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`functional.linear` with tangents in any of its arguments."""
        x_p, x_t = forward_ad.unpack_dual(x)
        w_p, w_t = forward_ad.unpack_dual(weight)
        b_p, b_t = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        low = self._rank_one(weight)
        y = functional.linear(x_p, w_p, b_p)
        if x_t is None and w_t is None and b_t is None and low is None:
            return y
        y_t = None if x_t is None else functional.linear(x_t, w_p, None if b_t is None else b_t.to(x_t.dtype))
        if y_t is None:
            y_t = torch.zeros_like(y) if b_t is None else b_t.to(y.dtype).expand_as(y).clone()
        if low is not None:
            a_O, b_I = low
            y_t.addcmul_(torch.matmul(x_p, b_I.to(x_p.dtype)).to(y_t.dtype).unsqueeze(-1), a_O.to(y_t.dtype))
        if w_t is not None:
            y_t += functional.linear(x_p, w_t)
        dual: Tensor = forward_ad.make_dual(y, y_t)
        return dual

    def _rank_one(self, weight: Tensor) -> Factors | None:
        name = self._names.get(id(weight))
        if name is not None and id(weight) not in self._factors:
            self.unmet.discard(name)
            self._factors[id(weight)] = self._make(name)
        return self._factors.get(id(weight))

    def _dual(self, value: Any) -> Any:
        low = self._rank_one(value) if isinstance(value, Tensor) else None
        return value if low is None else forward_ad.make_dual(value.detach(), torch.outer(*low).view(value.shape))

    def _conv2d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        low = self._rank_one(weight)
        x_p, x_t = forward_ad.unpack_dual(x)
        w_p, w_t = forward_ad.unpack_dual(weight)
        if groups != 1 or w_t is not None:
            return NotImplemented
        b_p, b_t = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        y = functional.conv2d(x_p, w_p, b_p, stride, padding, dilation)
        y_t = None if x_t is None else functional.conv2d(x_t, w_p, None, stride, padding, dilation)
        if low is not None:
            kernel = low[1].view(1, *weight.shape[1:])
            one_B1HW = functional.conv2d(x_p, kernel, None, stride, padding, dilation)
            of_weight = one_B1HW * low[0].view(1, -1, 1, 1)
            y_t = of_weight if y_t is None else y_t + of_weight
        if b_t is not None:
            of_bias = b_t.view(1, -1, 1, 1)
            y_t = of_bias.expand_as(y).clone() if y_t is None else y_t + of_bias
        return y if y_t is None else forward_ad.make_dual(y, y_t.to(y.dtype))

    def _embedding(
        self, index: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **options: Any
    ) -> Any:
        max_norm = rest[0] if rest else options.get("max_norm")
        low = self._rank_one(weight)
        if low is None or max_norm is not None:
            return NotImplemented
        a_R, b_C = low
        of_row = a_R[index] if padding_idx is None else a_R[index] * (index != padding_idx)
        return forward_ad.make_dual(functional.embedding(index, weight.detach()), of_row.unsqueeze(-1) * b_C)

    def _item(self, tensor: Tensor, index: Any) -> Any:
        """Rows of a weight (of query or key, say) keep their part of the factors."""
        low = self._rank_one(tensor)
        if low is None or not isinstance(index, slice):
            return NotImplemented
        rows = tensor.detach()[index]
        self._kept.append(rows)
        self._factors[id(rows)] = (low[0][index], low[1])
        return rows

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        width: int,
        heads: int,
        in_weight: Tensor | None,
        in_bias: Tensor | None,
        bias_k: Any,
        bias_v: Any,
        add_zero_attn: bool,
        dropout_p: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        _separate: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        **_: Any,
    ) -> Any:
        special = any(v is not None for v in (bias_k, bias_v, key_padding_mask))
        if query.ndim != 3 or special or add_zero_attn or need_weights or (training and dropout_p > 0):
            return NotImplemented
        if in_weight is not None and query is key and key is value:
            q, k, v = self.linear(query, in_weight, in_bias).chunk(3, dim=-1)
        else:
            parts = [slice(width * i, width * (i + 1)) for i in range(3)]
            own = (q_proj_weight, k_proj_weight, v_proj_weight)
            weights = own if in_weight is None else [self.rows(in_weight, part) for part in parts]
            biases = [None if in_bias is None else self.rows(in_bias, part) for part in parts]
            q, k, v = map(self.linear, (query, key, value), cast(Any, weights), biases)
        mixed_TBW = _mix(q, k, v, heads, attn_mask)
        return self.linear(mixed_TBW, out_weight, out_bias), None

    def rows(self, weight: Tensor, part: slice) -> Tensor:
        """Some rows of a weight or bias, with their part of its tangent."""
        rows = self._item(weight, part)
        return weight[part] if rows is NotImplemented else cast(Tensor, rows)


def _mix(q_TBW: Tensor, k_SBW: Tensor, v_SBW: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Softmax attention over time-first tensors, [T, B, W]."""
    T, B, W = q_TBW.shape
    q, k, v = (x.reshape(len(x), B, heads, W // heads).permute(1, 2, 0, 3) for x in (q_TBW, k_SBW, v_SBW))
    if mask is not None and mask.ndim == 3:
        mask = mask.view(B, heads, *mask.shape[1:])
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.permute(2, 0, 1, 3).reshape(T, B, W)


def asks(func: Any) -> bool:
    """Does a call only ask for a shape, a type or the like?"""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in ("T", "mT", "H", "mH")
    return name in _QUESTIONS


_RULES: dict[Any, Callable[..., Any]] = {
    functional.linear: RankOneProducts.linear,
    functional.conv2d: RankOneProducts._conv2d,
    functional.embedding: RankOneProducts._embedding,
    functional.multi_head_attention_forward: RankOneProducts._attention,
    Tensor.__getitem__: RankOneProducts._item,
}
