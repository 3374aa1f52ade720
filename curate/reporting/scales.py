"""Axes: from values to positions, ticks at round numbers, and numbers in few characters. Linear, logarithmic, whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_PREFIXES: Final = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_ROUND: Final = (1.0, 2.0, 2.5, 5.0, 10.0)
_RATIOS: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
_APART: Final = 0.085  # of the axis: labels nearer to each other would touch


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows. `include` are values that it must reach; `whole` keeps ticks at whole numbers.

    A logarithmic axis shows positive values only.
    """

    label: str = ""
    log: bool = False
    include: tuple[float, ...] = ()
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` on a line of length 1. `ticks` are values, `labels` what stands beside them."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def at(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return (here - low) / (high - low)

    def shows(self, value: float | None) -> bool:
        """Can this value be drawn?"""
        return can_show(value, self.log)


def can_show(value: float | None, log: bool) -> bool:
    """Not what is missing, endless or, on a logarithmic axis, not positive; 1e-300 is the least that has a place."""
    return value is not None and math.isfinite(value) and (value > 1e-300 or not log)


def fit_scale(values: Iterable[float | None], axis: Axis, *, about: int = 5) -> Scale:
    """The scale for these values, with about so many ticks, at 1, 2, 2.5 or 5 times a power of ten.

    Example: 0.02 to 0.43 with `include=(0,)` gives 0, 0.1, ... 0.5; 3 to 40,000, logarithmic, gives 1, 10, ... 100k.
    """
    shown = [v for v in (*values, *axis.include) if v is not None and can_show(v, axis.log)]
    low, high = (min(shown), max(shown)) if shown else (1.0, 10.0)
    ticks = _decades(low, high, about) if axis.log else _linear(low, high, about, axis.whole)
    return Scale(ticks[0], ticks[-1], axis.log, tuple(ticks), tuple(short_all(ticks)))


def narrow_scale(values: Iterable[float | None], axis: Axis, *, about: int = 5) -> Scale:
    """The same with the data's own ends, for a horizontal axis; ticks lie between them."""
    wide = fit_scale(shown := list(values), axis, about=about)
    drawn = [v for v in (*shown, *axis.include) if v is not None and wide.shows(v)]
    low, high = (min(drawn), max(drawn)) if drawn else (wide.low, wide.high)
    if low == high:
        return wide
    kept = [(t, text) for t, text in zip(wide.ticks, wide.labels, strict=True) if low <= t <= high]
    return Scale(low, high, axis.log, tuple(t for t, _ in kept), tuple(text for _, text in kept))


def ratio_scale(values: Iterable[float]) -> Scale:
    """A logarithmic scale of ratios around 1, which it always holds; it ends at 0.02 and 50, whatever the values.

    Example: 0.45 to 1.8 gives 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2; 0 to 3 gives 0.02 to 3, with fewer between.
    """
    shown = [1.0, *(min(max(v, _RATIOS[0]), _RATIOS[-1]) for v in values)]
    low = max(mark for mark in _RATIOS if mark <= min(shown) * 1.0001)
    high = min(mark for mark in _RATIOS if mark >= max(shown) * 0.9999)
    low, high = (low / 2, high * 2) if low == high else (low, high)
    around = sorted((m for m in _RATIOS if low <= m <= high), key=lambda m: (m != 1, m not in (low, high), m < 0.5))
    ticks: list[float] = []
    wide = math.log(high / low)
    for mark in around:
        if all(abs(math.log(mark / other)) >= _APART * wide for other in ticks):
            ticks.append(mark)
    ticks.sort()
    return Scale(low, high, True, tuple(ticks), tuple(short_all(ticks)))


def short(value: float) -> str:
    """A number in few characters: `short(12800)` is "12.8k", `short(0.123456)` is "0.123"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    power = min(math.floor(math.log10(abs(value)) / 3), len(_PREFIXES) - 1)
    if power < 1:
        return f"{value:.3g}"
    scaled = f"{value / 1000**power:.3g}"
    if scaled == "1e+03" and power + 1 < len(_PREFIXES):
        power, scaled = power + 1, "1"
    return scaled + _PREFIXES[power]


def short_all(values: Sequence[float]) -> list[str]:
    """Ticks of one axis, with as many digits after the point as tell them apart."""
    texts = [short(value) for value in values]
    if len(set(texts)) == len(texts):
        return texts
    return [f"{value:.6g}" for value in values]


def _linear(low: float, high: float, about: int, whole: bool) -> list[float]:
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 1.0 if whole else abs(low) / 10 or 1.0
        low, high = low - room * (low != 0), high + room
    step = _step((high - low) / about, whole)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _step(least: float, whole: bool) -> float:
    """The round number next above `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    step = next(size * power for size in _ROUND if size * power >= least * (1 - 1e-9))
    return max(1.0, step if step >= 5 or step.is_integer() else math.ceil(step)) if whole else step


def _decades(low: float, high: float, about: int) -> list[float]:
    """Powers of ten, thinned where there are many; with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first <= 2:
        return _ones_twos_fives(low, high, first, last)
    stride = math.ceil((last - first) / about)
    count = math.ceil((last - first) / stride)
    return [10.0 ** (first + n * stride) for n in range(count + 1)]


def _ones_twos_fives(low: float, high: float, first: int, last: int) -> list[float]:
    marks = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    start = max(n for n, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
    end = min((n for n, mark in enumerate(marks) if mark >= high * (1 - 1e-9)), default=len(marks) - 1)
    return marks[start : max(end, start + 1) + 1]
