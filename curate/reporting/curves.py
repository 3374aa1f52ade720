"""From many points to a curve that a chart can hold: means over stretches, with the extremes as a band."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from curate.reporting.charts import Series

Points = Sequence[tuple[float, float | None]]
MOST = 160


def thinned(name: str, points: Points, *, slot: int = 0, most: int = MOST) -> Series:
    """One run's curve: as it is up to `most` points, otherwise the mean of each of `most` stretches of the horizontal
    axis, in a band from the smallest to the largest value there. Example: 3,000 losses become 160 means of 18 or 19.
    """
    return spread(name, [points], slot=slot, most=most)


def spread(name: str, runs: Sequence[Points], *, slot: int = 0, most: int = MOST) -> Series:
    """The mean curve of several runs (each counting once), in a band from the smallest to the largest value.

    Points at the same place are taken together; where there are more than `most` places, stretches of equal length are.
    A stretch without any value is a gap.
    """
    places = sorted({at for points in runs for at, _ in points})
    if len(places) <= most:
        tables = [dict(points) for points in runs]
        return _series(name, [(at, [_at(table, at) for table in tables]) for at in places], slot)
    low, width = places[0], (places[-1] - places[0]) / most
    held = [_stretches(points, low, width, most) for points in runs]
    columns = [(low + (n + 0.5) * width, [values[n] for values in held]) for n in range(most)]
    return _series(name, columns, slot)


def aligned(name: str, runs: Sequence[Sequence[tuple[int, float, float]]], *, slot: int = 0) -> Series:
    """The mean curve of several runs measured at the same steps: of (step, x, y) both x and y are averaged by step.

    A step that only some of the runs reached is left out where another has all of them; FLOPs and seconds of seeds
    differ slightly, and a mean over fewer of them would jump.
    """
    by_step: dict[int, list[tuple[float, float]]] = {}
    for points in runs:
        for step, x, y in points:
            by_step.setdefault(step, []).append((x, y))
    most = max(map(len, by_step.values()), default=0)
    kept = [pairs for _, pairs in sorted(by_step.items()) if len(pairs) == most]
    columns = [(fmean(x for x, _ in pairs), [[y] for _, y in pairs]) for pairs in kept]
    return _series(name, sorted(columns), slot)


def _stretches(points: Points, low: float, width: float, most: int) -> list[list[float]]:
    values: list[list[float]] = [[] for _ in range(most)]
    for at, value in points:
        if value is not None:
            values[min(int((at - low) / width), most - 1)].append(value)
    return values


def _at(points: dict[float, float | None], at: float) -> list[float]:
    value = points.get(at)
    return [] if value is None else [value]


def _series(name: str, columns: Iterable[tuple[float, Sequence[Sequence[float]]]], slot: int) -> Series:
    """A column holds the values of each run; its mean is the mean of the runs' means."""
    x: list[float] = []
    y: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for at, of_runs in columns:
        values = [value for run in of_runs for value in run]
        x.append(at)
        y.append(fmean(fmean(run) for run in of_runs if run) if values else None)
        low.append(min(values, default=None))
        high.append(max(values, default=None))
    banded = low != high
    return Series(name, x, y, low if banded else (), high if banded else (), slot)
