"""Draw results.json as curves.png, and print its tables in Markdown. Needs matplotlib, which the package does not need.

python examples/estimators/plot.py examples/estimators/results.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
Runs = dict[str, dict[str, Any]]


def by_arm(runs: Runs) -> dict[str, dict[str, Any]]:
    """name -> {rate or depth or width: run}."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, run in runs.items():
        name, _, place = key.rpartition("/")
        found[name][place] = run
    return found


def best(runs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The rate whose loss on held-out pairs ends lowest."""
    return min(runs.items(), key=lambda item: item[1]["loss"][-1])


def curves(results: dict[str, Runs], path: Path) -> None:
    """Held-out loss and recall against processor time, each arm at its best rate; peak memory against depth."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="tight")
    arms = sorted(by_arm(results.get("curves", {})).items(), key=lambda item: best(item[1])[1]["loss"][-1])
    for place, (name, runs) in enumerate(arms):
        _, run = best(runs)
        style = {"label": name, "color": plt.get_cmap("tab20")(place), "lw": 2 if name == "backprop" else 1.2}
        axes[0].plot(run["seconds"], run["loss"], **style)
        axes[1].plot(run["seconds"], [100 * share for share in run["recall"]], **style)
    axes[0].set(xlabel="seconds of processor time", ylabel="loss of held-out pairs")
    axes[1].set(xlabel="seconds of processor time", ylabel="recall at one of 100, %")
    axes[1].legend(fontsize=7)
    for name, runs in by_arm(results.get("memory", {})).items():
        depths = sorted(runs, key=int)
        axes[2].plot([int(d) for d in depths], [runs[d]["mib"] for d in depths], marker="o", ms=3, label=name)
    axes[2].set(xlabel="blocks of each tower", ylabel="peak of a step, MiB", yscale="log")
    axes[2].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def learned(runs: Runs) -> None:
    """Per arm, at its best rate: steps, loss and recall at the end."""
    print("| estimator | rates tried | best | steps | loss | recall, % |\n|---|---|---|---|---|---|")
    for name, own in sorted(by_arm(runs).items(), key=lambda item: best(item[1])[1]["loss"][-1]):
        rate, run = best(own)
        ends = f"{run['steps'][-1]:,.0f} | {run['loss'][-1]:.2f} | {100 * run['recall'][-1]:.1f}"
        print(f"| {name} | {', '.join(own)} | {rate} | {ends} |")


def grid(runs: Runs, value: str, form: str) -> None:
    """One row per arm, one column per depth or width."""
    arms = by_arm(runs)
    places = sorted({place for own in arms.values() for place in own}, key=int)
    print(f"| | {' | '.join(places)} |\n|{'---|' * (1 + len(places))}")
    for name, own in arms.items():
        cells = [format(own[place][value], form) if place in own else "" for place in places]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    path = Path(sys.argv[1])
    results = json.loads(path.read_text())
    curves(results, path.with_name("curves.png"))
    if "curves" in results:
        learned(results["curves"])
    for part, value, form in (("memory", "mib", ".1f"), ("time", "ratio", ".2f")):
        if part in results:
            print()
            grid(results[part], value, form)


if __name__ == "__main__":
    main()
