"""Which kernel computes a layer: by the tensor's device first, then by what was measured here, then by a plain rule.

The rule: on a GPU Triton where it can run; on a CPU C++ where it was compiled, and torch's own products where the
processor multiplies half precision itself (AMX) and every leaf has some rows; otherwise torch. `crossovers.calibrate`
measures the kernels for a shape and writes down which won at how many tokens, the dense evaluation (`masked`) among
them, so no layer is knowingly slower than the dense one. To choose by hand: `kernel=` of a layer, `use("grouped")`, or
CURATE_FFF_KERNEL in the environment.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from curate.kernels.fff import Activation, LeafKernel, Leaves, PathKernel, Paths, crossovers

if TYPE_CHECKING:
    from curate.kernels.fff.native import Inference

NAMES = ("plain", "grouped", "masked", "native", "on_gpu")
_ROWS_PER_LEAF = 16  # rows of one AMX tile: with fewer, its units wait for memory
_ENVIRONMENT = os.environ.get("CURATE_FFF_KERNEL", "")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Every layer whose kernel is "auto" uses this one; "auto" gives the choice back. ValueError for another name."""
    _known(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def leaf_kernel(x_TD: Tensor, leaves: Leaves, name: str = "auto") -> LeafKernel:
    """The kernel of the leaf variant for this call."""
    return cast(LeafKernel, _module(leaf_choice(x_TD, leaves, name)))


def path_kernel(x_TD: Tensor, name: str = "auto") -> PathKernel:
    """The kernel of the path variant for this call: torch's is the plain one."""
    chosen = _asked(name)
    if chosen in ("auto", "grouped", "masked"):
        chosen = _quickest(x_TD) or "plain"
    return cast(PathKernel, _module(chosen))


def leaf_choice(x_TD: Tensor, leaves: Leaves, name: str = "auto") -> str:
    """The name of the kernel that `leaf_kernel` gives."""
    chosen = _asked(name)
    if chosen != "auto":
        return chosen
    L, D, H = leaves.w1.shape
    measured = crossovers.look_up(crossovers.Shape(D, L, H, str(x_TD.dtype)[6:], x_TD.device.type), len(x_TD))
    quickest = _quickest(x_TD)
    if measured is not None and (measured != "native" or quickest == "native"):
        return measured
    if quickest == "native" and _matrix_unit(x_TD.dtype) and len(x_TD) >= _ROWS_PER_LEAF * L:
        return "grouped"
    return quickest or "grouped"


def leaf_inference(
    x_TD: Tensor,
    node_weight_ND: Tensor,
    node_bias_N: Tensor,
    leaves: Leaves,
    activation: Activation,
    name: str = "auto",
) -> Inference | None:
    """One C++ call that routes and computes, where that is the choice; for when nobody asks for a derivative."""
    if leaf_choice(x_TD, leaves, name) != "native":
        return None
    made: Inference = _native().leaf_inference(x_TD, node_weight_ND, node_bias_N, leaves, activation)
    return made


def routes(x_TD: Tensor, name: str = "auto") -> bool:
    """Do tokens descend the tree in C++, each by itself, whatever kernel computes the leaves?"""
    return _asked(name) != "plain" and _quickest(x_TD) == "native"


def path_inference(x_TD: Tensor, paths: Paths, activation: Activation, name: str = "auto") -> Inference | None:
    """The same for the path variant."""
    if _asked(name) not in ("auto", "native") or _quickest(x_TD) != "native":
        return None
    made: Inference = _native().path_inference(x_TD, paths, activation)
    return made


def unforced(name: str) -> bool:
    """Is the choice of kernel left to a layer that asks for `name`, as it was when its inference was prepared?"""
    return _forced.get() is None and not _ENVIRONMENT and name in ("auto", "native")


def route_tokens(x_TD: Tensor, node_weight_ND: Tensor, node_bias_N: Tensor) -> Tensor:
    """Leaves [T] of tokens that descend one by one; only where `routes`."""
    leaf_T: Tensor = _native().route_tokens(x_TD, node_weight_ND, node_bias_N)
    return leaf_T


def _quickest(x_TD: Tensor) -> str | None:
    """The fast kernel of the tensor's device, or None. The device comes first: Triton raises where there is no GPU."""
    if x_TD.device.type == "cpu":
        if _native().supports(x_TD):
            return "native"
        if x_TD.dtype in (torch.float32, torch.bfloat16):
            _announce(_native().why_not())
        return None
    return "on_gpu" if _module("on_gpu").supports(x_TD) else None


@functools.cache
def _announce(why_not: str | None) -> None:
    warnings.warn(
        f"fast feedforward layers run on torch's own products, several times slower than in C++: {why_not}",
        RuntimeWarning,
        stacklevel=2,
    )


def _matrix_unit(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and bool(torch.cpu._is_amx_tile_supported())


def _asked(name: str) -> str:
    if name == "auto":
        name = _forced.get() or _ENVIRONMENT or "auto"
    return name if name in NAMES else _known(name)


def _known(name: str) -> str:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"kernel {name!r} is none of auto, {', '.join(NAMES)}")
    return name


_modules: dict[str, ModuleType] = {}


def _module(name: str) -> Any:
    if name not in _modules:
        _modules[name] = importlib.import_module(f"curate.kernels.fff.{name}")
    return _modules[name]


def _native() -> Any:
    return _module("native")
