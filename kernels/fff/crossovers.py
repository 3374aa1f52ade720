"""From how many tokens on which kernel is the quickest, measured here and written down.

A calibration is a file in the cache folder, keyed by processor, threads, shape and dtype. Without one the rule of
`dispatch` holds, so that results do not depend on what else was run on a machine; with one, other kernels may round
otherwise. Measuring a shape takes a few seconds.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from curate.kernels.compiled import cache_folder, processor
from curate.kernels.fff import Leaves
from curate.kernels.fff.activations import activate

# T tokens, D width, L leaves, H neurons of a leaf
LADDER = (1, 4, 16, 64, 256, 1024, 4096)
_ROUNDS = 5
_CHUNK = 256  # tokens whose hidden values stay in a core's cache
_PATIENCE = 0.25  # seconds: a candidate that needs longer for one call is measured once


@dataclass(frozen=True, slots=True)
class Shape:
    """What a crossover depends on: D, L, H, the dtype ("float32") and the device type ("cpu")."""

    width: int
    leaves: int
    leaf_width: int
    dtype: str
    device: str

    @property
    def key(self) -> str:
        threads = torch.get_num_threads()
        return f"{self.width}-{self.leaves}x{self.leaf_width}-{self.dtype}-{self.device}-{threads}"


@dataclass(frozen=True, slots=True)
class Rung:
    """Median seconds of a forward pass at T tokens: of every kernel by name, and of the dense layer of equal width."""

    tokens: int
    seconds: dict[str, float]
    dense: float

    @property
    def best(self) -> str:
        return min(self.seconds, key=lambda name: self.seconds[name])


def measure(shape: Shape, tokens: tuple[int, ...] = LADDER) -> list[Rung]:
    """Time the kernels that can run here against the best dense layer (plain, or in chunks of tokens), in turn."""
    dtype, generator = getattr(torch, shape.dtype), torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        drawn = torch.randn(sizes, generator=generator) / sizes[-1] ** 0.5
        moved: Tensor = drawn.to(device=shape.device, dtype=dtype)
        return moved

    L, D, H = shape.leaves, shape.width, shape.leaf_width
    leaves = Leaves(draw(L, D, H), draw(L, H), draw(L, H, D), draw(L, D))
    inward, outward = draw(L * H, D), draw(D, L * H)
    rungs = []
    with torch.inference_mode():
        for T in tokens:
            x_TD = draw(T, D)
            leaf_T = torch.randint(L, (T,), generator=generator).to(shape.device)
            sides: dict[str, Callable[[], object]] = {
                name: functools.partial(kernel.leaf_forward, x_TD, leaf_T, None, leaves, "gelu")
                for name, kernel in _able(x_TD).items()
            }
            sides["dense"] = functools.partial(_dense, x_TD, inward, outward, len(x_TD) or 1)
            sides["dense in chunks"] = functools.partial(_dense, x_TD, inward, outward, _CHUNK)
            found = timed_in_turn(sides, shape.device)
            dense = min(found.pop("dense"), found.pop("dense in chunks"))
            rungs.append(Rung(T, found, dense))
    return rungs


def calibrate(shape: Shape) -> list[Rung]:
    """Measure a shape and write down which kernel won where; `dispatch` follows it from now on."""
    rungs = measure(shape)
    path = _path()
    known = _read(path) | {shape.key: [(rung.tokens, rung.best) for rung in rungs]}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(known, indent=1), encoding="utf-8")
    os.replace(fresh, path)
    _table.cache_clear()
    return rungs


def look_up(shape: Shape, tokens: int) -> str | None:
    """The kernel that won at the largest measured number of tokens up to this one; None for a shape not calibrated."""
    table = _table()
    if not table:
        return None
    rungs = table.get(shape.key, [])
    return next((name for least, name in reversed(rungs) if least <= tokens), None)


def timed_in_turn(sides: dict[str, Callable[[], object]], device: str = "cpu") -> dict[str, float]:
    """Median seconds of each side, called in turn so that a busy moment meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(1 + _ROUNDS):  # the first call warms caches, and is kept only where one call takes long
        for name, call in sides.items():
            if round_ and seconds[name][0] > _PATIENCE:
                continue
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:] or found) for name, found in seconds.items()}


def _able(x_TD: Tensor) -> dict[str, Any]:
    names = ("grouped", "masked", "native", "on_gpu")
    modules = {name: importlib.import_module(f"curate.kernels.fff.{name}") for name in names}
    return {
        name: module for name, module in modules.items() if not hasattr(module, "supports") or module.supports(x_TD)
    }


def _dense(x_TD: Tensor, inward: Tensor, outward: Tensor, chunk: int) -> list[Tensor]:
    return [linear(activate(linear(part, inward), "gelu"), outward) for part in x_TD.split(chunk)]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _path() -> Path:
    machine = hashlib.sha256(f"{processor()} {torch.__version__}".encode()).hexdigest()[:16]
    return cache_folder() / f"fff-crossovers-{machine}.json"


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, list[tuple[int, str]]]:
    return _read(_path())


def _read(path: Path) -> dict[str, list[tuple[int, str]]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
