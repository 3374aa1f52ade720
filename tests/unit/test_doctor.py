"""The examination of the machine: limits are read right, and whatever is absent is a line, not a crash."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from curate import examination, kernel_survey, machine, rates
from curate.examination import Examination, examine, render_examination
from curate.kernel_survey import Crossover
from curate.machine import Cores, Limits

CPUINFO = "processor\t: 0\nmodel name\t: Test CPU 9000\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n"


SLOW = Crossover("bfloat16", 1, "native", {"native": 0.5, "masked": 0.9})
FAST = Crossover("float32", 512, "native", {"native": 20.0, "grouped": 4.0})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time."""
    monkeypatch.setattr(rates, "jpeg_rate", lambda decoder, **_: 3000.0 if decoder == "simplejpeg" else 1500.0)
    monkeypatch.setattr(rates, "matrix_rate", lambda dtype, **_: 100e9 if dtype == "float32" else 2e9)
    monkeypatch.setattr(rates, "memory_rate", lambda **_: 10e9)
    monkeypatch.setattr(kernel_survey, "crossovers", lambda: (SLOW, FAST))


def rendered(exam: Examination) -> str:
    out = io.StringIO()
    render_examination(exam, Console(file=out, width=160))
    return out.getvalue()


def row(exam: Examination, job: str) -> examination.Fallback:
    return next(fallback for fallback in exam.fallbacks if fallback.job == job)


def write_cgroup(tmp_path: Path, files: dict[str, str], membership: str) -> tuple[Path, Path]:
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "membership").write_text(membership)
    return tmp_path / "mount", tmp_path / "membership"


@pytest.mark.usefixtures("quick")
def test_an_examination_is_json_and_text() -> None:
    """The examination serialises without NaN, and its rendering names each job, version and figure."""
    exam = examine()
    value = json.loads(json.dumps(exam.as_json(), allow_nan=False))
    assert value["healthy"] is True
    text = rendered(exam)
    for word in (
        "JPEG decoding",
        "scoring",
        "precision",
        "selection",
        "fast feedforward",
        "3,000 pictures/s",
        "pyarrow",
        "Ready.",
    ):
        assert word in text


@pytest.mark.usefixtures("quick")
def test_missing_simplejpeg_is_a_fallback_with_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without simplejpeg Pillow decodes, the rate is the measured one, and the reason is printed."""

    def absent(decoder: str, **_: float) -> float:
        if decoder == "simplejpeg":
            raise ImportError("No module named 'simplejpeg'")
        return 1500.0

    monkeypatch.setattr(rates, "jpeg_rate", absent)
    exam = examine()
    decoding = row(exam, "JPEG decoding")
    assert (decoding.state, decoding.here) == ("fallback", "Pillow")
    assert "1,500 pictures/s" in decoding.cost
    assert "ImportError: No module named 'simplejpeg'" in rendered(exam)


@pytest.mark.usefixtures("quick")
def test_present_simplejpeg_names_the_measured_gain() -> None:
    """With simplejpeg the row gives the ratio of the two measured rates."""
    assert row(examine(), "JPEG decoding").cost.startswith("2.0x")


@pytest.mark.usefixtures("quick")
def test_broken_torch_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch cannot be imported the examination ends, says so, and is not healthy."""
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise OSError("libtorch.so: cannot open")
        return original(name, *args, **kwargs)

    def failing(*_: Any, **__: Any) -> float:
        raise OSError("libtorch.so: cannot open")

    monkeypatch.setattr(rates, "matrix_rate", failing)
    monkeypatch.setattr(builtins, "__import__", refuse)
    exam = examine()
    monkeypatch.setattr(builtins, "__import__", original)
    assert not exam.healthy
    assert "libtorch.so: cannot open" in rendered(exam)


@pytest.mark.usefixtures("quick")
def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A required package that is not installed makes the machine not ready, and the row names it."""
    absent = ("nothing", "no_such_module", "no-such-package", False)
    monkeypatch.setattr(examination, "PACKAGES", (*examination.PACKAGES, absent))
    exam = examine()
    assert not exam.healthy
    assert row(exam, "required packages").here == "absent: nothing"


@pytest.mark.usefixtures("quick")
def test_no_compiler_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C++ compiler the examination says so and goes on."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    exam = examine()
    assert next(fact for fact in exam.facts if fact.name == "C++ compiler").value == "none"


@pytest.mark.usefixtures("quick")
def test_kernels_say_how_much_they_gain() -> None:
    """Measured speed-ups over the dense layer are printed, and a choice that loses to it is a fallback with advice."""
    text = rendered(examine())
    assert "native 20x, grouped 4x" in text
    lost = [row for row in examine().fallbacks if "0.5x the dense layer" in row.cost]
    assert [(row.job, row.state) for row in lost] == [("fast feedforward", "fallback")]
    assert "choose masked" in lost[0].cost


@pytest.mark.usefixtures("quick")
def test_kernels_without_a_compiler_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A C++ kernel that is not there is a fallback whose cost names the reason."""
    absent = kernel_survey.NativeKernel("selection", False, False, 0.0, "no C++ compiler is on PATH")
    monkeypatch.setattr(kernel_survey, "native_kernels", lambda: (absent,))
    found = row(examine(), "selection")
    assert (found.state, found.here, found.cost) == ("fallback", "torch's own products", "no C++ compiler is on PATH")


def test_crossovers_are_measured() -> None:
    """The survey times the kernels at a shape and names the one that dispatch takes."""
    found = kernel_survey.crossovers((16, 2, 4), (1, 8))
    assert [(each.dtype, each.tokens) for each in found][:2] == [("float32", 1), ("float32", 8)]
    assert all(each.chosen in each.over_dense and each.quickest in each.over_dense for each in found)


@pytest.mark.usefixtures("quick")
def test_disk_that_cannot_be_written_is_a_line(tmp_path: Path) -> None:
    """A directory that is not there gives no rate but the reason."""
    disk = next(rate for rate in examine(directory=tmp_path / "absent").rates if rate.name.startswith("disk"))
    assert disk.value is None
    assert "FileNotFoundError" in disk.note


def test_disk_rate_leaves_nothing_behind(tmp_path: Path) -> None:
    """The test file is removed again."""
    assert rates.disk_rate(tmp_path, size=2 << 20) > 0
    assert list(tmp_path.iterdir()) == []


def test_measured_rates_are_positive() -> None:
    """Pillow decodes, memory is copied and torch multiplies at some rate; the thread count is put back."""
    import torch

    before = torch.get_num_threads()
    assert rates.jpeg_rate("pillow", seconds=0.01) > 10
    assert rates.memory_rate(seconds=0.01, size=1 << 20) > 1e6
    assert rates.matrix_rate("float32", threads=1, seconds=0.01) > 1e6
    assert torch.get_num_threads() == before


def test_limits_of_a_version_2_cgroup(tmp_path: Path) -> None:
    """The tightest limit on the way up holds: the parent's quota, the child's memory."""
    files = {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}
    files |= {"a/b/memory.max": "1000000\n", "a/b/memory.current": "400000\n", "a/memory.max": "max\n"}
    assert machine.cgroup_limits(*write_cgroup(tmp_path, files, "0::/a/b\n")) == Limits(1.5, 1_000_000, 400_000)


def test_limits_of_a_version_1_cgroup(tmp_path: Path) -> None:
    """Quota and memory limit are read from their controllers; version 1's "no limit" is no limit."""
    files = {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}
    files |= {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"}
    found = machine.cgroup_limits(*write_cgroup(tmp_path, files, "3:cpu:/\n4:memory:/\n"))
    assert (found.cores, found.memory) == (2.0, None)


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    """Where the files are absent nothing is limited."""
    assert machine.cgroup_limits(tmp_path, tmp_path / "absent") == Limits()


@pytest.mark.parametrize(("cores", "usable"), [(Cores(64, 8, 2.5), 2), (Cores(64, 8, None), 8), (Cores(4, 4, 0.5), 1)])
def test_usable_cores(cores: Cores, usable: int) -> None:
    """Affinity and quota both bound the threads; at least one remains."""
    assert cores.usable == usable


def test_memory_is_the_smaller_of_machine_and_cgroup(tmp_path: Path) -> None:
    """A cgroup limit below the machine's memory holds, and what is used counts against it."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       1000 kB\nMemAvailable:    900 kB\n")
    found = machine.memory(Limits(memory=512_000, memory_used=500_000), meminfo)
    assert (found.total, found.available, found.limited_by) == (512_000, 12_000, "cgroup")
    assert machine.memory(Limits(), meminfo).total == 1_024_000


def test_instruction_sets(tmp_path: Path) -> None:
    """Flags of the processor are recognised; absent ones are absent."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO)
    found = machine.instruction_sets(cpuinfo)
    assert [name for name, present in found.items() if present] == ["AVX2", "AVX-512", "bf16", "AMX"]
    assert machine.processor(cpuinfo) == "Test CPU 9000"
