"""The Triton kernels of fast feedforward against the oracle: on a GPU, else under Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU the cases are skipped here and one test runs
this file again in a process that has TRITON_INTERPRET set. It takes milliseconds for what a GPU does in nanoseconds, so
the cases are cut to a few tokens, and the constants that choose tiles are set for so few.
"""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from curate.kernels import gpu
from curate.kernels.fff import Activation, LeafTangents, Leaves, on_gpu, on_gpu_layout, on_gpu_path, plain
from curate.kernels.fff.functions import leaf_mlp
from tests.oracle.fff_cases import TOLERANCE, leaf_case, leaf_errors, path_case, path_errors, relative_error
from tests.oracle.interpreted import passes_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = gpu.usable(torch.zeros(1, device=DEVICE))
runs_here = pytest.mark.skipif(not HERE, reason="no GPU: run in a process of its own, under Triton's interpreter")


@pytest.mark.skipif(HERE, reason="the cases run in this process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_cases_hold_under_the_interpreter() -> None:
    """Every case of this file passes, and none is skipped, where Triton interprets."""
    passes_interpreted(__file__)


def test_unsupported_tensors_are_named() -> None:
    """fp64 has no kernel; without a GPU and without the interpreter nothing has, and asking imports no Triton."""
    assert not on_gpu.supports(torch.zeros(1, dtype=torch.float64, device=DEVICE))
    assert on_gpu.supports(torch.zeros(1, device=DEVICE)) == HERE


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sort however few the tokens are, and take tiles as large as a leaf's tokens fill."""
    monkeypatch.setattr(on_gpu, "FEW", 0)
    monkeypatch.setattr(on_gpu_layout, "_WANTED_PROGRAMS", 1)


def on_device(value: Any) -> Any:
    """A case with its tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if value is None:
        return None
    return type(value)(*(on_device(getattr(value, field.name)) for field in fields(value)))


def shortened(case: Any, T: int) -> Any:
    """A case of the first T tokens."""
    tangents = replace(case.tangents, x=case.tangents.x[:T])
    if not hasattr(case, "leaf"):
        return replace(case, x=case.x[:T], grad=case.grad[:T], tangents=tangents)
    gate, dgate = (None if each is None else each[:T] for each in (case.gate, case.tangents.gate))
    tangents = replace(tangents, gate=dgate)
    return replace(case, x=case.x[:T], leaf=case.leaf[:T], gate=gate, grad=case.grad[:T], tangents=tangents)


def check_leaf(case: Any, activation: Activation = "gelu") -> None:
    errors = leaf_errors(on_gpu, on_device(case), activation)
    assert max(errors.values()) < TOLERANCE[case.x.dtype], errors


@runs_here
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(torch.bfloat16, "gelu"), (torch.float16, "gelu")]
    + [(torch.float32, name) for name in ("gelu", "gelu_tanh", "quick_gelu", "relu")],
    ids=str,
)
@pytest.mark.usefixtures("large_tiles")
def test_every_dtype_and_activation(dtype: torch.dtype, activation: Activation) -> None:
    """Forward, backward and jvp; widths are no multiples of a block, tokens are sorted, one leaf is empty."""
    check_leaf(leaf_case("odd", dtype), activation)


@runs_here
@pytest.mark.usefixtures("large_tiles")
def test_full_tiles() -> None:
    """More tokens of a leaf than a tile has rows, and no gate."""
    check_leaf(shortened(leaf_case("many", torch.float32, gated=False), 150))


@runs_here
@pytest.mark.parametrize("shape", ["one-neuron", "one-token", "none"])
def test_few_tokens(shape: str) -> None:
    """Few tokens are tiles of their own; a single neuron, a single token, no token."""
    check_leaf(shortened(leaf_case(shape, torch.float32), 5))


@runs_here
@pytest.mark.usefixtures("large_tiles")
def test_all_tokens_to_one_leaf() -> None:
    """One full leaf and seven empty ones; the empty ones have gradients of exactly zero."""
    case = on_device(leaf_case("usual", torch.float32, only_leaf=5))
    check_leaf(case)
    pre = on_gpu.leaf_forward(case.x, case.leaf, case.gate, case.leaves, "gelu")[1]
    summed = on_gpu.leaf_backward(case.grad, case.x, case.leaf, case.gate, pre, case.leaves, "gelu")[2]
    for field in fields(Leaves):
        assert torch.count_nonzero(getattr(summed, field.name)[[0, 1, 2, 3, 4, 6, 7]]) == 0


@runs_here
@pytest.mark.parametrize("few", [0, 64])
def test_nan_stays_in_its_token(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN in one token changes no bit of another's output or gradient, and of the weights only its own leaf's."""
    monkeypatch.setattr(on_gpu, "FEW", few)
    case = on_device(shortened(leaf_case("odd", torch.float32), 9))
    x = case.x.clone()
    x[7, 3] = torch.nan
    others = torch.arange(len(x), device=DEVICE) != 7
    results = []
    for given in (case.x, x):
        y, pre = on_gpu.leaf_forward(given, case.leaf, case.gate, case.leaves, "gelu")
        results.append((y, *on_gpu.leaf_backward(case.grad, given, case.leaf, case.gate, pre, case.leaves, "gelu")))
    (y, dx, dgate, summed), (y_nan, dx_nan, dgate_nan, summed_nan) = results
    assert y_nan[7].isnan().all()
    for one, other in ((y, y_nan), (dx, dx_nan), (dgate, dgate_nan)):
        assert torch.equal(one[others], other[others])
    untouched = torch.arange(4, device=DEVICE) != case.leaf[7]
    for field in fields(Leaves):
        assert torch.equal(getattr(summed, field.name)[untouched], getattr(summed_nan, field.name)[untouched])


@runs_here
def test_strides_do_not_matter() -> None:
    """Transposed, sliced and expanded inputs give what their contiguous copies give."""
    case = shortened(leaf_case("one-neuron", torch.float32, gated=False), 5)
    w1 = case.leaves.w1.transpose(1, 2).contiguous().transpose(1, 2)
    grad = torch.zeros(len(case.x), 14)[:, ::2].copy_(case.grad)
    check_leaf(replace(case, x=case.x[:1].expand(len(case.x), -1), leaves=replace(case.leaves, w1=w1), grad=grad))


@runs_here
@pytest.mark.parametrize("names", [("x",), ("gate",), ("w1", "b2"), ("b1",), ("w2",), ()], ids="+".join)
def test_any_choice_of_tangents(names: tuple[str, ...]) -> None:
    """A tangent that is None counts as zero, each alone and none at all."""
    case = on_device(shortened(leaf_case("one-neuron", torch.float32), 6))
    tangents = LeafTangents(**{name: getattr(case.tangents, name) for name in names})
    pre = plain.leaf_forward(case.x, case.leaf, case.gate, case.leaves, "gelu")[1]
    rest = (case.x, case.leaf, case.gate, pre, case.leaves, "gelu")
    wanted = plain.leaf_jvp(tangents, *rest)
    found = on_gpu.leaf_jvp(tangents, *rest)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@runs_here
@pytest.mark.parametrize("few", [0, 64])
def test_leaves_that_are_none_touch_nothing(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index outside 0..L-1 leaves the other tokens as they were, and reads no weight beyond the last."""
    monkeypatch.setattr(on_gpu, "FEW", few)
    case = on_device(shortened(leaf_case("one-neuron", torch.float32), 6))
    leaf = case.leaf.clone()
    leaf[2], leaf[5] = 16, -1
    kept = torch.tensor([t for t in range(len(leaf)) if t not in (2, 5)], device=DEVICE)
    right, wrong = (on_gpu.leaf_forward(case.x, each, case.gate, case.leaves, "gelu")[0] for each in (case.leaf, leaf))
    assert torch.equal(right[kept], wrong[kept])


@runs_here
def test_autograd_in_both_modes() -> None:
    """torch.func.jvp and grad through the kernels give the oracle's numbers."""
    case = on_device(shortened(leaf_case("one-neuron", torch.float32), 6))
    inputs = (case.x, case.gate, *(getattr(case.leaves, f.name) for f in fields(Leaves)))
    directions = tuple(getattr(case.tangents, f.name) for f in fields(LeafTangents))

    def answers(kernel: Any) -> list[torch.Tensor]:
        def function(x: torch.Tensor, gate: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            return leaf_mlp(x, case.leaf, gate, Leaves(*weights), "gelu", kernel)

        forward = torch.func.jvp(function, inputs, directions)[1]
        scalar = lambda *v: (function(*v) * case.grad).sum()  # noqa: E731
        return [forward, *torch.func.grad(scalar, argnums=tuple(range(6)))(*inputs)]

    for found, wanted in zip(answers(on_gpu), answers(plain), strict=True):
        assert relative_error(found, wanted) < TOLERANCE[torch.float32]


@runs_here
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("odd", torch.float32), ("odd", torch.float16), ("one-node", torch.float32), ("none", torch.float32)],
    ids=str,
)
def test_paths(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and jvp of the path variant; the tokens of a node are summed over several spans."""
    monkeypatch.setattr(on_gpu_path, "_SPAN", 4)
    errors = path_errors(on_gpu, on_device(shortened(path_case(shape, dtype), 7)), "gelu")
    assert max(errors.values()) < TOLERANCE[dtype], errors


@runs_here
@pytest.mark.parametrize("z", [0.0, float("nan")])
def test_paths_turn_left_at_ties_and_nan(z: float) -> None:
    """A node value of exactly zero goes left, and so does NaN."""
    case = on_device(path_case("one-token", torch.float32))
    trees = replace(case.paths, w1=torch.zeros_like(case.paths.w1), b1=torch.full_like(case.paths.b1, z))
    assert on_gpu.path_forward(case.x, trees, "gelu")[2].flatten().tolist() == [0, 1, 3, 7, 15, 31, 63]
