"""The conditions that a figure was measured under, printed beside it by every benchmark."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "open_clip_torch", "webdataset", "dask", "pyarrow", "simplejpeg", "numpy")


def conditions() -> str:
    """One line: processor, cores, load, versions."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = f"Python {platform.python_version()}"
    return f"{_processor()}, {cores} cores, load {os.getloadavg()[0]:.1f}, {python}, {versions}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        best = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "")
        return f"{name} ({best})"
    return platform.processor() or platform.machine()
