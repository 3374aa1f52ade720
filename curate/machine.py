"""What this process may use of its machine: cores, memory and instruction sets, seen through affinity and cgroups.

A container's `os.cpu_count()` and `MemTotal` are the host's; the limits that hold are in the cgroup files. Reads a few
small files, runs nothing except `sysctl` on macOS.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FLAGS: Final = {  # what we report -> its names in /proc/cpuinfo (x86, Arm) and in sysctl
    "AVX2": ("avx2", "hw.optional.avx2_0"),
    "AVX-512": ("avx512f", "hw.optional.avx512f"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "hw.optional.arm.FEAT_BF16"),
    "AMX": ("amx_tile",),
    "SVE": ("sve",),
    "SME": ("sme", "hw.optional.arm.FEAT_SME"),
}
_NO_LIMIT_V1: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control groups allow: cores (may be fractional), bytes of memory, and bytes already used."""

    cores: float | None = None
    memory: int | None = None
    memory_used: int | None = None


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores of the machine, cores this process may run on, and the cgroup's quota."""

    machine: int
    affinity: int
    quota: float | None

    @property
    def usable(self) -> int:
        """How many threads make sense."""
        return max(1, min(self.affinity, int(self.quota) if self.quota is not None else self.affinity))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of memory that the process can have at most, and that are free now. None: unknown."""

    total: int | None
    available: int | None
    limited_by: str  # "machine" or "cgroup"


def cores(limits: Limits | None = None) -> Cores:
    """Count cores. On a machine of 64 in a container with `cpu.max` 200000 100000: Cores(64, 64, 2.0), usable 2."""
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Cores(machine, affinity, (cgroup_limits() if limits is None else limits).cores)


def memory(limits: Limits | None = None, meminfo: Path = Path("/proc/meminfo")) -> Memory:
    """Measure memory; the smaller of what machine and cgroup allow."""
    limits = cgroup_limits() if limits is None else limits
    total, available = _machine_memory(meminfo)
    if limits.memory is None or (total is not None and limits.memory >= total):
        return Memory(total, available, "machine")
    left = limits.memory - (limits.memory_used or 0)
    return Memory(limits.memory, left if available is None else min(left, available), "cgroup")


def cgroup_limits(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Limits:
    """The tightest limits on the way from this process's cgroup (version 2, or 1) up to the mount's root."""
    found = [limit for directory in _cgroup_directories(mount, membership) for limit in (_limits_in(directory),)]
    quotas = [limit.cores for limit in found if limit.cores is not None]
    bounded = min((limit for limit in found if limit.memory is not None), key=lambda x: x.memory or 0, default=Limits())
    return Limits(min(quotas, default=None), bounded.memory, bounded.memory_used)


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, bool]:
    """Which instruction sets that matter here the processor has: AVX2, AVX-512, bf16 (in hardware), AMX, SVE, SME."""
    present = _cpu_flags(cpuinfo)
    return {name: any(flag in present for flag in flags) for name, flags in _FLAGS.items()}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as its maker gives it where the system tells."""
    for line in _text(cpuinfo).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _machine_memory(meminfo: Path) -> tuple[int | None, int | None]:
    lines = dict(line.split(":", 1) for line in _text(meminfo).splitlines() if ":" in line)
    if "MemTotal" in lines:
        total, available = (int(lines[name].split()[0]) * 1024 if name in lines else None
                            for name in ("MemTotal", "MemAvailable"))  # fmt: skip
        return total, available
    with contextlib.suppress(ImportError, OSError):
        import psutil

        seen = psutil.virtual_memory()
        return int(seen.total), int(seen.available)
    return None, None


def _cgroup_directories(mount: Path, membership: Path) -> Iterator[Path]:
    for line in _text(membership).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            base = mount
        elif set(controllers.split(",")) & {"cpu", "memory"}:
            base = mount / controllers
        else:
            continue
        here = base / path.lstrip("/")
        while base in here.parents:
            yield here
            here = here.parent
        yield base


def _limits_in(directory: Path) -> Limits:
    quota, period = (*_text(directory / "cpu.max").split(), "", "")[:2]
    if not quota:
        quota, period = (_text(directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    cores = int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
    memory = _integer(directory / "memory.max") or _integer(directory / "memory.limit_in_bytes")
    used = _integer(directory / "memory.current") or _integer(directory / "memory.usage_in_bytes")
    return Limits(cores, memory if memory is not None and memory < _NO_LIMIT_V1 else None, used)


def _cpu_flags(cpuinfo: Path) -> set[str]:
    for line in _text(cpuinfo).splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    names = [flag for flags in _FLAGS.values() for flag in flags if flag.startswith("hw.")]
    return {name for name in names if _sysctl(name) == "1"}


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _integer(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None
