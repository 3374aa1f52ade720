"""Draw results.json as the figures of README.md. Needs matplotlib, which the package does not need.

    python examples/audit/plot.py --results examples/audit/results.json --to examples/audit

A dot is one seed's ratio to the rest, a line its 95 % interval, the bracket what one seed's audit could not have seen,
the band the screening range 0.8 to 1.25.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
from tables import FLOORS, HERE, MULTILINGUAL, given_up, groups, seeds

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

COLOURS: Final = ("#1b6ca8", "#c8553d", "#3d8361")
SHAPES: Final = ("o", "s", "D")
pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "curate"})


def forest(axes: Axes, found: Sequence[tuple[str, dict[str, list[dict[str, Any]]]]], title: str) -> None:
    """A line for each group, in it each audit's seeds in one colour and shape."""
    names = list(found[0][1])
    axes.axvspan(0.8, 1.25, color="#8888", alpha=0.18, lw=0)
    axes.axvline(1, color="#555", lw=0.8)
    for row, name in enumerate(names):
        blind = [one["sees"] for one in found[0][1][name] if one["sees"][0]]
        for low, high in blind[:1]:
            axes.plot([low, high or 4], [row, row], color="#999", lw=5, alpha=0.25, solid_capstyle="butt")
        for arm, (_, every) in enumerate(found):
            own = [one["ratio"] for one in every.get(name, []) if one["ratio"] and one["ratio"][0]]
            for seed, (value, low, high) in enumerate(own):
                place = row + 0.26 * (arm - (len(found) - 1) / 2) + 0.07 * (seed - (len(own) - 1) / 2)
                axes.plot([low, high or 4], [place, place], color=COLOURS[arm], lw=0.8)
                axes.plot(value, place, SHAPES[arm], color=COLOURS[arm], ms=3.2)
    for arm, (label, _) in enumerate(found):
        axes.plot([], [], SHAPES[arm], color=COLOURS[arm], ms=4, label=label)
    axes.set(xscale="log", xlim=(0.25, 4), ylim=(len(names) - 0.4, -0.6), title=title, xlabel="ratio to the rest")
    ticks = [0.3, 0.5, 0.8, 1, 1.25, 2, 3]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), [f"{name}  n {found[0][1][name][0]['n']:,}" for name in names])


def _legend(figure: Any, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def locales(results: Any) -> Any:
    """Languages: plain draws, and under the floor."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained", sharey=True)
    for axes, (criterion, key) in zip(panels, MULTILINGUAL.items(), strict=True):
        arms = [("plain draw", groups(results, key, "locale")),
                ("under the floor 0.8", groups(results, f"{key}/floor-0.8", "locale"))]  # fmt: skip
        forest(axes, arms, criterion)
    _legend(figure, panels[0])
    return figure


def prices(results: Any) -> Any:
    """The price of floors, a point for each seed."""
    figure, axes = pyplot.subplots(figsize=(4.8, 3), layout="constrained")
    for arm, (criterion, key) in enumerate(MULTILINGUAL.items()):
        lines = [[100 * given_up(one) for one in seeds(results, "certificates", f"{key}/floor-{floor}")]
                 for floor in FLOORS]  # fmt: skip
        for seed in zip(*lines, strict=False):
            axes.plot([float(floor) for floor in FLOORS], seed, f"{SHAPES[arm]}-", color=COLOURS[arm], ms=4, lw=0.8)
        axes.plot([], [], f"{SHAPES[arm]}-", color=COLOURS[arm], label=criterion)
    axes.set(xlabel="floor: least ratio to the pool's rate, every language", ylabel="score given up, %")
    axes.legend(fontsize=8, frameon=False)
    return figure


def people(results: Any) -> Any:
    """Tones and genders, by what the reference had seen."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    titles = {"saw every style": "people/english", "saw no tones": "people/toneless"}
    for axes, column in zip(panels, ("tone", "gender"), strict=True):
        arms = [(title, groups(results, key, column)) for title, key in titles.items()]
        if column == "tone":
            arms.append(("saw no tones, floor 0.8", groups(results, "people/toneless/floor-0.8", column)))
        forest(axes, arms, f"{column}, as the corpus labels it")
    _legend(figure, panels[0])
    return figure


def training(results: Any) -> Any:
    """Languages in a run of training: draws of each, plain and under the floor, early and late."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
    for axes, (title, key) in zip(panels, (("plain", "plain"), ("under the floor 0.8", "floor-0.8")), strict=True):
        rows = results["audits"][f"training/{key}/0"]["columns"]["locale"]["groups"]
        names = sorted(rows)
        draws = [rows[name]["draws"] / rows[name]["n"] for name in names]
        unique = [rows[name]["kept"] / rows[name]["n"] for name in names]
        axes.bar(names, draws, color=COLOURS[0], label="draws per candidate")
        axes.bar(names, unique, color=COLOURS[1], width=0.4, label="of which different ones")
        axes.set(title=title)
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def books(results: Any) -> Any:
    """Subjects and kinds: crude, and at equal caption length."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, column in zip(panels, ("book", "kind"), strict=True):
        plain = groups(results, "openstax", column)
        equal = {name: [row | {"ratio": row["held"][0][1]} for row in rows] for name, rows in plain.items()}
        held = groups(results, "openstax/floor-0.8", column)
        forest(axes, [("crude", plain), ("at equal caption length", equal), ("floor 0.8, crude", held)], column)
    _legend(figure, panels[0])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--to", type=Path, default=HERE)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    for draw in (locales, prices, people, training, books):
        draw(results).savefig(args.to / f"{draw.__name__}.png", dpi=90)


if __name__ == "__main__":
    main()
