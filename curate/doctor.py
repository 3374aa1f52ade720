"""`curate doctor`: what this machine has, how fast it is, what falls back to what, and what each fallback costs here.

Every probe is isolated: what is absent or fails becomes a line with its reason, never an exception. About four seconds,
most of them the import of torch and the measurements.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from curate import machine, rates

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

PACKAGES: Final = (  # import name, distribution, whether curate runs without it
    ("curate", "curate-multimodal", False),
    ("torch", "torch", False),
    ("open_clip", "open_clip_torch", False),
    ("webdataset", "webdataset", False),
    ("dask", "dask", False),
    ("distributed", "distributed", False),
    ("pyarrow", "pyarrow", False),
    ("faiss", "faiss-cpu", False),
    ("numpy", "numpy", False),
    ("pillow", "pillow", False),
    ("simplejpeg", "simplejpeg", True),
    ("triton", "triton", True),
)
VIT_B_32_FLOPS: Final = 14.78e9  # forward of one pair at 77 tokens, open_clip's model profile
_PROBES: Final = 7  # measurements that share the time


@dataclass(frozen=True, slots=True)
class Version:
    """An installed package, or None where it is absent."""

    name: str
    version: str | None
    optional: bool


@dataclass(frozen=True, slots=True)
class Fact:
    """A line about the machine."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Rate:
    """A measured rate; None with the reason in `note` where it could not be measured."""

    name: str
    value: float | None
    unit: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fallback:
    """What does a job here. `state`: "full" (the fast path), "fallback" or "missing" (curate cannot run)."""

    job: str
    state: str
    here: str
    cost: str


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything that `curate doctor` found."""

    versions: tuple[Version, ...]
    facts: tuple[Fact, ...]
    rates: tuple[Rate, ...]
    fallbacks: tuple[Fallback, ...]
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether everything that curate cannot do without is there."""
        return all(fallback.state != "missing" for fallback in self.fallbacks)

    def as_json(self) -> dict[str, Any]:
        """The examination as plain JSON values."""
        return {"schema": 1, "healthy": self.healthy, **asdict(self)}


@dataclass(frozen=True, slots=True)
class _Accelerator:
    name: str  # "" where there is none
    device: str
    memory: int | None = None
    bf16: bool = False


def examine(*, seconds: float = 2.0, directory: Path | None = None) -> Examination:
    """Examine the machine. `seconds` is shared by the measurements; `directory` adds its disk's write rate."""
    start = time.perf_counter()
    versions = tuple(Version(name, _version(package), optional) for name, package, optional in PACKAGES)
    limits = machine.cgroup_limits()
    cores = machine.cores(limits)
    accelerator, why = _attempt(_find_accelerator)
    compiler, _ = _attempt(_find_compiler)
    measured = tuple(_measure(cores.usable, accelerator, max(0.02, seconds / _PROBES), directory))
    facts = tuple(_facts(cores, machine.memory(limits), accelerator, why, compiler))
    fallbacks = tuple(_fallbacks(versions, {rate.name: rate for rate in measured}, accelerator, cores, compiler))
    return Examination(versions, facts, measured, fallbacks, time.perf_counter() - start)


def _attempt(probe: Callable[[], T]) -> tuple[T | None, str]:
    """(result, "") or (None, why not). A broken installation may raise anything, so anything is caught."""
    try:
        return probe(), ""
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:160]}".removesuffix(": ")


def _version(package: str) -> str | None:
    return _attempt(lambda: importlib.metadata.version(package))[0]


def _find_accelerator() -> _Accelerator:
    import torch

    if torch.cuda.is_available():
        seen = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        name = seen.name if count == 1 else f"{count} x {seen.name}"
        return _Accelerator(name, "cuda", int(seen.total_memory), torch.cuda.is_bf16_supported())
    if torch.backends.mps.is_available():
        return _Accelerator("Apple GPU (Metal)", "mps", None, True)
    return _Accelerator("", "cpu")


def _find_compiler() -> str:
    """Name and first version line of the C++ compiler; raises LookupError where there is none."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(name.split()[0])
        if path is not None:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, check=True)
            return done.stdout.splitlines()[0].strip()
    raise LookupError("no c++, g++ or clang++ on the PATH")


def _measure(threads: int, accelerator: _Accelerator | None, each: float, directory: Path | None) -> list[Rate]:
    """Run the measurements."""
    jpeg = "JPEG decoding, simplejpeg", "JPEG decoding, Pillow"
    found = [
        _rate(jpeg[0], "pictures/s a core", 1, lambda: rates.jpeg_rate("simplejpeg", seconds=each), "256 x 256"),
        _rate(jpeg[1], "pictures/s a core", 1, lambda: rates.jpeg_rate("pillow", seconds=each), "256 x 256"),
    ]
    for dtype, label in (("float32", "fp32"), ("bfloat16", "bf16")):
        for count in sorted({1, threads}):
            name = f"matrix product, {label}, {count} core{'s' * (count > 1)}"
            found.append(_rate(name, "GFLOP/s", 1e9, lambda d=dtype, n=count: rates.matrix_rate(d, threads=n, seconds=each)))
    found.append(_rate("memory copy, 1 core", "GB/s", 1e9, lambda: rates.memory_rate(seconds=each), "read and written"))
    if accelerator is not None and accelerator.device == "cuda":
        for dtype, label in (("float32", "fp32"), ("bfloat16", "bf16")):
            work = lambda d=dtype: rates.matrix_rate(d, threads=threads, seconds=each, device="cuda")  # noqa: E731
            found.append(_rate(f"matrix product, {label}, GPU", "GFLOP/s", 1e9, work))
    if directory is not None:
        found.append(_rate("disk, written and synced", "MB/s", 1e6, lambda: rates.disk_rate(directory), str(directory)))
    return found


def _rate(name: str, unit: str, scale: float, probe: Callable[[], float], note: str = "") -> Rate:
    value, why = _attempt(probe)
    return Rate(name, None if value is None else round(value / scale, 2), unit, why or note)


def _facts(
    cores: machine.Cores, memory: machine.Memory, accelerator: _Accelerator | None, why: str, compiler: str | None
) -> list[Fact]:
    quota = f", {cores.quota:g} by the cgroup's quota" if cores.quota is not None else ""
    sets = [name for name, present in machine.instruction_sets().items() if present]
    gpu = why or "none"
    if accelerator is not None and accelerator.name:
        size = f", {_gigabytes(accelerator.memory)}" if accelerator.memory else ""
        gpu = f"{accelerator.name}{size}"
    return [
        Fact("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        Fact("python", f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"),
        Fact("processor", f"{machine.processor()}; {', '.join(sets) or 'no vector extensions seen'}"),
        Fact("cores", f"{cores.usable} usable; {cores.machine} in the machine, {cores.affinity} by affinity{quota}"),
        Fact("memory", f"{_gigabytes(memory.total)}, {_gigabytes(memory.available)} free (limit: {memory.limited_by})"),
        Fact("GPU", gpu),
        Fact("C++ compiler", compiler or "none"),
    ]


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def _fallbacks(
    versions: Sequence[Version],
    measured: dict[str, Rate],
    accelerator: _Accelerator | None,
    cores: machine.Cores,
    compiler: str | None,
) -> list[Fallback]:
    absent = [version.name for version in versions if version.version is None and not version.optional]
    rows = [Fallback("required packages", "missing", "absent: " + ", ".join(absent), "install them")] if absent else []
    gpu = accelerator is not None and accelerator.device != "cpu"
    return [
        *rows,
        _decoding(measured),
        _scoring(measured, accelerator, cores) if gpu else _cpu_scoring(measured, cores),
        _precision(measured, accelerator, cores),
        _kernels(accelerator, compiler),
    ]


def _decoding(measured: dict[str, Rate]) -> Fallback:
    fast, slow = (measured[f"JPEG decoding, {name}"].value for name in ("simplejpeg", "Pillow"))
    if fast is not None:
        gain = f"{fast / slow:.1f}x the rate of Pillow (measured here)" if slow else ""
        return Fallback("JPEG decoding", "full", "simplejpeg", gain)
    rate = f"{slow:,.0f} pictures/s a core (measured here); " if slow else ""
    return Fallback("JPEG decoding", "fallback", "Pillow", f"{rate}simplejpeg is usually about twice as fast")


def _cpu_scoring(measured: dict[str, Rate], cores: machine.Cores) -> Fallback:
    rate = _matrix(measured, "fp32", cores)
    if rate is None:
        return Fallback("scoring", "missing", "nothing: torch cannot multiply here", "reinstall torch")
    return Fallback(
        "scoring", "fallback", "CPU (no GPU)", f"ViT-B-32: at most {rate * 1e9 / VIT_B_32_FLOPS:,.1f} pairs/s by the matrix rate"
    )


def _scoring(measured: dict[str, Rate], accelerator: _Accelerator | None, cores: machine.Cores) -> Fallback:
    assert accelerator is not None
    rate = measured.get("matrix product, bf16, GPU")
    figure = ""
    if rate is not None and rate.value is not None:
        figure = f"ViT-B-32: at most {rate.value * 1e9 / VIT_B_32_FLOPS:,.0f} pairs/s by the matrix rate; decoding on " \
                 f"{cores.usable} cores bounds it too"  # fmt: skip
    return Fallback("scoring", "full", accelerator.name, figure)


def _precision(measured: dict[str, Rate], accelerator: _Accelerator | None, cores: machine.Cores) -> Fallback:
    if accelerator is not None and accelerator.device != "cpu":
        state = "full" if accelerator.bf16 else "fallback"
        return Fallback("precision", state, "bf16" if accelerator.bf16 else "fp32: no bf16 in this GPU", "")
    single, half = _matrix(measured, "fp32", cores), _matrix(measured, "bf16", cores)
    ratio = f"bf16 runs at {half / single:.2g}x the rate of fp32 (measured here)" if single and half else "not measured"
    if machine.instruction_sets()["bf16"]:
        return Fallback("precision", "full", "bf16 in hardware", ratio)
    return Fallback("precision", "fallback", "fp32: no bf16 in this processor", ratio)


def _kernels(accelerator: _Accelerator | None, compiler: str | None) -> Fallback:
    triton = importlib.util.find_spec("triton") is not None and accelerator is not None and accelerator.device == "cuda"
    if triton:
        return Fallback("kernels", "full", "torch; Triton can compile", "")
    here = "plain torch" if compiler is None else f"plain torch; {compiler.split()[0]} can compile"
    return Fallback("kernels", "fallback", here, "no Triton without a CUDA GPU; selection is matrix products either way")


def _matrix(measured: dict[str, Rate], label: str, cores: machine.Cores) -> float | None:
    """Matrix rate of all cores in GFLOP/s."""
    rate = measured.get(f"matrix product, {label}, {cores.usable} core{'s' * (cores.usable > 1)}")
    return None if rate is None else rate.value


def render_examination(exam: Examination, console: Console) -> None:
    """Print the examination as three tables and a verdict."""
    from rich.table import Table
    from rich.text import Text

    def table(title: str, *columns: str) -> Table:
        made = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for column in columns:
            made.add_column(column, header_style="dim", overflow="fold")
        return made

    machine_table = table("Machine", "", "")
    for fact in exam.facts:
        machine_table.add_row(fact.name, Text(fact.value))
    packages = ", ".join(f"{v.name} {v.version or 'ABSENT'}" for v in exam.versions)
    machine_table.add_row("packages", Text(packages))
    speed = table("Measured here", "", "rate", "")
    speed.columns[1].justify = "right"
    for rate in exam.rates:
        value = "-" if rate.value is None else f"{rate.value:,.0f} {rate.unit}" if rate.value >= 10 else f"{rate.value:.2g} {rate.unit}"
        speed.add_row(rate.name, value, Text(rate.note, style="dim"))
    paths = table("What does the work", "", "", "here", "cost")
    styles = {"full": "green", "fallback": "yellow", "missing": "bold red"}
    for row in exam.fallbacks:
        paths.add_row(row.job, Text(row.state, style=styles[row.state]), Text(row.here), Text(row.cost))
    for part in (machine_table, speed, paths):
        console.print(part)
        console.print()
    verdict = Text("Ready.", style="green") if exam.healthy else Text("Not ready: see what is missing above.", style="red")
    console.print(verdict, Text(f"Examined in {exam.seconds:.1f} s.", style="dim"))
