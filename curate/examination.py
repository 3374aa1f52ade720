"""`curate doctor`: what this machine has, how fast it is, what falls back to what, and what each fallback costs here.

Every probe is isolated: what is absent or fails becomes a line with its reason, never an exception. About eight
seconds, most of them the import of torch and the measurements; the first time, C++ kernels are compiled as well.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from curate import kernel_survey, machine, rates

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")

PACKAGES: Final = (  # name, import name, distribution, whether curate runs without it
    ("curate", "curate", "curate-multimodal", False),
    ("torch", "torch", "torch", False),
    ("open_clip", "open_clip", "open_clip_torch", False),
    ("webdataset", "webdataset", "webdataset", False),
    ("dask", "dask", "dask", False),
    ("distributed", "distributed", "distributed", False),
    ("pyarrow", "pyarrow", "pyarrow", False),
    ("faiss", "faiss", "faiss-cpu", False),
    ("numpy", "numpy", "numpy", False),
    ("pillow", "PIL", "pillow", False),
    ("simplejpeg", "simplejpeg", "simplejpeg", True),
    ("triton", "triton", "triton", True),
)
VIT_B_32_FLOPS: Final = 14.78e9  # forward of one pair at 77 tokens, open_clip's model profile
_DTYPES: Final[dict[Literal["float32", "bfloat16"], str]] = {"float32": "fp32", "bfloat16": "bf16"}
_STYLES: Final = {"full": "green", "fallback": "yellow", "missing": "bold red"}
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
    crossovers: tuple[kernel_survey.Crossover, ...]
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
    versions = tuple(Version(name, _version(*where), optional) for name, *where, optional in PACKAGES)
    limits = machine.cgroup_limits()
    cores = machine.cores(limits)
    accelerator, why = _attempt(_find_accelerator)
    compiler, _ = _attempt(_find_compiler)
    found = tuple(_measure(cores.usable, accelerator, max(0.02, seconds / _PROBES), directory))
    measured = {rate.name: rate.value for rate in found}
    facts = tuple(_facts(cores, machine.memory(limits), accelerator, why, compiler))
    natives, _ = _attempt(kernel_survey.native_kernels)
    crossovers, _ = _attempt(kernel_survey.crossovers)
    fallbacks = (
        *_fallbacks(versions, measured, accelerator, cores),
        *_kernels(natives or (), crossovers or (), accelerator),
    )
    return Examination(versions, facts, found, fallbacks, crossovers or (), time.perf_counter() - start)


def _attempt(probe: Callable[[], T]) -> tuple[T | None, str]:
    """(result, "") or (None, why not). A broken installation may raise anything, so anything is caught."""
    try:
        return probe(), ""
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:160]}".removesuffix(": ")


def _version(module: str, distribution: str) -> str | None:
    """The version of what is installed; "unknown" for a module without metadata (a plain checkout, another faiss)."""
    version, _ = _attempt(lambda: importlib.metadata.version(distribution))
    return version or ("unknown" if _attempt(lambda: importlib.util.find_spec(module))[0] is not None else None)


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
    from curate.kernels import compiled

    path = compiled.compiler()
    if path is None:
        raise LookupError("no c++, g++ or clang++ on the PATH")
    return compiled.compiler_version(path).splitlines()[0].strip()


def _measure(threads: int, accelerator: _Accelerator | None, each: float, directory: Path | None) -> list[Rate]:
    """Run the measurements, each for `each` seconds."""
    found = [
        _rate("JPEG decoding, simplejpeg", "pictures/s a core", 1, lambda: rates.jpeg_rate("simplejpeg", seconds=each)),
        _rate("JPEG decoding, Pillow", "pictures/s a core", 1, lambda: rates.jpeg_rate("pillow", seconds=each)),
    ]
    places = [("cpu", count, _cores(count)) for count in sorted({1, threads})]
    if accelerator is not None and accelerator.device == "cuda":
        places.append(("cuda", threads, "GPU"))
    for dtype, label in _DTYPES.items():
        for device, count, where in places:
            work = functools.partial(rates.matrix_rate, dtype, threads=count, seconds=each, device=device)
            found.append(_rate(f"matrix product, {label}, {where}", "GFLOP/s", 1e9, work))
    found.append(_rate("memory copy, 1 core", "GB/s", 1e9, lambda: rates.memory_rate(seconds=each)))
    if directory is not None:
        found.append(_rate("disk, written and synced", "MB/s", 1e6, lambda: rates.disk_rate(directory), str(directory)))
    return found


def _cores(count: int) -> str:
    return f"{count} core{'s' * (count > 1)}"


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
    measured: dict[str, float | None],
    accelerator: _Accelerator | None,
    cores: machine.Cores,
) -> Iterator[Fallback]:
    """What does each job here, and what that costs by the measurements."""
    absent = [version.name for version in versions if version.version is None and not version.optional]
    if absent:
        yield Fallback(
            "required packages", "missing", "absent: " + ", ".join(absent), "install curate-multimodal again"
        )
    yield _decoding(measured)
    on_cpu = accelerator is None or accelerator.device == "cpu"
    where = _cores(cores.usable) if on_cpu else "GPU"
    single, half = (measured.get(f"matrix product, {label}, {where}") for label in _DTYPES.values())
    ratio = f"bf16 runs at {half / single:.2g}x the rate of fp32 (measured here)" if single and half else "not measured"
    if accelerator is None or on_cpu:
        yield _cpu_scoring(single)
        native = machine.instruction_sets()["bf16"]
        here = "bf16 in hardware" if native else "fp32: no bf16 in this processor"
    else:
        yield Fallback("scoring", "full", accelerator.name, _pairs_a_second(half or single))
        native = accelerator.bf16
        here = "bf16" if native else "fp32: no bf16 in this GPU"
    yield Fallback("precision", "full" if native else "fallback", here, ratio)


def _decoding(measured: dict[str, float | None]) -> Fallback:
    fast, slow = (measured[f"JPEG decoding, {name}"] for name in ("simplejpeg", "Pillow"))
    if fast is not None:
        gain = f"{fast / slow:.1f}x the rate of Pillow (measured here)" if slow else ""
        return Fallback("JPEG decoding", "full", "simplejpeg", gain)
    rate = f"{slow:,.0f} pictures/s a core (measured here); " if slow else ""
    return Fallback("JPEG decoding", "fallback", "Pillow", f"{rate}simplejpeg is usually about twice as fast")


def _cpu_scoring(gigaflops: float | None) -> Fallback:
    if gigaflops is None:
        return Fallback("scoring", "missing", "nothing: torch cannot multiply here", "install torch again")
    return Fallback("scoring", "fallback", "CPU (no GPU)", _pairs_a_second(gigaflops))


def _pairs_a_second(gigaflops: float | None) -> str:
    if gigaflops is None:
        return "not measured"
    return f"ViT-B-32: at most {gigaflops * 1e9 / VIT_B_32_FLOPS:,.1f} pairs/s, by the matrix rate"


def _kernels(
    natives: Sequence[kernel_survey.NativeKernel],
    crossovers: Sequence[kernel_survey.Crossover],
    accelerator: _Accelerator | None,
) -> Iterator[Fallback]:
    """One row per kernel: Triton on a GPU, C++ where it was compiled, else torch and what that costs."""
    on_gpu = accelerator is not None and accelerator.device == "cuda"
    if on_gpu and importlib.util.find_spec("triton") is not None:
        yield Fallback("kernels", "full", "Triton", "")
        return
    if on_gpu:
        yield Fallback("kernels on the GPU", "fallback", "torch's own products", "Triton is not installed")
    for native in natives:
        here = f"C++{'' if native.threaded else ', one thread: no OpenMP'}"
        built = f"compiled in {native.seconds:g} s" if native.seconds else "compiled before"
        state = "full" if native.built and native.threaded else "fallback"
        if native.built:
            yield Fallback(native.job, state, here, built)
        else:
            yield Fallback(native.job, state, "torch's own products", native.why_not or "")
    lost = [row for row in crossovers if row.over_dense.get(row.chosen, 1) < 1]
    for row in lost:
        cost = f"{row.over_dense[row.chosen]:.2g}x the dense layer at {row.tokens} tokens, {row.dtype}"
        yield Fallback("fast feedforward", "fallback", row.chosen, f"{cost}: calibrate, or choose {row.quickest}")


def render_examination(exam: Examination, console: Console) -> None:
    """Print the examination: the machine, the measurements, what does the work, and a verdict."""
    from rich.text import Text

    facts = _table("Machine", "", "")
    for fact in exam.facts:
        facts.add_row(fact.name, Text(fact.value))
    facts.add_row("packages", Text(", ".join(f"{v.name} {v.version or 'ABSENT'}" for v in exam.versions)))
    speed = _table("Measured here", "", "rate", "")
    speed.columns[1].justify = "right"
    for rate in exam.rates:
        speed.add_row(rate.name, _shown(rate), Text(rate.note, style="dim"))
    paths = _table("What does the work", "", "", "here", "cost")
    for row in exam.fallbacks:
        paths.add_row(row.job, Text(row.state, style=_STYLES[row.state]), Text(row.here), Text(row.cost))
    speedups = _table(
        "Fast feedforward over the dense layer of equal width, 768 -> 3,072", "tokens", "dtype", "taken", "speed-ups"
    )
    for crossover in exam.crossovers:
        each = ", ".join(f"{name} {ratio:.3g}x" for name, ratio in crossover.over_dense.items())
        speedups.add_row(str(crossover.tokens), crossover.dtype, crossover.chosen, each)
    for part in (facts, speed, paths, speedups):
        console.print(part)
        console.print()
    verdict = ("Ready.", "green") if exam.healthy else ("Not ready: see what is missing above.", "bold red")
    console.print(Text.assemble(verdict, (f" Examined in {exam.seconds:.1f} s.", "dim")))


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    made.show_header = any(columns)
    for column in columns:
        made.add_column(column, header_style="dim", overflow="fold")
    return made


def _shown(rate: Rate) -> str:
    if rate.value is None:
        return "-"
    return f"{rate.value:,.0f} {rate.unit}" if rate.value >= 10 else f"{rate.value:.2g} {rate.unit}"
