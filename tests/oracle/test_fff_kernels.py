"""The torch kernels of fast feedforward against the oracle, their derivatives through autograd, and planted errors."""

from __future__ import annotations

from dataclasses import fields, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from curate.kernels.fff import Activation, LeafTangents, Leaves, Paths, grouped, masked, native, plain
from curate.kernels.fff.functions import leaf_mlp, path_mlp
from tests.oracle.fff_cases import LEAF_SHAPES, PATH_SHAPES, TOLERANCE, leaf_case, leaf_errors, path_case, path_errors

KERNELS = {"plain": plain, "grouped": grouped, "masked": masked, "native": native}
CPP = native.supports(torch.zeros(1))
needs_cpp = pytest.mark.skipif(not CPP, reason="no C++ kernels: no compiler here")
ABLE = [pytest.param(name, marks=needs_cpp if name == "native" else ()) for name in KERNELS]


def dtype_of(kernel: str) -> torch.dtype:
    """C++ computes in fp32; the others are compared in fp64."""
    return torch.float32 if kernel == "native" else torch.float64


@pytest.mark.parametrize("shape", LEAF_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["plain", "grouped", "masked"])
def test_leaf_kernels_equal_the_oracle(kernel: str, dtype: torch.dtype, shape: str) -> None:
    """Forward, backward and jvp of every torch kernel, for odd sizes, no tokens and every dtype."""
    for gated in (True, False):
        errors = leaf_errors(KERNELS[kernel], leaf_case(shape, dtype, gated=gated), "gelu")
        assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("kernel", ABLE)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_every_activation(kernel: str, activation: Activation) -> None:
    """Each activation and its slope, in each kernel."""
    dtype = dtype_of(kernel)
    errors = leaf_errors(KERNELS[kernel], leaf_case("usual", dtype), activation)
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("kernel", ABLE)
def test_all_tokens_to_one_leaf(kernel: str) -> None:
    """One full leaf and many empty ones; the empty ones have gradients of exactly zero."""
    dtype = dtype_of(kernel)
    case = leaf_case("usual", dtype, only_leaf=5)
    errors = leaf_errors(KERNELS[kernel], case, "gelu")
    assert max(errors.values()) < TOLERANCE[dtype], errors
    _, pre = KERNELS[kernel].leaf_forward(case.x, case.leaf, case.gate, case.leaves, "gelu")
    summed = KERNELS[kernel].leaf_backward(case.grad, case.x, case.leaf, case.gate, pre, case.leaves, "gelu")[2]
    for field in fields(Leaves):
        others = torch.cat([getattr(summed, field.name)[:5], getattr(summed, field.name)[6:]])
        assert torch.count_nonzero(others) == 0


@pytest.mark.parametrize("kernel", ABLE)
def test_nan_stays_in_its_token(kernel: str) -> None:
    """A NaN in one token leaves every other token's output as it was."""
    case = leaf_case("usual", dtype_of(kernel))
    before = KERNELS[kernel].leaf_forward(case.x, case.leaf, case.gate, case.leaves, "gelu")[0]
    x = case.x.clone()
    x[7, 3] = torch.nan
    after = KERNELS[kernel].leaf_forward(x, case.leaf, case.gate, case.leaves, "gelu")[0]
    others = torch.arange(len(x)) != 7
    assert after[7].isnan().all()
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("kernel", ABLE)
def test_strides_do_not_matter(kernel: str) -> None:
    """Transposed, sliced and expanded inputs give what their contiguous copies give."""
    dtype = dtype_of(kernel)
    case = leaf_case("usual", dtype, gated=False)
    x = case.x[:1].expand(50, -1)
    w1 = case.leaves.w1.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(50, 64, dtype=dtype)[:, ::2]
    grad = wide.copy_(case.grad)
    strided = replace(case, x=x, leaves=replace(case.leaves, w1=w1), grad=grad)
    errors = leaf_errors(KERNELS[kernel], strided, "gelu")
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("kernel", ABLE)
def test_leaf_indices_out_of_range_are_refused(kernel: str) -> None:
    """An index below 0 or beyond the leaves is an error, not a read beyond the weights."""
    case = leaf_case("usual", dtype_of(kernel))
    for wrong in (8, 1 << 40):
        leaf = case.leaf.clone()
        leaf[3] = wrong
        with pytest.raises((ValueError, IndexError)):
            KERNELS[kernel].leaf_forward(case.x, leaf, case.gate, case.leaves, "gelu")


def test_what_does_not_fit_is_named() -> None:
    """Wrong shapes, dtypes and activations are ValueErrors that say which."""
    case = leaf_case("usual")
    with pytest.raises(ValueError, match="b1 has shape"):
        plain.leaf_forward(case.x, case.leaf, None, replace(case.leaves, b1=case.leaves.b2), "gelu")
    with pytest.raises(ValueError, match="float32"):
        plain.leaf_forward(case.x.float(), case.leaf, None, case.leaves, "gelu")
    with pytest.raises(ValueError, match="int32"):
        plain.leaf_forward(case.x, case.leaf.int(), None, case.leaves, "gelu")
    with pytest.raises(ValueError, match="selu"):
        plain.leaf_forward(case.x, case.leaf, None, case.leaves, "selu")  # type: ignore[arg-type]


def leaf_function(kernel: ModuleType, case: Any) -> Any:
    def function(x: Tensor, gate: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return leaf_mlp(x, case.leaf, gate, Leaves(w1, b1, w2, b2), "gelu", kernel)

    return function


def inputs_of(case: Any) -> tuple[Tensor, ...]:
    return (case.x, case.gate, *(getattr(case.leaves, field.name) for field in fields(Leaves)))


@pytest.mark.parametrize("kernel", [plain, grouped, masked], ids=["plain", "grouped", "masked"])
def test_gradcheck_in_both_modes(kernel: ModuleType) -> None:
    """Reverse and forward derivatives agree with difference quotients in fp64."""
    case = leaf_case("one-neuron")
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs_of(case))
    assert torch.autograd.gradcheck(leaf_function(kernel, case), inputs, check_forward_ad=True, fast_mode=True)
    trees = path_case("one-node")
    wanted = tuple(
        t.clone().requires_grad_() for t in (trees.x, *(getattr(trees.paths, f.name) for f in fields(Paths)))
    )
    function = lambda x, *weights: path_mlp(x, Paths(*weights), "gelu", SimpleNamespace(**vars(plain)))  # noqa: E731
    assert torch.autograd.gradcheck(function, wanted, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("kernel", ABLE)
def test_every_way_of_asking_for_a_derivative(kernel: str) -> None:
    """torch.func.jvp, dual numbers, vmap of jvp, grad, and vmap of grad all give the oracle's numbers, none a zero."""
    dtype = dtype_of(kernel)
    case = leaf_case("odd", dtype)
    inputs, directions = inputs_of(case), tuple(getattr(case.tangents, f.name) for f in fields(LeafTangents))
    several = tuple(torch.stack([direction, -2 * direction, 0.5 * direction.flip(0)]) for direction in directions)

    def answers(module: ModuleType) -> list[Tensor]:
        function = leaf_function(module, case)
        found = [torch.func.jvp(function, inputs, directions)[1]]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[0], directions[0])
            found.append(forward_ad.unpack_dual(function(dual, *inputs[1:])).tangent)
        found.append(torch.func.vmap(lambda *v: torch.func.jvp(function, inputs, v)[1])(*several))
        found.append(torch.func.jvp(lambda w1: function(*inputs[:2], w1, *inputs[3:]), inputs[2:3], directions[2:3])[1])
        scalar = lambda *v: (function(*v) * case.grad).sum()  # noqa: E731
        found += torch.func.grad(scalar, argnums=tuple(range(6)))(*inputs)
        x_V, gate_V = torch.stack([inputs[0], -inputs[0]]), torch.stack([inputs[1], inputs[1]])
        found += torch.func.vmap(torch.func.grad(lambda x, g: scalar(x, g, *inputs[2:]), argnums=(0, 1)))(x_V, gate_V)
        return found

    wanted, found = answers(plain), answers(KERNELS[kernel])
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("kernel", ["plain", pytest.param("native", marks=needs_cpp)])
def test_every_way_of_asking_for_a_derivative_of_a_path(kernel: str) -> None:
    """The same for the path variant."""
    case = path_case("usual", dtype_of(kernel))
    inputs = (case.x, *(getattr(case.paths, f.name) for f in fields(Paths)))
    directions = tuple(getattr(case.tangents, f.name) for f in fields(case.tangents))
    several = tuple(torch.stack([direction, -2 * direction]) for direction in directions)

    def answers(module: Any) -> list[Tensor]:
        function = lambda x, *weights: path_mlp(x, Paths(*weights), "gelu", module)  # noqa: E731
        found = [torch.func.jvp(function, inputs, directions)[1]]
        found.append(torch.func.vmap(lambda *v: torch.func.jvp(function, inputs, v)[1])(*several))
        scalar = lambda *v: (function(*v) * case.grad).sum()  # noqa: E731
        found += torch.func.grad(scalar, argnums=tuple(range(5)))(*inputs)
        found.append(torch.func.vmap(torch.func.grad(lambda x: scalar(x, *inputs[1:])))(torch.stack([case.x, -case.x])))
        return found

    module = SimpleNamespace(**vars(plain)) if kernel == "plain" else native
    for one, other in zip(answers(module), answers(plain), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if kernel == "native" else 1e-9)


def test_second_derivatives_are_refused_by_fast_kernels() -> None:
    """The plain kernel has them; a fast one says so rather than answer zero."""
    case = leaf_case("one-neuron")
    x, rest = case.x, inputs_of(case)[1:]
    curvature = torch.func.jvp(torch.func.grad(lambda v: leaf_function(plain, case)(v, *rest).sum()), (x,), (x,))[1]
    assert curvature.abs().max() > 0
    with pytest.raises(NotImplementedError, match="kernel='plain'"):
        torch.func.jvp(torch.func.grad(lambda v: leaf_function(grouped, case)(v, *rest).sum()), (x,), (x,))


def test_compiled_models_keep_their_tangents() -> None:
    """Under torch.compile the call stays outside the graph, so a jvp is not silently dropped."""
    case = leaf_case("usual")
    function = torch.compile(leaf_function(grouped, case), backend="eager")
    inputs = inputs_of(case)
    torch.testing.assert_close(function(*inputs), leaf_function(plain, case)(*inputs))
    dx = torch.func.jvp(lambda x: function(x, *inputs[1:]), (case.x,), (case.tangents.x,))[1]
    wanted = torch.func.jvp(lambda x: leaf_function(plain, case)(x, *inputs[1:]), (case.x,), (case.tangents.x,))[1]
    torch.testing.assert_close(dx, wanted)


def planted(**wrong: Any) -> Any:
    return SimpleNamespace(**{**vars(grouped), **wrong})


def forgets_the_bias(x: Tensor, leaf: Tensor, gate: Any, leaves: Leaves, activation: Activation) -> Any:
    return grouped.leaf_forward(x, leaf, gate, replace(leaves, b2=torch.zeros_like(leaves.b2)), activation)


def takes_the_sibling(x: Tensor, leaf: Tensor, gate: Any, leaves: Leaves, activation: Activation) -> Any:
    return grouped.leaf_forward(x, leaf ^ 1, gate, leaves, activation)


def drops_the_gate(*inputs: Any) -> Any:
    return grouped.leaf_backward(*inputs[:3], None, *inputs[4:])


def gives_zero_tangents(_: LeafTangents, x: Tensor, *rest: Any) -> Tensor:
    return x.new_zeros(len(x), rest[3].w2.shape[2])


def forgets_the_direction_of_w2(tangents: LeafTangents, *rest: Any) -> Tensor:
    return grouped.leaf_jvp(replace(tangents, w2=None), *rest)


@pytest.mark.parametrize(
    "wrong",
    [
        {"leaf_forward": forgets_the_bias},
        {"leaf_forward": takes_the_sibling},
        {"leaf_backward": drops_the_gate},
        {"leaf_jvp": gives_zero_tangents},
        {"leaf_jvp": forgets_the_direction_of_w2},
    ],
    ids=lambda wrong: next(iter(wrong.values())).__name__,
)
def test_a_wrong_kernel_is_found(wrong: dict[str, Any]) -> None:
    """Each planted error makes the comparison above go red."""
    errors = leaf_errors(planted(**wrong), leaf_case("usual"), "gelu")
    assert max(errors.values()) > 100 * TOLERANCE[torch.float64]


@pytest.mark.parametrize("shape", PATH_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_path_oracle_holds_in_single_precision(dtype: torch.dtype, shape: str) -> None:
    """The plain path kernel in fp32 equals itself in fp64."""
    errors = path_errors(plain, path_case(shape, dtype), "gelu")
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_a_wrong_path_kernel_is_found() -> None:
    """A backward that forgets the inner slope makes the comparison go red."""

    def flat(grad: Tensor, x: Tensor, pre: Tensor, node: Tensor, paths: Paths, activation: Activation) -> Any:
        return plain.path_backward(grad, x, pre + 1, node, paths, activation)

    errors = path_errors(SimpleNamespace(**{**vars(plain), "path_backward": flat}), path_case("usual"), "gelu")
    assert max(errors.values()) > 100 * TOLERANCE[torch.float64]
