"""Bars and histograms as inline SVG, in the frame of `curate.reporting.charts`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from markupsafe import Markup

from curate.reporting import frame
from curate.reporting.charts import Series, line_chart
from curate.reporting.frame import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Chart, Plot
from curate.reporting.markup import element
from curate.reporting.palette import colour_class
from curate.reporting.scales import Axis, can_show, fit_scale, short


def bar_chart(
    title: str, labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, x: Axis, y: Axis
) -> Chart:
    """Bars side by side: for each label one of each series, in the order of the legend, with its number on top.

    Bars start at 0; on a logarithmic axis below the smallest value, where a bar for 0 is not drawn. Example:
    `bar_chart("Repeats", ["1", "2"], [("JEST", [900, 30])], x=Axis("times"), y=Axis("samples"))`.
    """
    values = [value for _, column in series for value in column]
    ground = min((v for v in values if can_show(v, y.log) and v > 0), default=1.0) / 2 if y.log else 0.0
    plot = Plot(fit_scale((0, 1), Axis()), fit_scale(values, replace(y, include=(*y.include, ground))))
    room = (WIDTH - LEFT - RIGHT) / max(len(labels), 1)
    parts = [frame.y_grid(plot), *frame.axis_labels(x, y)]
    for n, label in enumerate(labels):
        start = LEFT + n * room
        parts += _cluster(plot, start, room, [(name, column[n]) for name, column in series], label)
        parts.append(element("text", label, x=start + room / 2, y=HEIGHT - BOTTOM + 17, class_="tick middle"))
    words = " ".join(f"{name}: {_listed(labels, column)}." for name, column in series)
    entries = [frame.box_entry(name, slot) for slot, (name, _) in enumerate(series)] if len(series) > 1 else []
    return Chart(title, words, frame.drawing(title, words, *parts), frame.legend(entries))


def histogram(
    title: str, groups: Sequence[tuple[str, Iterable[float]]], *, x: Axis, bins: int = 24, share: bool | None = None
) -> Chart:
    """How values are distributed: outlines over common bins of equal width (equal ratio where `x` is logarithmic).

    `share` shows parts of each group instead of counts; None does so where there are several groups. Values that the
    axis cannot show are left out, and the description says how many.
    """
    every = [(name, list(values)) for name, values in groups]
    kept = [(name, [v for v in values if can_show(v, x.log)]) for name, values in every]
    edges = _edges([v for _, values in kept for v in values], x.log, bins)
    parts = len(every) > 1 if share is None else share
    series = [_outline(name, values, edges, parts, slot) for slot, (name, values) in enumerate(kept)]
    words = " ".join(f"{name}: {_spread(values)}." for name, values in kept)
    left = sum(len(values) for _, values in every) - sum(len(values) for _, values in kept)
    words += f" Not shown: {left} values that are missing or outside the axis." if left else ""
    y = Axis("share of the group" if parts else "count", include=(0.0,))
    return line_chart(title, series, x=x, y=y, words=words)


def _cluster(
    plot: Plot, start: float, room: float, values: Sequence[tuple[str, float]], label: str
) -> Iterator[Markup]:
    wide = 0.76 * room / len(values)
    for slot, (name, value) in enumerate(values):
        left = start + 0.12 * room + slot * wide
        ends = f"{name}, {label}: {value:g}"
        if plot.y.shows(value):
            top, ground = plot.py(value), plot.py(plot.y.low if plot.y.log or plot.y.low > 0 else 0.0)
            yield element("rect", element("title", ends), x=left, y=min(top, ground), width=wide * 0.94,
                          height=abs(ground - top), class_=f"bar {colour_class(slot)}")  # fmt: skip
            above = min(top, ground) - 4
        else:
            above = HEIGHT - BOTTOM - 4
        if wide >= 6.5 * len(short(value)):
            yield element("text", short(value), x=left + wide / 2, y=above, class_="tick middle")


def _outline(name: str, values: Sequence[float], edges: Sequence[float], parts: bool, slot: int) -> Series:
    whole = max(len(values), 1) if parts else 1
    tall = [count / whole for count in _counted(values, edges)]
    closed: list[float | None] = [*tall, 0.0]
    return Series(name, edges, closed, [0.0] * len(edges), closed, slot, step=True)


def _edges(values: Sequence[float], log: bool, bins: int) -> list[float]:
    """`bins` + 1 edges from the smallest value to the largest."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    if log:
        return [low * (high / low) ** (n / bins) for n in range(bins + 1)]
    return [low + (high - low) * n / bins for n in range(bins + 1)]


def _counted(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values lie in each bin; the last bin has its upper edge too, whatever rounding made of it."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return counts


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "no values"
    middle = sorted(values)[len(values) // 2]
    return f"{len(values):,} values from {min(values):.3g} to {max(values):.3g}, median {middle:.3g}"


def _listed(labels: Sequence[str], column: Sequence[float]) -> str:
    return ", ".join(f"{label} {value:g}" for label, value in zip(labels, column, strict=True))
