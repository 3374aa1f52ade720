"""The plain fast feedforward kernel against loops over numbers and difference quotients: the oracle of the oracle."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args

import pytest
import torch
from torch import Tensor

from curate.kernels.fff import Activation, LeafTangents, Leaves, Paths, PathTangents, depth_of, leaf_of, plain
from tests.oracle.fff_cases import leaf_case, path_case

ACTIVATIONS = get_args(Activation)


def act(x: float, activation: str) -> float:
    if activation == "gelu":
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "quick_gelu":
        return x / (1 + math.exp(-1.702 * x))
    return max(x, 0.0)


def looped_leaf(x: Tensor, leaf: Tensor, gate: Tensor | None, leaves: Leaves, activation: str) -> Tensor:
    rows = []
    for token, index in enumerate(leaf.tolist()):
        w1, b1, w2, b2 = (t[index].tolist() for t in (leaves.w1, leaves.b1, leaves.w2, leaves.b2))
        own = x[token].tolist()
        hidden = [
            act(sum(v * row[n] for v, row in zip(own, w1, strict=True)) + b1[n], activation) for n in range(len(b1))
        ]
        y = [sum(a * row[e] for a, row in zip(hidden, w2, strict=True)) + b2[e] for e in range(len(b2))]
        rows.append([(1.0 if gate is None else float(gate[token])) * value for value in y])
    return torch.tensor(rows, dtype=torch.float64).view(len(x), leaves.w2.shape[2])


def looped_path(x: Tensor, paths: Paths, activation: str) -> Tensor:
    rows = []
    for token in x.tolist():
        y = paths.b2.tolist()
        for tree in range(paths.w1.shape[0]):
            node = 0
            while node < paths.w1.shape[1]:
                z = sum(v * w for v, w in zip(token, paths.w1[tree, node].tolist(), strict=True))
                z += float(paths.b1[tree, node])
                y = [v + act(z, activation) * w for v, w in zip(y, paths.w2[tree, node].tolist(), strict=True)]
                node = 2 * node + 1 + (z > 0)
        rows.append(y)
    return torch.tensor(rows, dtype=torch.float64).view(len(x), paths.w2.shape[2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_leaf_forward_equals_loops(activation: Activation, gated: bool) -> None:
    """The plain leaf kernel gives what loops over single numbers give."""
    for name in ("odd", "one-neuron", "one-token", "dense", "none"):
        case = leaf_case(name, gated=gated)
        y, _ = plain.leaf_forward(case.x, case.leaf, case.gate, case.leaves, activation)
        torch.testing.assert_close(y, looped_leaf(case.x, case.leaf, case.gate, case.leaves, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_path_forward_equals_loops(activation: Activation) -> None:
    """The plain path kernel gives what loops over single numbers give."""
    for name in ("odd", "one-token", "one-node", "none"):
        case = path_case(name)
        y, _, _ = plain.path_forward(case.x, case.paths, activation)
        torch.testing.assert_close(y, looped_path(case.x, case.paths, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_leaf_jvp_is_the_slope_of_the_loops(activation: Activation, gated: bool) -> None:
    """Along one direction of all inputs at once, the jvp is the central difference quotient of the loops."""
    case, step = leaf_case("one-neuron", gated=gated), 1e-5
    inputs = LeafTangents(case.x, case.gate, *(getattr(case.leaves, f.name) for f in fields(Leaves)))

    def moved(sign: float) -> Tensor:
        at = {
            f.name: None if (v := getattr(inputs, f.name)) is None else v + sign * step * getattr(case.tangents, f.name)
            for f in fields(LeafTangents)
        }
        return looped_leaf(at.pop("x"), case.leaf, at.pop("gate"), Leaves(**at), activation)

    _, pre = plain.leaf_forward(case.x, case.leaf, case.gate, case.leaves, activation)
    dy = plain.leaf_jvp(case.tangents, case.x, case.leaf, case.gate, pre, case.leaves, activation)
    torch.testing.assert_close(dy, (moved(1) - moved(-1)) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_path_jvp_is_the_slope_of_the_loops(activation: Activation) -> None:
    """Inside one region, the path's jvp is the central difference quotient of the loops."""
    case, step = path_case("odd"), 1e-6
    inputs = PathTangents(case.x, *(getattr(case.paths, f.name) for f in fields(Paths)))

    def moved(sign: float) -> Tensor:
        at = {
            f.name: getattr(inputs, f.name) + sign * step * getattr(case.tangents, f.name) for f in fields(PathTangents)
        }
        return looped_path(at.pop("x"), Paths(**at), activation)

    _, pre, node = plain.path_forward(case.x, case.paths, activation)
    assert pre.abs().min() > 1e-4, "the step must not cross a decision"
    dy = plain.path_jvp(case.tangents, case.x, pre, node, case.paths, activation)
    torch.testing.assert_close(dy, (moved(1) - moved(-1)) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_backward_and_jvp_are_adjoint(activation: Activation, gated: bool) -> None:
    """<grad, J v> = <J^T grad, v> for random grad and v: one derivation of the backward against the other."""
    case = leaf_case("usual", gated=gated)
    _, pre = plain.leaf_forward(case.x, case.leaf, case.gate, case.leaves, activation)
    dy = plain.leaf_jvp(case.tangents, case.x, case.leaf, case.gate, pre, case.leaves, activation)
    dx, dgate, back = plain.leaf_backward(case.grad, case.x, case.leaf, case.gate, pre, case.leaves, activation)
    pairs = [(dx, case.tangents.x), *((getattr(back, f.name), getattr(case.tangents, f.name)) for f in fields(Leaves))]
    if gated:
        pairs.append((dgate, case.tangents.gate))
    across = sum(float((one * other).sum()) for one, other in pairs)
    assert across == pytest.approx(float((case.grad * dy).sum()), rel=1e-11)

    trees = path_case("usual")
    _, pre, node = plain.path_forward(trees.x, trees.paths, activation)
    dy = plain.path_jvp(trees.tangents, trees.x, pre, node, trees.paths, activation)
    dx, summed = plain.path_backward(trees.grad, trees.x, pre, node, trees.paths, activation)
    across = float((dx * trees.tangents.x).sum())
    across += sum(float((getattr(summed, f.name) * getattr(trees.tangents, f.name)).sum()) for f in fields(Paths))
    assert across == pytest.approx(float((trees.grad * dy).sum()), rel=1e-11)


def test_ties_and_nan_go_left() -> None:
    """A logit of zero, a negative zero and NaN all take the left child."""
    for value in (0.0, -0.0, math.nan, -1.0):
        assert leaf_of(torch.tensor([[value]])).item() == 0
    assert leaf_of(torch.tensor([[5e-324]], dtype=torch.float64)).item() == 1
    tied = Paths(torch.zeros(1, 3, 2), torch.zeros(1, 3), torch.ones(1, 3, 2), torch.zeros(2))
    assert plain.path_forward(torch.zeros(1, 2), tied, "gelu")[2].flatten().tolist() == [0, 1]


def test_the_tree_is_descended_breadth_first() -> None:
    """Leaves are numbered from left to right, nodes level by level."""
    logits = torch.tensor([[1.0, -3.0, 0.0], [1.0, -3.0, 1.0], [-1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]])
    assert leaf_of(logits).tolist() == [2, 3, 1, 0]
    assert leaf_of(torch.empty(3, 0)).tolist() == [0, 0, 0]


def test_numbers_of_leaves_are_powers_of_two() -> None:
    """Anything else is refused, naming the number."""
    assert [depth_of(n) for n in (1, 2, 32)] == [0, 1, 5]
    for wrong in (0, 3, 12):
        with pytest.raises(ValueError, match=str(wrong)):
            depth_of(wrong)
