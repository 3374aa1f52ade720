"""Energy counters of the machine, each a running sum of joules since it was opened: RAPL zones and GPUs.

RAPL (Intel, and AMD under the same names) counts microjoules per processor package in a file that is full at
`max_energy_range_uj` and starts again; `core` and `uncore` are parts of their package and are left out, so is `psys`,
which contains the packages, and a second interface to the same package; `dram` is beside the package and is the
memory's. A GPU from Volta on counts millijoules; older ones give only their power, which is summed over time.
Sources: Linux, Documentation/power/powercap/powercap.rst; NVML API reference. A reading costs some ten microseconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from curate.costs.nvml import Nvml

POWERCAP: Final = Path("/sys/class/powercap")
COUNTER_SECONDS, POWER_SECONDS = 10.0, 0.5  # a RAPL counter of 262 kJ is full after 22 minutes at 200 W
_T = TypeVar("_T")


class Unreadable(Exception):
    """Why a counter gives no figure; the text goes into the ledger."""


class Counter(Protocol):
    """Joules since it was opened. `advance` reads on, at the latest `every` seconds after it last did."""

    every: float
    joules: float

    def advance(self) -> None: ...


Found = Sequence[Counter] | str  # the counters of one part of the machine, or the reason why there are none


@dataclass(slots=True)
class RaplZone:
    """One zone of the powercap tree. Opened by `open_zone`."""

    path: Path
    last: int
    every: float = COUNTER_SECONDS
    joules: float = 0.0

    def advance(self) -> None:
        now = _number(self.path / "energy_uj")
        step = now - self.last
        if step < 0:
            step += _number(self.path / "max_energy_range_uj")
        if step < 0:
            raise Unreadable(f"{self.path.name} went back further than its range")
        self.last, self.joules = now, self.joules + step / 1e6


def open_zone(path: Path) -> RaplZone:
    return RaplZone(path, _number(path / "energy_uj"))


def rapl_counters(root: Path = POWERCAP) -> tuple[Found, Found]:
    """(processor, memory). A part is unavailable as a whole where one of its zones cannot be read."""
    zones = _zones(root)
    if not zones:
        reason = f"{root} has no intel-rapl zone (a virtual machine, a container, or another processor)"
        return reason, reason
    packages = [zone for name, zone in zones.items() if name.startswith("package") and "/" not in name]
    dram = [zone for name, zone in zones.items() if name.endswith("/dram")]
    return _open(packages, "package"), _open(dram, "dram")


def _open(zones: Sequence[Path], kind: str) -> Found:
    if not zones:
        return f"RAPL has no {kind} zone on this machine"
    try:
        return [open_zone(zone) for zone in zones]
    except Unreadable as error:
        return str(error)


def _zones(root: Path) -> dict[str, Path]:
    """Zones by name, "package-0" and "package-0/dram"; of two interfaces to one zone the first."""
    found: dict[str, Path] = {}
    # the class directory is flat; some kernels and containers show the tree alone
    paths = {path.name: path for pattern in ("*/intel-rapl*:*", "intel-rapl*:*") for path in root.glob(pattern)}
    for name in sorted(paths, key=lambda name: name.replace(":", " ")):  # intel-rapl before intel-rapl-mmio
        kind, *place = name.split(":")
        above = paths.get(f"{kind}:{place[0]}")
        prefix = f"{_text(above / 'name')}/" if len(place) > 1 and above is not None else ""
        found.setdefault(prefix + _text(paths[name] / "name"), paths[name])
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return path.parent.name


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except PermissionError as error:
        raise Unreadable(
            f"{path}: permission denied (since CVE-2020-8694 only root may read it, or whom an administrator lets)"
        ) from error
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path}: {error}") from error


@dataclass(slots=True)
class GpuEnergy:
    """A GPU with an energy counter."""

    read: Callable[[], int]
    last: int
    every: float = COUNTER_SECONDS
    joules: float = 0.0

    def advance(self) -> None:
        now = _asked(self.read)
        if now < self.last:
            raise Unreadable("the GPU's energy counter went back (driver reloaded?)")
        self.last, self.joules = now, self.joules + (now - self.last) / 1e3


@dataclass(slots=True)
class GpuPower:
    """A GPU with a power reading only: trapezoids between readings."""

    read: Callable[[], int]
    clock: Callable[[], float]
    milliwatts: int
    at: float = field(init=False)
    every: float = POWER_SECONDS
    joules: float = 0.0

    def __post_init__(self) -> None:
        self.at = self.clock()

    def advance(self) -> None:
        now, milliwatts = self.clock(), _asked(self.read)
        self.joules += (now - self.at) * (self.milliwatts + milliwatts) / 2e3
        self.at, self.milliwatts = now, milliwatts


@contextlib.contextmanager
def gpu_counters(nvml: Nvml | None, devices: Sequence[int | str] | None, clock: Callable[[], float]) -> Iterator[Found]:
    """The counters of the devices (NVML's indices or UUIDs; None: all); the library is closed again at the end."""
    if nvml is None:
        yield "no NVIDIA driver library and no pynvml"
        return
    try:
        _asked(nvml.nvmlInit)
    except Unreadable as error:
        yield f"NVML: {error}"
        return
    try:
        yield _gpus(nvml, devices, clock)
    finally:
        with contextlib.suppress(Unreadable):
            _asked(nvml.nvmlShutdown)


def _gpus(nvml: Nvml, devices: Sequence[int | str] | None, clock: Callable[[], float]) -> Found:
    try:
        names = range(_asked(nvml.nvmlDeviceGetCount)) if devices is None else devices
        found = [_gpu(nvml, name, clock) for name in names]
    except Unreadable as error:
        return f"NVML: {error}"
    return found or "no GPU is visible to this process"


def _gpu(nvml: Nvml, name: int | str, clock: Callable[[], float]) -> Counter:
    def find() -> Any:
        return nvml.nvmlDeviceGetHandleByIndex(name) if isinstance(name, int) else nvml.nvmlDeviceGetHandleByUUID(name)

    handle = _asked(find)

    def energy() -> int:
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def power() -> int:
        return nvml.nvmlDeviceGetPowerUsage(handle)

    try:
        return GpuEnergy(energy, _asked(energy))
    except Unreadable:
        try:
            return GpuPower(power, clock, _asked(power))
        except Unreadable as error:
            raise Unreadable(f"GPU {name} has neither an energy counter nor a power reading: {error}") from error


def _asked(call: Callable[[], _T]) -> _T:
    """pynvml has an exception class of its own, which is only there with pynvml."""
    try:
        return call()
    except Exception as error:
        raise Unreadable(str(error) or type(error).__name__) from error
