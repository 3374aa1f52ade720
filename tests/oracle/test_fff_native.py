"""The C++ kernels of fast feedforward against `plain.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from curate.kernels.fff import Activation, LeafTangents, Leaves, Paths, PathTangents, leaf_of, native, plain

pytestmark = pytest.mark.skipif(
    native.why_not() is not None, reason=f"the C++ kernels are not built: {native.why_not()}"
)

# T tokens, D width in, E width out, L leaves, H neurons of a leaf, N nodes of a tree, K trees, P levels of a path
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
FP32, BF16 = torch.float32, torch.bfloat16
# Of the largest element: sums of up to 300 terms in fp32 in two orders; bf16 rounds every result to 8 bits, and what
# the gradients take as `pre` was rounded before.
TOLERANCE = {FP32: 2e-5, BF16: 1e-2}
# D, H, E, L: below a vector, not a multiple of one, of one neuron, several panels, deeper than a packed block
LEAVES = [(3, 5, 7, 2), (80, 24, 33, 8), (80, 1, 80, 4), (64, 80, 96, 1), (300, 96, 104, 4), (1, 600, 20, 2)]
PATHS = [(80, 33, 1, 4), (8, 1, 3, 2), (5, 97, 2, 1), (136, 80, 2, 5)]  # D, E, K, P
TOKENS = [0, 1, 2, 7, 50, 300]


def leaf_infer(x: Tensor, weight: Tensor, bias: Tensor, leaves: Leaves, activation: Activation) -> Tensor:
    return native.leaf_inference(x, weight, bias, leaves, activation)(x.contiguous())


def path_infer(x: Tensor, paths: Paths, activation: Activation) -> Tensor:
    return native.path_inference(x, paths, activation)(x.contiguous())


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(p * n for p, n in enumerate(shape, 1)))
    return torch.randn(shape, generator=generator).to(dtype)


def draw_leaves(D: int, H: int, E: int, L: int, dtype: torch.dtype = FP32, seed: int = 0) -> Leaves:
    shapes = (L, D, H), (L, H), (L, H, E), (L, E)
    scales = D**-0.5, 1.0, H**-0.5, 1.0
    return Leaves(
        *((draw(*s, seed=seed + i) * c).to(dtype) for i, (s, c) in enumerate(zip(shapes, scales, strict=True)))
    )


def draw_paths(D: int, E: int, K: int, P: int, dtype: torch.dtype = FP32, seed: int = 0) -> Paths:
    N = 2**P - 1
    shapes = (K, N, D), (K, N), (K, N, E), (E,)
    scales = D**-0.5, 1.0, P**-0.5, 1.0
    return Paths(
        *((draw(*s, seed=seed + i) * c).to(dtype) for i, (s, c) in enumerate(zip(shapes, scales, strict=True)))
    )


def draw_leaf_numbers(T: int, L: int, seed: int = 0) -> Tensor:
    return torch.randint(0, L, (T,), generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[expected.dtype] * largest)


def assert_all_close(got: Leaves | Paths, expected: Leaves | Paths) -> None:
    for field in fields(expected):
        assert_close(getattr(got, field.name), getattr(expected, field.name))


def subsets(count: int) -> list[int]:
    return [0, 2**count - 1, *(2**bit for bit in range(count))]


# ---- leaves ----


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", LEAVES)
@pytest.mark.parametrize("T", TOKENS)
def test_leaf_forward_and_backward_agree(T: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Output, `pre` and every gradient are plain's, at odd sizes, gated or not."""
    D, H, E, L = shape
    x, leaf, leaves = draw(T, D, dtype=dtype), draw_leaf_numbers(T, L), draw_leaves(D, H, E, L, dtype)
    for gate in (None, draw(T, dtype=dtype, seed=1)):
        (y, pre), (y_plain, pre_plain) = (k.leaf_forward(x, leaf, gate, leaves, "gelu") for k in (native, plain))
        assert_close(y, y_plain)
        assert_close(pre, pre_plain)
        grad = draw(T, E, dtype=dtype, seed=2)
        got, expected = (k.leaf_backward(grad, x, leaf, gate, pre_plain, leaves, "gelu") for k in (native, plain))
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])
        assert_all_close(got[2], expected[2])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("given", subsets(6))
def test_leaf_jvp_agrees(given: int, dtype: torch.dtype) -> None:
    """Any set of tangents gives plain's derivative; what is absent counts as zero."""
    T, D, H, E, L = 50, 80, 24, 33, 8
    x, leaf, leaves = draw(T, D, dtype=dtype), draw_leaf_numbers(T, L), draw_leaves(D, H, E, L, dtype)
    along = draw_leaves(D, H, E, L, dtype, seed=7)
    t = (draw(T, D, dtype=dtype, seed=3), draw(T, dtype=dtype), along.w1, along.b1, along.w2, along.b2)
    tangents = LeafTangents(*(tensor if given >> bit & 1 else None for bit, tensor in enumerate(t)))
    for gate in (None, draw(T, dtype=dtype, seed=1)):
        pre = plain.leaf_forward(x, leaf, gate, leaves, "gelu")[1]
        got, expected = (k.leaf_jvp(tangents, x, leaf, gate, pre, leaves, "gelu") for k in (native, plain))
        assert_close(got, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leaf_activations_agree(activation: Activation) -> None:
    """Every activation and its slope are plain's, also far out."""
    D, H, E, L = 24, 40, 16, 2
    x, leaf, leaves = 6 * draw(30, D), draw_leaf_numbers(30, L), draw_leaves(D, H, E, L)
    (y, pre), (y_plain, _) = (k.leaf_forward(x, leaf, None, leaves, activation) for k in (native, plain))
    assert_close(y, y_plain)
    grad, tangents = draw(30, E), LeafTangents(x=draw(30, D, seed=5))
    for got, expected in zip(
        *(k.leaf_backward(grad, x, leaf, None, pre, leaves, activation)[:2] for k in (native, plain)), strict=True
    ):
        assert_close(got, expected)
    assert_close(*(k.leaf_jvp(tangents, x, leaf, None, pre, leaves, activation) for k in (native, plain)))


@pytest.mark.parametrize("size", [(2000, 600, 16, 1, 40), (30, 40, 4000, 1, 40)])
def test_leaf_of_many_weights_agrees(size: tuple[int, int, int, int, int]) -> None:
    """A leaf too large for the second-level cache goes through packed panels, to the same result."""
    D, H, E, L, T = size
    x, leaf, leaves = draw(T, D), draw_leaf_numbers(T, L), draw_leaves(D, H, E, L)
    y, _ = native.leaf_forward(x, leaf, None, leaves, "gelu")
    assert_close(y, plain.leaf_forward(x, leaf, None, leaves, "gelu")[0])
    few, _ = native.leaf_forward(x[:3], leaf[:3], None, leaves, "gelu")
    assert torch.equal(few, y[:3]), "the bits of a token depend on how many come with it"


def test_unused_leaves_have_zero_gradient() -> None:
    """A leaf that no token reached gets exactly zero, and one that all reached gets every token."""
    D, H, E, L = 80, 24, 33, 4
    x, leaf, leaves = draw(50, D), torch.full((50,), 2), draw_leaves(D, H, E, L)
    pre, grad = plain.leaf_forward(x, leaf, None, leaves, "gelu")[1], draw(50, E)
    got = native.leaf_backward(grad, x, leaf, None, pre, leaves, "gelu")[2]
    assert_all_close(got, plain.leaf_backward(grad, x, leaf, None, pre, leaves, "gelu")[2])
    for field in fields(got):
        assert not getattr(got, field.name)[[0, 1, 3]].any(), field.name


def test_strides_do_not_matter() -> None:
    """Expanded, transposed and sliced inputs give the bits of their contiguous copies."""
    D, H, E, L, T = 24, 16, 20, 4, 30
    leaf = draw_leaf_numbers(2 * T, L)[::2]
    leaves = draw_leaves(D, H, E, L)
    turned = replace(leaves, w1=leaves.w1.transpose(1, 2).contiguous().transpose(1, 2), b2=leaves.b2[:1].expand(L, E))
    x, gate, grad = draw(D, T).T, draw(1).expand(T), draw(1).expand(T, E)

    def run(x: Tensor, leaf: Tensor, gate: Tensor, grad: Tensor, leaves: Leaves) -> list[Tensor]:
        y, pre = native.leaf_forward(x, leaf, gate, leaves, "gelu")
        dx, dgate, d = native.leaf_backward(grad, x, leaf, gate, pre, leaves, "gelu")
        dy = native.leaf_jvp(LeafTangents(x=x, gate=gate), x, leaf, gate, pre, leaves, "gelu")
        return [y, pre, dx, dgate, d.w1, d.b1, d.w2, d.b2, dy]

    copies = Leaves(*(t.contiguous() for t in (turned.w1, turned.b1, turned.w2, turned.b2)))
    plain_copy = run(*(t.contiguous() for t in (x, leaf, gate, grad)), copies)
    assert all(map(torch.equal, run(x, leaf, gate, grad, turned), plain_copy))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_leaf_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """One thread and two give the same bits, forward, backward and jvp."""
    D, H, E, L, T = 80, 24, 33, 4, 300
    x, leaf, leaves = draw(T, D, dtype=dtype), draw_leaf_numbers(T, L), draw_leaves(D, H, E, L, dtype)
    grad, gate = draw(T, E, dtype=dtype), draw(T, dtype=dtype)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        y, pre = native.leaf_forward(x, leaf, gate, leaves, "gelu")
        dx, dgate, d = native.leaf_backward(grad, x, leaf, gate, pre, leaves, "gelu")
        dy = native.leaf_jvp(
            LeafTangents(x, gate, *(leaves.w1, leaves.b1, leaves.w2)), x, leaf, gate, pre, leaves, "gelu"
        )
        return [y, pre, dx, dgate, d.w1, d.b1, d.w2, d.b2, dy]

    assert all(map(torch.equal, run(1), run(2)))


def test_nan_stays_in_its_token() -> None:
    """NaN in one token's input is NaN in its output and nowhere else, though it shares tiles with others."""
    D, H, E, L, T = 80, 24, 33, 2, 50
    x, leaf, leaves = draw(T, D), draw_leaf_numbers(T, L), draw_leaves(D, H, E, L)
    clean, _ = native.leaf_forward(x, leaf, None, leaves, "gelu")
    x[17, 3] = torch.nan
    y, pre = native.leaf_forward(x, leaf, None, leaves, "gelu")
    others = torch.arange(T) != 17
    assert y[17].isnan().all()
    assert torch.equal(y[others], clean[others])
    dx, dgate, d = native.leaf_backward(draw(T, E), x, leaf, None, pre, leaves, "gelu")
    assert not dx[others].isnan().any()
    assert not dgate[others].isnan().any()
    assert not d.w1[1 - leaf[17]].isnan().any()
    paths = draw_paths(D, E, 2, 4)
    y = native.path_forward(x, paths, "gelu")[0]
    assert y[17].isnan().all()
    assert not y[others].isnan().any()


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_leaf_out_of_range_raises(wrong: int) -> None:
    """A leaf outside 0..L-1 is a ValueError in every function, not a crash."""
    x, leaf, leaves = draw(5, 8), torch.tensor([0, 1, wrong, 2, 3]), draw_leaves(8, 4, 8, 4)
    pre = draw(5, 4)
    with pytest.raises(ValueError, match="outside"):
        native.leaf_forward(x, leaf, None, leaves, "gelu")
    with pytest.raises(ValueError, match="outside"):
        native.leaf_backward(x, x, leaf, None, pre, leaves, "gelu")
    with pytest.raises(ValueError, match="outside"):
        native.leaf_jvp(LeafTangents(x=x), x, leaf, None, pre, leaves, "gelu")


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("T", [0, 1, 3, 50])
@pytest.mark.parametrize("L", [1, 2, 8])
def test_leaf_infer_is_route_and_forward(L: int, T: int, dtype: torch.dtype) -> None:
    """One call gives the bits of two, and the routes are those of dense logits."""
    D, H, E = 80, 24, 33
    x, leaves = draw(T, D, dtype=dtype), draw_leaves(D, H, E, L, dtype)
    weight, bias = draw(L - 1, D, dtype=dtype), draw(L - 1, dtype=dtype)
    leaf = native.route_tokens(x, weight, bias)
    assert torch.equal(leaf, leaf_of(x.double() @ weight.double().T + bias.double()))
    y = leaf_infer(x, weight, bias, leaves, "gelu")
    assert torch.equal(y, native.leaf_forward(x, leaf, None, leaves, "gelu")[0])
    assert torch.equal(y, leaf_infer(x.T.contiguous().T, weight, bias, leaves, "gelu"))


def test_ties_and_nan_go_left() -> None:
    """z = 0 and z = NaN take the left child, in both variants."""
    x = torch.tensor([[0.0, 0.0], [torch.nan, 0.0], [1.0, 0.0]])
    weight, bias = torch.tensor([[1.0, 0.0]] * 3), torch.zeros(3)
    assert native.route_tokens(x, weight, bias).tolist() == [0, 0, 3]
    paths = Paths(weight[None], bias[None], torch.ones(1, 3, 2), torch.zeros(2))
    assert native.path_forward(x, paths, "relu")[2].flatten(1).tolist() == [[0, 1], [0, 1], [0, 2]]


def test_wrong_arguments_raise() -> None:
    """What does not fit is named, also in the functions that check least."""
    x, leaves, paths = draw(2, 8), draw_leaves(8, 4, 8, 4), draw_paths(8, 8, 1, 2)
    weight, bias = draw(3, 8), draw(3)
    with pytest.raises(ValueError, match="w1 has shape"):
        leaf_infer(draw(2, 9), weight, bias, leaves, "gelu")
    with pytest.raises(ValueError, match="node weight"):
        leaf_infer(x, draw(3, 9), bias, leaves, "gelu")
    with pytest.raises(ValueError, match="bfloat16"):
        leaf_infer(x.to(BF16), weight, bias, leaves, "gelu")
    with pytest.raises(ValueError, match="activation"):
        path_infer(x, paths, "tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="w1 has shape"):
        path_infer(draw(2, 9), paths, "gelu")
    doubles = Paths(*(t.double() for t in (paths.w1, paths.b1, paths.w2, paths.b2)))
    with pytest.raises(ValueError, match="float64"):
        path_infer(x.double(), doubles, "gelu")


# ---- paths ----


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", PATHS)
@pytest.mark.parametrize("T", TOKENS)
def test_path_agrees(T: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Output, `pre`, nodes and every gradient are plain's; inference gives the bits of `path_forward`."""
    D, E, _, _ = shape
    x, paths = draw(T, D, dtype=dtype), draw_paths(*shape, dtype)
    (y, pre, node), (y_plain, pre_plain, node_plain) = (k.path_forward(x, paths, "gelu") for k in (native, plain))
    assert torch.equal(node, node_plain)
    assert_close(y, y_plain)
    assert_close(pre, pre_plain)
    assert torch.equal(path_infer(x, paths, "gelu"), y)
    grad = draw(T, E, dtype=dtype, seed=2)
    got, expected = (k.path_backward(grad, x, pre_plain, node_plain, paths, "gelu") for k in (native, plain))
    assert_close(got[0], expected[0])
    assert_all_close(got[1], expected[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("given", subsets(5))
def test_path_jvp_agrees(given: int, activation: Activation) -> None:
    """Any set of tangents gives plain's derivative, for every activation."""
    x, paths, along = draw(20, 40), draw_paths(40, 33, 2, 4), draw_paths(40, 33, 2, 4, seed=9)
    t = (draw(20, 40, seed=3), along.w1, along.b1, along.w2, along.b2)
    tangents = PathTangents(*(tensor if given >> bit & 1 else None for bit, tensor in enumerate(t)))
    _, pre, node = plain.path_forward(x, paths, activation)
    assert_close(*(k.path_jvp(tangents, x, pre, node, paths, activation) for k in (native, plain)))


def test_path_bits_do_not_depend_on_threads() -> None:
    """One thread and two give the same bits; nodes that nobody passed have exactly zero gradient."""
    D, E, T = 200, 210, 300
    x, paths, grad = draw(T, D), draw_paths(D, E, 1, 8), draw(T, E)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        y, pre, node = native.path_forward(x, paths, "gelu")
        dx, d = native.path_backward(grad, x, pre, node, paths, "gelu")
        dy = native.path_jvp(PathTangents(x, paths.w1), x, pre, node, paths, "gelu")
        return [y, pre, dx, d.w1, d.b1, d.w2, d.b2, dy, node]

    one = run(1)
    assert all(map(torch.equal, one, run(2)))
    unused = torch.ones(255, dtype=torch.bool)
    unused[one[-1].flatten()] = False
    assert unused.any()
    assert not any(d[0, unused].any() for d in one[3:6])


@pytest.mark.parametrize("wrong", [-1, 7])
def test_path_node_out_of_range_raises(wrong: int) -> None:
    """A node outside its tree is a ValueError, not a crash."""
    x, paths = draw(4, 8), draw_paths(8, 8, 1, 3)
    _, pre, node = native.path_forward(x, paths, "gelu")
    node[2, 0, 1] = wrong
    with pytest.raises(ValueError, match="outside"):
        native.path_backward(x, x, pre, node, paths, "gelu")
    with pytest.raises(ValueError, match="outside"):
        native.path_jvp(PathTangents(x=x), x, pre, node, paths, "gelu")


def test_supports_says_what_fits() -> None:
    """fp32 and bf16 on the CPU; fp64 and half are others' work."""
    assert native.supports(torch.zeros(1))
    assert native.supports(torch.zeros(1, dtype=BF16))
    assert not native.supports(torch.zeros(1, dtype=torch.float64))
    assert not native.supports(torch.zeros(1, dtype=torch.float16))
    assert not native.supports(torch.zeros(1, device="meta"))
