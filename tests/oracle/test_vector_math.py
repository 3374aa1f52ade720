"""The vector functions of the C++ kernels against fp64, over all magnitudes, and at the ends: NaN, inf, tails."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from curate.kernels import compiled
from curate.kernels.fff import Activation
from curate.kernels.fff.activations import activate, slope

_SOURCE = str(Path(__file__).with_name("vector_math.cpp"))

# Bounds on the error, each about 1.5 times what was measured on AVX2; 2**-24 = 6e-8 is half a unit in the last place.
RELATIVE: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float]] = {
    "exp": (torch.exp, -87.0, 88.7, 2e-7),
    "exp_negative": (torch.exp, -87.3, 0.0, 2e-7),
    "log1p": (torch.log1p, 0.0, 3e38, 2e-7),
    "softplus": (lambda x: torch.logaddexp(x, torch.zeros_like(x)), -87.0, 1e5, 2e-7),
    "sigmoid": (torch.sigmoid, -87.0, 1e3, 2e-7),
    "tanh": (torch.tanh, -50.0, 50.0, 2e-7),
    "erf": (torch.erf, -20.0, 20.0, 2e-7),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = compiled.library(_SOURCE)
    if found is None:
        pytest.skip(f"no native kernels: {compiled.why_not(_SOURCE)}")
    return found


def called(library: ctypes.CDLL, name: str, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    getattr(library, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x)))
    return y


def spread(low: float, high: float) -> Tensor:
    """Evenly spaced numbers, and others evenly spaced in their logarithm on both sides of zero; odd in number."""
    log = torch.logspace(-30, 38, 20_001, dtype=torch.float64)
    x = torch.cat([torch.linspace(low, high, 50_000, dtype=torch.float64), log, -log]).float()
    return x[(x >= low) & (x <= high)]


@pytest.mark.parametrize("name", RELATIVE)
def test_a_function_is_within_its_relative_error(name: str, library: ctypes.CDLL) -> None:
    """Where the result is a normal fp32 number, two ulps off at most."""
    function, low, high, bound = RELATIVE[name]
    x = spread(low, high)
    exact, y = function(x.double()), called(library, f"do_{name}", x).double()
    error = (y - exact).abs() / exact.abs().clamp_min(2.0**-126)
    worst = int(error.argmax())
    assert error[worst] < bound, (x[worst], y[worst], exact[worst])


@pytest.mark.parametrize("activation", get_args(Activation))
def test_an_activation_and_its_slope_are_as_in_torch(activation: Activation, library: ctypes.CDLL) -> None:
    """Within 2e-7 of max(1, |x|), the slope within 3e-7."""
    x = spread(-1e4, 1e4)
    value = called(library, f"do_{activation}", x).double() - activate(x.double(), activation)
    assert (value.abs() / x.double().abs().clamp_min(1)).max() < 2e-7
    slopes = called(library, f"do_{activation}_slope", x).double() - slope(x.double(), activation)
    assert slopes.abs().max() < 3e-7


@pytest.mark.parametrize("name", [*RELATIVE, *get_args(Activation)])
def test_not_a_number_and_infinity_come_through(name: str, library: ctypes.CDLL) -> None:
    """NaN gives NaN in its own lane alone; infinities, zeros and huge numbers give what torch gives."""
    x = torch.tensor([torch.nan, 1.0, torch.inf, -torch.inf, 3e38, -3e38, 0.0, 1e-45, -1e-45, 200.0, -200.0])
    if name == "log1p":
        x = x.abs()
    if name == "exp_negative":
        x = -x.abs()
    y = called(library, f"do_{name}", x)
    expected = RELATIVE[name][0](x) if name in RELATIVE else activate(x, name)  # type: ignore[arg-type]
    torch.testing.assert_close(y, expected, rtol=3e-7, atol=1e-37, equal_nan=True)


def test_overflow_and_denormal_results_of_exp_are_right(library: ctypes.CDLL) -> None:
    """exp is inf above 88.73, denormal below -87.34, zero below -104."""
    x = torch.tensor([88.72, 88.73, 89.5, 1e9, -87.5, -95.0, -103.0, -104.5])
    torch.testing.assert_close(called(library, "do_exp", x), torch.exp(x), rtol=3e-7, atol=1.5e-45)


@pytest.mark.parametrize("count", range(20))
def test_a_part_of_a_vector_is_neither_read_nor_written_past_its_end(count: int, library: ctypes.CDLL) -> None:
    """What lies behind the last element stays as it was, for fp32 and bf16."""
    x = torch.arange(24.0)
    y = torch.full((24,), -1.0)
    library.do_relu(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(count))
    assert y.tolist() == [*range(count), *[-1.0] * (24 - count)]
    half = torch.full((24,), -1.0).bfloat16()
    library.to_bf16(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(half.data_ptr()), ctypes.c_int64(count))
    assert half.tolist() == [*range(count), *[-1.0] * (24 - count)]


def test_every_bf16_and_fp16_number_widens_to_itself(library: ctypes.CDLL) -> None:
    """All 65,536 of each, NaN and denormals included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for name, dtype in (("from_bf16", torch.bfloat16), ("from_f16", torch.float16)):
        x = bits.view(dtype)
        torch.testing.assert_close(called(library, name, x), x.float(), rtol=0, atol=0, equal_nan=True)


def test_narrowing_to_bf16_rounds_to_nearest_even(library: ctypes.CDLL) -> None:
    """Bit for bit as torch does it, ties, overflow to inf and denormals included; NaN stays NaN."""
    bits = torch.randint(-(2**31), 2**31 - 1, (100_003,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat([bits, (bits & ~0xFFFF) | 0x8000, torch.tensor([0x7F800001, 0x7F7FFFFF], dtype=torch.int32)])
    x = x.view(torch.float32)
    torch.testing.assert_close(
        called(library, "to_bf16", x, torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True
    )


def test_sums_and_maxima_over_lanes(library: ctypes.CDLL) -> None:
    """Over all lanes of one vector."""
    x, y = torch.arange(library.lanes(), dtype=torch.float32) - 3, torch.empty(2)
    library.sum_and_largest(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    assert y.tolist() == [x.sum(), x.max()]
