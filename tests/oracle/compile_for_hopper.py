"""Compile every Triton kernel that the host code launches for an H200, on a machine that has none; nothing is run.

    python -m tests.oracle.compile_for_hopper

Prints, per kernel: block, registers, bytes of stack (spills), shared memory, and how many instructions of Hopper's
matrix unit. What the interpreter accepts a compiler may still refuse. Uses two inner doors of Triton: the active
driver, which is asked for the target, and `warmup`, which compiles without launching.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from curate.kernels import gpu
from curate.kernels.fff import LeafTangents, Leaves, Paths, PathTangents, on_gpu
from curate.kernels.selection import Side
from curate.kernels.selection.on_gpu import GpuPairs

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Absent:
    """A driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def report(name: str, kernel: Any, arguments: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    block = " ".join(f"{key}={value}" for key, value in arguments.items() if key in ("ACTIVATION", "BM", "BN", "BK"))
    registers, stack = (re.search(rf"{key}:(\d+)", usage) for key in ("REG", "STACK"))
    print(
        f"{name} {block}: {registers and registers[1]} registers, stack {stack and stack[1]}, "
        f"shared {kernel.metadata.shared}, wgmma {kernel.asm['ptx'].count('wgmma.mma_async')}",
        flush=True,
    )


def compile_only() -> None:
    """From here on a launch compiles, once, and reports."""
    compile_and_run, seen = JITFunction.run, set()

    def run(self: Any, *arguments: Any, **named: Any) -> Any:
        kernel = compile_and_run(self, *arguments, **named | {"warmup": True})
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            report(self.__name__, kernel, named)
        return kernel

    driver.set_active(Absent())
    JITFunction.run = run
    gpu.usable = lambda _: True


def leaf(dtype: torch.dtype, T: int, D: int, H: int, L: int) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    x, gate, index = zeros(T, D), zeros(T), torch.zeros(T, dtype=torch.int64)
    w = Leaves(zeros(L, D, H), zeros(L, H), zeros(L, H, D), zeros(L, D))
    y, pre = on_gpu.leaf_forward(x, index, gate, w, "gelu")
    on_gpu.leaf_backward(y, x, index, gate, pre, w, "gelu")
    on_gpu.leaf_jvp(LeafTangents(x, gate, w.w1, w.b1, w.w2, w.b2), x, index, gate, pre, w, "gelu")


def path(dtype: torch.dtype, T: int, D: int, K: int, P: int) -> None:
    N = 2**P - 1
    w = Paths(*(torch.zeros(shape, dtype=dtype) for shape in ((K, N, D), (K, N), (K, N, D), (D,))))
    x = torch.zeros(T, D, dtype=dtype)
    y, pre, node = on_gpu.path_forward(x, w, "gelu")
    on_gpu.path_backward(y, x, pre, node.zero_(), w, "gelu")
    on_gpu.path_jvp(PathTangents(x, w.w1, w.b1, w.w2, w.b2), x, pre, node, w, "gelu")


def main() -> None:
    compile_only()
    leaf(torch.bfloat16, 12800, 768, 96, 32)
    leaf(torch.float32, 300, 80, 24, 4)
    path(torch.bfloat16, 64, 768, 1, 11)
    for loss in ("sigmoid", "softmax"):
        rows = torch.zeros(20000, 768, dtype=torch.bfloat16)
        GpuPairs([Side(rows, rows, 50.0, -8.0, 1.0)], loss, torch.arange(20000)).update(torch.arange(256))
    print("compiled")


if __name__ == "__main__":
    main()
