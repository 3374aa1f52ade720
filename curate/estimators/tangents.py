"""Directions over named parameters, made from (seed, step, k, name) whenever they are needed, and gradients from them.

rank-1   v = a b^T with random signs for matrices (convolutions as [out, rest], leaves as [leaf, rest]), plain signs for
         vectors. E[v v^T] = I as for dense signs, since a_i b_j a_k b_l has mean 0 unless i = k and j = l; |v|^2 = d.
dense    random signs everywhere.
basis    tangent k is the k-th coordinate.
With `disjoint`, tangent k keeps only the rows whose number is k modulo K: orthogonal tangents that together cover every
row once, so that E|g_hat|^2 / |g|^2 falls to d / K, and to 1 where every row of a vector has its own tangent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curate.errors import UsageError
from curate.estimators.report import GradReport, Layout, RowSlopes
from curate.estimators.signs import key_of, signs

# R rows and C columns of a parameter laid out as a matrix, K tangents


@dataclass(frozen=True, slots=True)
class Tangents:
    """K directions over `parameters`; nothing is stored but the numbers that make them."""

    parameters: dict[str, nn.Parameter]
    layout: Layout
    seed: int
    step: int
    count: int
    disjoint: bool = False

    def factors(self, name: str, k: int) -> tuple[Tensor, Tensor]:
        """(a [R], b [C]) of the rank-1 direction of a parameter with two dimensions or more."""
        parameter = self.parameters[name]
        a_R = self._signs(f"{name} rows", k, len(parameter), parameter)
        b_C = self._signs(f"{name} columns", k, parameter.numel() // max(len(parameter), 1), parameter)
        return (a_R * self._chosen(name, k) if self.disjoint else a_R), b_C

    def whole(self, name: str, k: int) -> Tensor:
        """The direction of a parameter, in its shape."""
        parameter = self.parameters[name]
        if self.layout == "basis":
            return self._unit(name, k)
        if self.layout == "rank-1" and parameter.ndim > 1:
            a_R, b_C = self.factors(name, k)
            return torch.outer(a_R, b_C).view(parameter.shape)
        made = self._signs(name, k, parameter.numel(), parameter).view(parameter.shape)
        return (rows_of(made) * self._chosen(name, k).unsqueeze(1)).view(parameter.shape) if self.disjoint else made

    def scaled_sum(self, name: str, weight_KR: Tensor) -> Tensor:
        """sum over k of (row weights times tangent k), in the shape of the parameter."""
        parameter = self.parameters[name]
        total_RC = torch.zeros_like(rows_of(parameter), memory_format=torch.contiguous_format)
        for k, weight_R in enumerate(weight_KR):
            if self.layout == "rank-1" and parameter.ndim > 1:
                a_R, b_C = self.factors(name, k)
                total_RC.addr_(a_R * weight_R, b_C)
            else:
                total_RC += rows_of(self.whole(name, k)) * weight_R.unsqueeze(1)
        return total_RC.view(parameter.shape)

    def _signs(self, label: str, k: int, count: int, like: Tensor) -> Tensor:
        key = key_of(self.seed, self.step, k, label)
        return signs(key, 1, count, device=like.device, dtype=like.dtype).view(-1)

    def _chosen(self, name: str, k: int) -> Tensor:
        """1 for the rows of tangent k, 0 for the others; numbered through all parameters, so that none is favoured."""
        parameter, first = self.parameters[name], 0
        for other, before in self.parameters.items():
            if other == name:
                break
            first += len(rows_of(before))
        row_R = torch.arange(first, first + len(rows_of(parameter)), device=parameter.device)
        return (row_R % self.count == k).to(parameter.dtype)

    def _unit(self, name: str, k: int) -> Tensor:
        made, first = torch.zeros_like(self.parameters[name], memory_format=torch.contiguous_format), 0
        for other, parameter in self.parameters.items():
            if other == name and first <= k < first + parameter.numel():
                made.view(-1)[k - first] = 1
            first += parameter.numel()
        return made


def rows_of(tensor: Tensor) -> Tensor:
    """A parameter as a matrix [R, C]: a vector is a column, a scalar one row."""
    return tensor.detach().reshape(len(tensor) if tensor.ndim else 1, -1)


def dimensions(parameters: dict[str, nn.Parameter]) -> int:
    """How many numbers the parameters hold."""
    return sum(math.prod(p.shape) for p in parameters.values())


def fill_from(report: GradReport, parameters: dict[str, nn.Parameter]) -> None:
    """Put the gradient of a report with layout rank-1, dense or basis into `.grad`: sum of slope times tangent."""
    if set(report.names) - set(parameters):
        missing = sorted(set(report.names) - set(parameters))
        raise UsageError(f"the report is of another model: it has no parameter {missing[0]!r} ({len(missing)} missing)")
    own = {name: parameters[name] for name in report.names}
    if dimensions(own) != report.dimensions:
        raise UsageError(f"the report is of {report.dimensions} numbers, these parameters hold {dimensions(own)}")
    tangents = Tangents(own, report.layout, report.seed, report.step, report.tangents, report.disjoint)
    by_name = {name: rows for rows in report.rows for name in rows.names}
    pairs = zip(report.slopes, report.loss_slopes or (0.0,) * len(report.slopes), strict=True)
    total_K = [slope + of_loss for slope, of_loss in pairs]
    for name, parameter in own.items():
        weight_KR = _weights(report, parameter, by_name.get(name), total_K)
        parameter.grad = tangents.scaled_sum(name, weight_KR)


def _weights(report: GradReport, parameter: Tensor, own: RowSlopes | None, total_K: list[float]) -> Tensor:
    weight_KR = torch.zeros(report.tangents, len(rows_of(parameter)), dtype=torch.float64)
    if own is None:
        weight_KR += torch.tensor(total_K, dtype=torch.float64).unsqueeze(1)
    elif own.rows:
        weight_KR[:, list(own.rows)] = torch.tensor(own.values, dtype=torch.float64)
    return (weight_KR * report.coefficient).to(device=parameter.device, dtype=parameter.dtype)
