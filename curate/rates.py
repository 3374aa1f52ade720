"""Short measurements of this machine: JPEG decoding, matrix products, memory and disk. Each takes the time it is given.

The figures are for orientation (a shared machine moves them by a factor of two); torch is imported only where it is
measured.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

JPEG_SIDE = 256  # pixels of the test picture
MATRIX = 768  # rows and columns of the test matrices


def jpeg_rate(decoder: Literal["simplejpeg", "pillow"], *, seconds: float) -> float:
    """Pictures of 256 x 256 pixels decoded per second on one core. Raises ImportError where the decoder is absent."""
    data = _test_jpeg()
    if decoder == "simplejpeg":
        import simplejpeg

        return _rate(lambda: simplejpeg.decode_jpeg(data, colorspace="RGB"), seconds)
    return _rate(lambda: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), seconds)


def matrix_rate(dtype: Literal["float32", "bfloat16"], *, threads: int, seconds: float, device: str = "cpu") -> float:
    """Floating-point operations per second of a square matrix product in torch. The thread count is put back after."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if device != "cpu":
            return _product_rate(getattr(torch, dtype), 8192, seconds, device)
        small = _product_rate(getattr(torch, dtype), MATRIX // 4, seconds / 4, device)
        if 2 * MATRIX**3 / small > seconds:  # a type that the processor only emulates: one large product would overrun
            return small
        return _product_rate(getattr(torch, dtype), MATRIX, seconds, device)
    finally:
        torch.set_num_threads(before)


def _product_rate(kind: torch.dtype, side: int, seconds: float, device: str) -> float:
    import torch

    left_MM, right_MM = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    out_MM = torch.empty(side, side, dtype=kind, device=device)
    settle: Callable[[], Any] = torch.cuda.synchronize if device.startswith("cuda") else _nothing

    def multiply() -> None:
        torch.mm(left_MM, right_MM, out=out_MM)
        settle()

    return 2 * side**3 * _rate(multiply, seconds)


def memory_rate(*, seconds: float, size: int = 64 << 20) -> float:
    """Bytes per second that one core reads and writes while it copies `size` bytes (larger than most caches)."""
    source = np.ones(size, np.uint8)
    target = np.empty_like(source)
    return 2 * size * _rate(lambda: np.copyto(target, source), seconds)


def disk_rate(directory: Path, *, size: int = 64 << 20) -> float:
    """Bytes per second written into a new file of `size` random bytes in `directory` and synced. Removes the file."""
    path = directory / f".curate-doctor.{os.urandom(6).hex()}.tmp"
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    try:
        with open(path, "xb") as file:
            for _ in range(max(1, size // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return max(1, size // len(block)) * len(block) / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def _rate(work: Callable[[], Any], seconds: float) -> float:
    """Calls per second: the median of the calls that fit into `seconds`, after one that is not counted."""
    work()
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while not durations or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return 1.0 / max(float(np.median(durations)), 1e-9)


def _test_jpeg() -> bytes:
    """A picture with slopes, edges and grain, about 20 kB: close to a photograph's cost."""
    ramp = np.linspace(0, 6, JPEG_SIDE)
    wave = np.sin(ramp[:, None] * ramp[None, :])[..., None] * np.array([90.0, 70.0, 50.0]) + 120
    grain = np.random.default_rng(0).normal(0, 9, (JPEG_SIDE, JPEG_SIDE, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(wave + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _nothing() -> None:
    return None
