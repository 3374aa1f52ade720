"""How often each whole number came up, as bars, with one number of one's own to compare with: placebo panels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from curate.reporting import frame
from curate.reporting.frame import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Plot
from curate.reporting.marks import mark, mark_entry
from curate.reporting.markup import element, figure
from curate.reporting.palette import colour_class
from curate.reporting.scales import Axis, fit_scale, narrow_scale


def tally_chart(title: str, values: Sequence[int], own: int, *, x: Axis, y: Axis, names: tuple[str, str]) -> Chart:
    """Bars at the whole numbers that `values` hold, a diamond on the axis at `own`. `names`: of both, for the legend.

    Example: `tally_chart("Placebo", [0, 0, 1], 9, x=Axis("flags"), y=Axis("selections"), names=("random", "this"))`.
    """
    counts = Counter(values)
    reach = [*values, own]
    across = narrow_scale([min(0, *reach) - 0.6, max(4, *reach) + 0.6], Axis(x.label, whole=True))
    plot = Plot(across, fit_scale(counts.values(), Axis(y.label, include=(0.0,), whole=True)))
    room = (WIDTH - LEFT - RIGHT) / (across.high - across.low)
    wide, bottom = max(2.0, min(26.0, room * 0.8)), HEIGHT - BOTTOM
    parts = [frame.axes(plot, x, y)]
    for value, count in sorted(counts.items()):
        top = plot.py(count)
        told = element("title", f"{names[0]}: {count} with {value}")
        parts.append(element("rect", told, x=plot.px(value) - wide / 2, y=top, width=wide, height=bottom - top,
                             class_=f"bar {colour_class(5)}"))  # fmt: skip
    at = plot.px(own)
    parts.append(element("path", d=f"M{figure(at)} {figure(TOP)}V{figure(bottom)}", class_="level"))
    parts.append(mark("diamond", at, bottom, 1, f"{names[1]}: {own}", 6))
    side = " end" if at > WIDTH / 2 else ""
    parts.append(element("text", f"{own}", x=at + (-8 if side else 8), y=TOP + 12, class_=f"name{side}"))
    listed = ", ".join(f"{count} with {value}" for value, count in sorted(counts.items()))
    words = f"{names[0]}: {listed}. {names[1]}: {own}."
    entries = [frame.box_entry(names[0], 5), mark_entry("diamond", f"{names[1]}: {own}", 1)]
    return Chart(title, words, frame.drawing(title, words, *parts), frame.legend(entries))
