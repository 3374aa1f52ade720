"""Joules of a piece of work from the machine's counters: RAPL for processor and memory, NVML for GPUs.

    with meter() as metered:
        train()
    metered.energy.total.joules, metered.energy.total.mark

A figure is *measured* (a counter of the device ran along), *estimated* (the user stated watts; watts times seconds), or
*unavailable* with its reason; nothing is guessed. Counters belong to whole devices: idle power and other processes'
work are in them, the power supply's loss, fans, disks and the network are not. A thread reads every ten seconds (every
half second where a GPU has only a power reading), since a RAPL counter of 262 kJ is full after 20 minutes at 200 W.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final, Literal

from curate.costs.counters import POWERCAP, Counter, Found, Unreadable, gpu_counters, rapl_counters
from curate.costs.nvml import Nvml, find_nvml
from curate.errors import UsageError

Mark = Literal["measured", "estimated", "unavailable"]
Part = Literal["processor", "memory", "accelerator"]
PARTS: Final[tuple[Part, ...]] = ("processor", "memory", "accelerator")


@dataclass(frozen=True, slots=True)
class Joules:
    """Energy of one part of the machine, and how it is known. Sums keep the three kinds apart.

    `measured` and `estimated` are joules; the seconds say for how long each was so. `reasons` says why the rest is
    unavailable and where an estimate comes from. Example: 60 s measured at 100 W plus 30 s without a counter is
    Joules(measured=6000.0, measured_seconds=60.0, unavailable_seconds=30.0, reasons=("...",)): `joules` is 6,000, and
    `complete` is false.
    """

    measured: float = 0.0
    measured_seconds: float = 0.0
    estimated: float = 0.0
    estimated_seconds: float = 0.0
    unavailable_seconds: float = 0.0
    reasons: tuple[str, ...] = ()

    @property
    def mark(self) -> Mark:
        """The weakest kind among what is known; "unavailable" where nothing is."""
        if self.estimated_seconds:
            return "estimated"
        return "measured" if self.measured_seconds else "unavailable"

    @property
    def complete(self) -> bool:
        """Is there a figure for every second?"""
        return self.mark != "unavailable" and not self.unavailable_seconds

    @property
    def joules(self) -> float | None:
        """What is known; a lower bound unless `complete`. None where nothing is."""
        return None if self.mark == "unavailable" else self.measured + self.estimated

    def __add__(self, other: Joules) -> Joules:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Joules(**sums | {"reasons": tuple(sorted({*self.reasons, *other.reasons}))})

    def __str__(self) -> str:
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        if self.joules is None:
            return f"unavailable{why}"
        known = self.measured_seconds + self.estimated_seconds
        share = "" if self.complete else f" for {known:,.0f} of {known + self.unavailable_seconds:,.0f} s"
        return f"{_amount(self.joules)} {self.mark}{share}{why}"


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of processor packages, of memory, and of GPUs."""

    processor: Joules = Joules()
    memory: Joules = Joules()
    accelerator: Joules = Joules()

    @property
    def total(self) -> Joules:
        """The sum of the parts; it is `complete` only where every part is. Seconds are the parts' together."""
        return self.processor + self.memory + self.accelerator

    def __add__(self, other: Energy) -> Energy:
        return Energy(*(getattr(self, part) + getattr(other, part) for part in PARTS))

    def __str__(self) -> str:
        return ", ".join(f"{part} {getattr(self, part)}" for part in PARTS)


def co2_grams(energy: Joules, grams_per_kwh: float) -> float | None:
    """Grams of CO2 at an intensity that the user states; None where no joules are known. There is no default: grids
    differ fortyfold. Example: 3.6 MJ at 400 g/kWh are 400 g."""
    if not 0 <= grams_per_kwh < float("inf"):
        raise UsageError(f"{grams_per_kwh} g/kWh: an intensity is a finite number of grams, 0 or more")
    return None if energy.joules is None else energy.joules / 3.6e6 * grams_per_kwh


@dataclass(slots=True)
class Metered:
    """What `meter` yields; `energy` and `seconds` are final when the block has ended."""

    energy: Energy = field(default_factory=Energy)
    seconds: float = 0.0


@contextlib.contextmanager
def meter(
    *,
    watts: Mapping[Part, float] | None = None,
    devices: Sequence[int | str] | None = None,
    powercap: Path = POWERCAP,
    nvml: Callable[[], Nvml | None] = find_nvml,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Metered]:
    """Measure a block; the figures are there after an exception too.

    `watts` is the power that the user states for a part, used only where its counter is unavailable, and marked so.
    `devices` are NVML indices or UUIDs; None is CUDA_VISIBLE_DEVICES, or every GPU. One process of a machine should
    meter: two would count the same devices twice (`curate.costs.ledger.together` knows). A block that left work on a
    GPU ends too early: synchronise first. Errors: UsageError for an unknown part, or a power that is not a finite
    number of watts.
    """
    stated = _stated(watts or {})
    with gpu_counters(nvml(), _visible(devices), clock) as gpus:
        processor, memory = rapl_counters(powercap)
        gauges = {part: _Gauge(found) for part, found in zip(PARTS, (processor, memory, gpus), strict=True)}
        metered, started = Metered(), clock()
        try:
            with _read_along(gauges.values()):
                yield metered
        finally:
            metered.seconds = clock() - started
            figures = (gauges[part].figure(metered.seconds, stated.get(part)) for part in PARTS)
            metered.energy = Energy(*figures)


class _Gauge:
    """The counters of one part, or why there are none; a counter that fails on the way makes the part unavailable."""

    def __init__(self, found: Found) -> None:
        self.counters: Sequence[Counter] = () if isinstance(found, str) else found
        self.reason = found if isinstance(found, str) else ""

    def advance(self) -> None:
        if self.reason:
            return
        try:
            for counter in self.counters:
                counter.advance()
        except Unreadable as error:
            self.reason = str(error)

    def figure(self, seconds: float, watts: float | None) -> Joules:
        self.advance()
        if not self.reason:
            return Joules(measured=sum(counter.joules for counter in self.counters), measured_seconds=seconds)
        if watts is None:
            return Joules(unavailable_seconds=seconds, reasons=(self.reason,))
        stated = (
            f"{watts:g} W stated by the user and taken to hold all the time, idle or not; no counter: {self.reason}"
        )
        return Joules(estimated=watts * seconds, estimated_seconds=seconds, reasons=(stated,))


@contextlib.contextmanager
def _read_along(gauges: Collection[_Gauge]) -> Iterator[None]:
    """A thread that reads before any counter has gone round, while the block runs."""
    stop = threading.Event()
    every = min((counter.every for gauge in gauges for counter in gauge.counters), default=None)

    def read() -> None:
        while not stop.wait(every):
            for gauge in gauges:
                gauge.advance()

    reader = threading.Thread(target=read, name="curate-meter", daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def _stated(watts: Mapping[Part, float]) -> Mapping[Part, float]:
    for part, value in watts.items():
        if part not in PARTS:
            raise UsageError(f"power of {part!r}: the parts are {', '.join(PARTS)}")
        if not 0 <= value < float("inf"):
            raise UsageError(f"{value} W for the {part}: a power is a finite number of watts, 0 or more")
    return watts


def _visible(devices: Sequence[int | str] | None) -> Sequence[int | str] | None:
    """What CUDA shows this process; its numbers are NVML's if CUDA_DEVICE_ORDER is PCI_BUS_ID."""
    if devices is not None or "CUDA_VISIBLE_DEVICES" not in os.environ:
        return devices
    names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    shown = names[: names.index("-1")] if "-1" in names else names
    return [int(name) if name.isdigit() else name for name in shown]


def _amount(joules: float) -> str:
    for unit, size in (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3)):
        if joules >= size:
            return f"{joules / size:.3g} {unit}"
    return f"{joules:.3g} J"
