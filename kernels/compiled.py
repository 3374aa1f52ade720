"""C++ kernels, compiled on first use and kept: a shared library with a C interface, keyed by everything it depends on.

The key is a hash of the sources, the compiler's version, the flags and the processor's own flags, so a cache that two
kinds of machine share is never read by the wrong one. A library appears under its name only when it is complete, so any
number of processes may build at once. Compiling takes seconds; a plain C interface needs neither torch's headers nor
Python's. Where there is no compiler, or it fails, `library` gives None and `why_not` the reason; callers then use torch
and `curate doctor` says so.

Environment: `CURATE_CACHE` is the folder (else `$XDG_CACHE_HOME/curate` or `~/.cache/curate`), `CXX` the compiler,
`CURATE_NO_COMPILER=1` forbids it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_HERE = Path(__file__).parent
_SECONDS = 300  # a compiler that takes longer than this hangs


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a source: its library, or why there is none; `seconds` is 0.0 when it was there already."""

    name: str
    path: Path | None
    why_not: str | None
    seconds: float
    threaded: bool


def library(source: str) -> ctypes.CDLL | None:
    """The library of a source file below `kernels/`, e.g. "fff/leaf.cpp"; None where it cannot be built."""
    path = build(source).path
    return None if path is None else _loaded(path)


def why_not(source: str) -> str | None:
    """Why `library(source)` is None; None where it is there."""
    return build(source).why_not


@functools.cache
def build(source: str) -> Built:
    """Compile, or find the library that an earlier process compiled; answers the same for the life of a process."""
    name = Path(source).with_suffix("").as_posix().replace("/", "-")
    found = compiler()
    if found is None:
        reason = "CURATE_NO_COMPILER is set" if os.environ.get("CURATE_NO_COMPILER") else "no C++ compiler is on PATH"
        return Built(name, None, reason, 0.0, False)
    failures = []
    for openmp in (True, False):
        try:
            path, seconds = _compile(name, _HERE / source, found, openmp)
            _loaded(path)
            return Built(name, path, None, seconds, openmp)
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(_first_line(error))
    return Built(name, None, f"{found} failed: {failures[-1]}", 0.0, False)


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def compiler() -> str | None:
    """Path of the C++ compiler: `CXX`, else c++, g++ or clang++; None where there is none, or it is forbidden."""
    if os.environ.get("CURATE_NO_COMPILER"):
        return None
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := _which(name))), None
    )


def _which(name: str) -> str | None:
    return shutil.which(name)


def _compile(name: str, source: Path, compiler: str, openmp: bool) -> tuple[Path, float]:
    flags = [*FLAGS, *(_openmp() if openmp else ())]
    folder = cache_folder()
    target = folder / f"{name}-{_key(source, compiler, tuple(flags))}.so"
    if target.exists():
        return target, 0.0
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as work:
        made = Path(work) / target.name
        command = [compiler, str(source), f"-I{_HERE}", "-o", str(made), *flags]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        os.replace(made, target)
    return target, time.perf_counter() - began


def cache_folder() -> Path:
    """Where libraries are kept."""
    given = os.environ.get("CURATE_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "curate"


def _openmp() -> list[str]:
    """Flags for OpenMP, linked to the runtime that torch brings: two runtimes would run two pools of threads."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ["-fopenmp", *(str(path) for path in own[:1])]


def _key(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in (source, *sorted(_HERE.rglob("*.hpp"))):
        digest.update(path.read_bytes())
    for part in (compiler_version(compiler), " ".join(flags), processor(), sys.platform):
        digest.update(part.encode())
    return digest.hexdigest()[:24]


@functools.cache
def compiler_version(compiler: str) -> str:
    """What `compiler --version` prints."""
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout


@functools.cache
def processor() -> str:
    """What -march=native looks at: the processor's flags, or its name where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join(sorted(kept)) or platform.machine()


def _first_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    lines = [line for line in str(text).splitlines() if "error" in line.lower()] or str(text).splitlines()
    return lines[0].strip() if lines else type(error).__name__
