"""Which kernel a fast feedforward call gets: by device, by what was measured, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from curate.kernels.fff import Leaves, crossovers, dispatch, native
from curate.kernels.fff.crossovers import Shape

needs_cpp = pytest.mark.skipif(not native.supports(torch.zeros(1)), reason="no C++ kernels: no compiler here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations of this machine's user stay out of the tests."""
    monkeypatch.setattr(crossovers, "_path", lambda: tmp_path / "crossovers.json")
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", "")
    crossovers._table.cache_clear()


def leaves(depth: int = 2, width: int = 16, leaf_width: int = 4, dtype: torch.dtype = torch.float32) -> Leaves:
    L = 2**depth
    sizes = ((L, width, leaf_width), (L, leaf_width), (L, leaf_width, width), (L, width))
    return Leaves(*(torch.zeros(size, dtype=dtype) for size in sizes))


@needs_cpp
def test_the_rule_takes_cpp_for_what_it_supports() -> None:
    """fp32 and bf16 on the CPU go to C++, fp64 to torch."""
    assert dispatch.leaf_choice(torch.zeros(3, 16), leaves()) == "native"
    double = leaves(dtype=torch.float64)
    assert dispatch.leaf_choice(torch.zeros(3, 16, dtype=torch.float64), double) == "grouped"


def test_a_choice_by_hand_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's own kernel beats `use`, which beats the environment, which beats the rule."""
    x, own = torch.zeros(3, 16), leaves()
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", "masked")
    assert dispatch.leaf_choice(x, own) == "masked"
    with dispatch.use("grouped"):
        assert dispatch.leaf_choice(x, own) == "grouped"
        assert dispatch.leaf_choice(x, own, "plain") == "plain"
    assert dispatch.leaf_choice(x, own) == "masked"
    for wrong in ("", "cuda"):
        with pytest.raises(ValueError, match="none of auto, plain"):
            dispatch.leaf_choice(x, own, wrong)
    with pytest.raises(ValueError, match="'fast'"), dispatch.use("fast"):
        pass


def test_measurements_are_followed_from_their_number_of_tokens_on() -> None:
    """A calibrated shape takes the kernel that won at the largest measured size up to the call's."""
    shape = Shape(16, 4, 4, "float32", "cpu")
    crossovers._path().write_text(f'{{"{shape.key}": [[1, "masked"], [64, "grouped"]]}}')
    found = [dispatch.leaf_choice(torch.zeros(count, 16), leaves()) for count in (1, 63, 64, 1000)]
    assert found == ["masked", "masked", "grouped", "grouped"]
    assert dispatch.leaf_choice(torch.zeros(1, 16), leaves(depth=3)) in ("native", "grouped")


def test_a_damaged_calibration_is_no_calibration() -> None:
    """Rubbish in the file leaves the rule in charge."""
    for rubbish in ("{", "[]", '{"a": 1}'):
        crossovers._path().write_text(rubbish)
        crossovers._table.cache_clear()
        assert dispatch.leaf_choice(torch.zeros(3, 16), leaves()) in ("native", "grouped")


def test_calibrating_measures_and_remembers() -> None:
    """Every kernel that can run is timed beside the dense layer, and dispatch takes the winner."""
    rungs = crossovers.measure(Shape(16, 4, 4, "float32", "cpu"), (1, 8))
    assert [rung.tokens for rung in rungs] == [1, 8]
    assert {"grouped", "masked"} <= set(rungs[0].seconds)
    assert all(seconds > 0 for rung in rungs for seconds in (*rung.seconds.values(), rung.dense))
    shape = Shape(8, 2, 4, "float64", "cpu")
    best = [(rung.tokens, rung.best) for rung in crossovers.calibrate(shape)]
    assert all(crossovers.look_up(shape, count) == name for count, name in best)
    assert "native" not in {name for _, name in best}
