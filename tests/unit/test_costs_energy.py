"""Energy: RAPL trees and an NVML library made up for the purpose, and what is said where a counter is missing."""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from curate.costs import counters, nvml
from curate.costs.counters import Unreadable, gpu_counters, open_zone, rapl_counters
from curate.costs.energy import Energy, Joules, co2_grams, meter
from curate.errors import UsageError

RANGE = 262_143_328_850


def zone(root: Path, name: str, kind: str, energy: int, full: int | None = RANGE) -> Path:
    path = root / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{kind}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    if full is not None:
        (path / "max_energy_range_uj").write_text(f"{full}\n")
    return path


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """Two packages with cores and memory, the platform's zone, and a second interface to the first package."""
    (tmp_path / "intel-rapl").mkdir()
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 7_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000)
    zone(tmp_path, "intel-rapl:1:0", "core", 1_500_000)
    zone(tmp_path, "intel-rapl:1:1", "dram", 8_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl-mmio:0:0", "dram", 7_000_000)
    zone(tmp_path, "dtpm:0", "package-9", 1_000_000)
    return tmp_path


def spend(root: Path, joules: float, *names: str) -> None:
    for name in names or [path.name for path in root.glob("*:*")]:
        path = root / name / "energy_uj"
        full = int((root / name / "max_energy_range_uj").read_text())
        after = path.with_name("after")
        after.write_text(f"{(int(path.read_text()) + round(joules * 1e6)) % full}\n")
        after.rename(path)  # whole at any moment, as in sysfs


def no_gpu() -> None:
    return None


def ticks(step: float = 10.0) -> Callable[[], float]:
    count = itertools.count()
    return lambda: step * next(count)


def test_packages_once_and_memory_beside(server: Path) -> None:
    """Of a tree in which every zone spent 5 J, two packages and two memories count; nothing twice."""
    with meter(powercap=server, nvml=no_gpu, clock=ticks()) as metered:
        spend(server, 5)
    assert metered.seconds == 10
    assert metered.energy.processor == Joules(measured=10, measured_seconds=10)
    assert metered.energy.memory == Joules(measured=10, measured_seconds=10)
    assert metered.energy.total.joules == 20
    assert metered.energy.processor.mark == "measured"
    assert not metered.energy.total.complete
    assert str(metered.energy).startswith(
        "processor 10 J measured, memory 10 J measured, accelerator unavailable (no NV"
    )


def test_a_nested_tree(tmp_path: Path) -> None:
    """Where only the tree is shown, zones inside zones are found too."""
    top = zone(tmp_path / "intel-rapl", "intel-rapl:0", "package-0", 0)
    zone(top, "intel-rapl:0:0", "dram", 0)
    processor, _ = rapl_counters(tmp_path)
    _, memory = rapl_counters(tmp_path / "intel-rapl")
    assert [counter.path.name for counter in processor] == ["intel-rapl:0"]  # type: ignore[union-attr]
    assert [counter.path.name for counter in memory] == ["intel-rapl:0:0"]  # type: ignore[union-attr]


def test_wraparound(server: Path) -> None:
    """A counter that is full starts again at 0, as often as it likes between two readings apart."""
    path = server / "intel-rapl:0"
    (path / "energy_uj").write_text(str(RANGE - 3_000_000))
    counter = open_zone(path)
    spend(server, 5, "intel-rapl:0")
    counter.advance()
    assert counter.joules == pytest.approx(5)
    for _ in range(2):
        spend(server, 200_000, "intel-rapl:0")
        counter.advance()
    assert counter.joules == pytest.approx(400_005)


def test_a_counter_that_cannot_have_wrapped(server: Path) -> None:
    """A counter that fell without a range, or by more than its range, is no figure."""
    path = server / "intel-rapl:0"
    counter = open_zone(path)
    (path / "energy_uj").write_text("5")
    (path / "max_energy_range_uj").unlink()
    with pytest.raises(Unreadable, match="max_energy_range_uj"):
        counter.advance()
    (path / "max_energy_range_uj").write_text("10")
    with pytest.raises(Unreadable, match="went back further than its range"):
        counter.advance()


def test_the_thread_reads_along(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of a counter in one block are both seen, since a thread reads in between."""
    monkeypatch.setattr(counters.RaplZone.__init__, "__defaults__", (0.005, 0.0))
    read = []
    advance = counters.RaplZone.advance
    monkeypatch.setattr(counters.RaplZone, "advance", lambda self: (advance(self), read.append(self)))

    def wait() -> None:
        before, limit = len(read), time.monotonic() + 5
        while len(read) < before + 16 and time.monotonic() < limit:
            time.sleep(0.002)

    with meter(powercap=server, nvml=no_gpu) as metered:
        for _ in range(4):
            spend(server, 150_000)
            wait()
    assert metered.energy.processor.joules == pytest.approx(1_200_000)


def test_permission_denied(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One package that may not be read makes the processor unavailable, and its file is named."""
    read = Path.read_text

    def refuse(path: Path, *args: Any, **options: Any) -> str:
        if path == server / "intel-rapl:1" / "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with meter(powercap=server, nvml=no_gpu, clock=ticks()) as metered:
        spend(server, 5, "intel-rapl:0")
    processor = metered.energy.processor
    assert (processor.mark, processor.joules, processor.unavailable_seconds) == ("unavailable", None, 10)
    assert "intel-rapl:1/energy_uj: permission denied (since CVE-2020-8694 only root" in str(processor)
    assert metered.energy.memory.mark == "measured"


def test_a_counter_that_fails_on_the_way(server: Path) -> None:
    """A zone that disappears during the block makes the part unavailable; the block goes on."""
    with meter(powercap=server, nvml=no_gpu) as metered:
        (server / "intel-rapl:0" / "energy_uj").unlink()
    assert metered.energy.processor.mark == "unavailable"
    assert "No such file" in metered.energy.processor.reasons[0]


def test_no_rapl_at_all(tmp_path: Path) -> None:
    """A virtual machine shows no zones; a desktop has no memory's."""
    with meter(powercap=tmp_path, nvml=no_gpu) as metered:
        pass
    assert "has no intel-rapl zone (a virtual machine" in metered.energy.processor.reasons[0]
    assert metered.energy.total.joules is None
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with meter(powercap=tmp_path, nvml=no_gpu) as metered:
        pass
    assert metered.energy.processor.mark == "measured"
    assert metered.energy.memory.reasons == ("RAPL has no dram zone on this machine",)


def test_stated_power_is_an_estimate_and_only_a_stopgap(server: Path) -> None:
    """Watts count where no counter does, are marked, and say that idle time is in them."""
    watts: Any = {"accelerator": 300, "processor": 65}
    with meter(powercap=server, nvml=no_gpu, clock=ticks(), watts=watts) as metered:
        pass
    accelerator = metered.energy.accelerator
    assert (accelerator.mark, accelerator.joules, accelerator.complete) == ("estimated", 3000, True)
    assert "300 W stated by the user and taken to hold all the time, idle or not" in accelerator.reasons[0]
    assert metered.energy.processor == Joules(measured=0, measured_seconds=10)
    assert metered.energy.total.mark == "estimated"


@pytest.mark.parametrize("watts", [{"fan": 3}, {"memory": -1}, {"memory": float("nan")}, {"memory": float("inf")}])
def test_impossible_power(watts: Any) -> None:
    """A part that is not one, and a power that is none, are refused before the block runs."""
    with pytest.raises(UsageError, match=r"the parts are|finite number of watts"), meter(watts=watts):
        raise AssertionError


def test_figures_after_an_exception(server: Path) -> None:
    """A block that fails has cost something, too."""
    with pytest.raises(KeyError), meter(powercap=server, nvml=no_gpu) as metered:  # noqa: PT012
        spend(server, 5)
        raise KeyError
    assert metered.energy.processor.joules == 10


@dataclass
class Gpus:
    """An NVML library: millijoules and milliwatts of each GPU, or what it refuses to say."""

    millijoules: list[int | str] = field(default_factory=list)
    milliwatts: list[int | str] = field(default_factory=list)
    uuids: dict[str, int] = field(default_factory=dict)
    refuses: str = ""
    open: int = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index >= len(self.millijoules):
            raise RuntimeError("Not Found")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return self.uuids[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        return self._said(self.millijoules[handle])

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return self._said(self.milliwatts[handle])

    def _said(self, value: int | str) -> int:
        if isinstance(value, str):
            raise RuntimeError(value)
        return value


@pytest.fixture(autouse=True)
def all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def gpu_joules(gpus: Gpus, spent: tuple[int, ...], **options: Any) -> Joules:
    with meter(powercap=Path("nowhere"), nvml=lambda: gpus, clock=ticks(), **options) as metered:
        for index, millijoules in enumerate(spent):
            before = gpus.millijoules[index]
            gpus.millijoules[index] = before + millijoules if isinstance(before, int) else before
    assert gpus.open == 0
    return metered.energy.accelerator


def test_energy_counters_of_all_gpus() -> None:
    """Millijoules of every GPU since the block began."""
    assert gpu_joules(Gpus([10_000, 20_000]), (3_000, 4_000)) == Joules(measured=7, measured_seconds=10)


def test_only_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named devices count, else CUDA_VISIBLE_DEVICES, by number or UUID, up to a -1."""
    gpus = Gpus([0, 0, 0], uuids={"GPU-c": 2})
    assert gpu_joules(gpus, (1_000, 2_000, 4_000), devices=[1]).joules == 2
    for shown, joules in (("0,GPU-c", 5), ("1", 2), (" 2 ,-1,0", 4)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert gpu_joules(gpus, (1_000, 2_000, 4_000)).joules == joules
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_joules(gpus, ()).reasons == ("no GPU is visible to this process",)


def test_power_where_there_is_no_energy_counter() -> None:
    """An old GPU's power is summed by trapezoids: 100 W to 200 W over 10 s, then 200 W to 0 W over 10 s."""
    gpus = Gpus(["Not Supported"], [100_000])
    with gpu_counters(gpus, None, ticks()) as found:
        assert not isinstance(found, str)
        gpus.milliwatts[0] = 200_000
        found[0].advance()
        assert found[0].joules == 1500
        gpus.milliwatts[0] = 0
        found[0].advance()
        assert found[0].joules == 2500
        assert found[0].every < 1


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        (Gpus(refuses="Driver Not Loaded"), "NVML: Driver Not Loaded"),
        (Gpus(), "no GPU is visible to this process"),
        (Gpus([5, "Not Supported"], [5, "No Permission"]), "GPU 1 has neither .* a power reading: No Permission"),
    ],
)
def test_gpus_that_say_nothing(gpus: Gpus, reason: str) -> None:
    """Without a figure for every GPU there is none, and the reason is the library's own."""
    with meter(powercap=Path("nowhere"), nvml=lambda: gpus) as metered:
        pass
    assert metered.energy.accelerator.mark == "unavailable"
    assert re.search(reason, metered.energy.accelerator.reasons[0])


def test_unknown_device_and_a_counter_that_goes_back() -> None:
    """A GPU that is not there, and a driver that was reloaded, make the figure unavailable."""
    assert gpu_joules(Gpus([5]), (), devices=[3]).reasons == ("NVML: Not Found",)
    assert "went back" in gpu_joules(Gpus([5_000]), (-1,)).reasons[0]


class Library:
    """A driver's library as ctypes shows it: numbers are written behind pointers, codes come back."""

    def __init__(self) -> None:
        self.code = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.code

    def nvmlShutdown(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 100 + index.value
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 300 if uuid.value == b"GPU-x" else 0
        return 0 if uuid.value == b"GPU-x" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, out: Any) -> int:  # noqa: N802
        out._obj.value = 5_000_000_000_000 + (handle.value or 0)
        return 3 if handle.value == 101 else 0

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, out: Any) -> int:  # noqa: N802
        out._obj.value = 70_000 + (handle.value or 0)
        return 0


def test_the_drivers_own_library() -> None:
    """Without pynvml the same functions are called in the driver's library, 64-bit counters included."""
    driver = nvml.Driver(Library())
    with gpu_counters(driver, None, ticks()) as found:
        assert [type(counter).__name__ for counter in found] == ["GpuEnergy", "GpuPower"]
        assert found[0].last == 5_000_000_000_100  # type: ignore[union-attr]
        assert found[1].milliwatts == 70_101  # type: ignore[union-attr]
    with gpu_counters(driver, ["GPU-x"], ticks()) as found:
        assert found[0].last == 5_000_000_000_300  # type: ignore[union-attr]
    with gpu_counters(driver, ["GPU-y"], ticks()) as found:
        assert found == "NVML: not found"
    driver._library.code = 9
    with gpu_counters(driver, None, ticks()) as found:
        assert found == "NVML: driver not loaded"
    with pytest.raises(nvml.NvmlError, match="nvmlNew is not in"):
        driver._call("nvmlNew")


def test_finding_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """pynvml first, then the driver, else nothing."""
    found = Gpus()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    assert nvml.find_nvml() is found
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda _: Library())
    assert isinstance(nvml.find_nvml(), nvml.Driver)

    def absent(name: str) -> Iterator[None]:
        raise OSError(name)

    monkeypatch.setattr(nvml.ctypes, "CDLL", absent)
    assert nvml.find_nvml() is None


def test_sums_keep_the_kinds_apart() -> None:
    """A measured hour and one without a counter give a lower bound that says so."""
    both = Joules(measured=6000, measured_seconds=60) + Joules(unavailable_seconds=30, reasons=("denied",))
    assert (both.joules, both.mark, both.complete) == (6000, "measured", False)
    assert str(both) == "6 kJ measured for 60 of 90 s (denied)"
    more = both + Joules(estimated=100, estimated_seconds=1, reasons=("stated", "denied"))
    assert (more.joules, more.mark, more.reasons) == (6100, "estimated", ("denied", "stated"))
    assert Joules() + both == both
    assert Energy() + Energy(memory=both) == Energy(memory=both)
    assert str(Joules()) == "unavailable"


def test_co2_needs_a_stated_intensity() -> None:
    """Grams follow from joules and the user's grams per kWh; without joules there are none."""
    assert co2_grams(Joules(measured=3.6e6, measured_seconds=1), 400) == 400
    assert co2_grams(Joules(unavailable_seconds=1), 400) is None
    with pytest.raises(TypeError):
        co2_grams(Joules())  # type: ignore[call-arg]
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="g/kWh"):
            co2_grams(Joules(), wrong)


def test_this_machine() -> None:
    """With the machine's own counters, whatever they are, each part has a figure or a reason."""
    with meter() as metered:
        sum(range(1000))
    for part in (metered.energy.processor, metered.energy.memory, metered.energy.accelerator):
        assert part.mark in ("measured", "unavailable")
        assert (part.joules is None) == bool(part.reasons)
