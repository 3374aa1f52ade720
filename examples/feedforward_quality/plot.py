"""Draw results.json as curves.png (accuracy) and usage.png (where the tokens go), and print its table in Markdown.

    python examples/feedforward_quality/plot.py examples/feedforward_quality/results.json

Runs of more epochs are read from results_long.json beside it, if there is one. Needs matplotlib, which the package
does not need.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from arms import ARMS, MAIN
from study import effective_leaves, read

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
COLOURS = dict(zip(MAIN, ("#222222", "#888888", "#0a6fb8", "#d1661a"), strict=True))
BLUES = ("#9cc4e4", "#3f88c5", "#12355b")
Runs = dict[str, list[dict[str, Any]]]


def by_arm(results: dict[str, dict[str, Any]]) -> Runs:
    """The runs of every arm, in the order of their seeds."""
    runs: Runs = defaultdict(list)
    for name in sorted(results):
        runs[name.split("/")[0]].append(results[name])
    return runs


def last(runs: list[dict[str, Any]]) -> list[float]:
    """The accuracy of every run after its last epoch."""
    return [run["accuracy"][-1] for run in runs]


def curves(runs: Runs, long: Runs, path: Path) -> None:
    """Mean and range over the seeds per epoch; the long runs likewise; every run of every arm at its last epoch."""
    figure, axes = plt.subplots(1, 3 if long else 2, figsize=(12 if long else 9.5, 3.8), layout="tight")
    _over_epochs(axes[0], runs)
    axes[0].set(ylabel="test accuracy, %", title=f"{len(runs[MAIN[0]])} seeds: mean and range")
    if long:
        _over_epochs(axes[1], long)
        axes[1].set(title="longer, one seed")
    order = sorted((name for name in ARMS if name in runs), key=lambda name: statistics.mean(last(runs[name])))
    for place, name in enumerate(order):
        ends = [100 * value for value in last(runs[name])]
        axes[-1].plot(ends, [place] * len(ends), "o", ms=4, color=COLOURS.get(name, "#6a9a58"))
    axes[-1].set_yticks(range(len(order)), order)
    axes[-1].set(xlabel="test accuracy after the last epoch, %", title="every run of 4 epochs")
    axes[-1].grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def _over_epochs(axis: Any, runs: Runs) -> None:
    for name in (name for name in MAIN if name in runs):
        epochs = [[100 * value for value in epoch] for epoch in zip(*(r["accuracy"] for r in runs[name]), strict=True)]
        at, colour = range(1, len(epochs) + 1), COLOURS[name]
        axis.plot(at, [statistics.mean(epoch) for epoch in epochs], color=colour, marker="o", ms=3, label=name)
        axis.fill_between(at, [min(e) for e in epochs], [max(e) for e in epochs], color=colour, alpha=0.15, lw=0)
        axis.set_xticks(list(at))
    axis.set(xlabel="epoch")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(loc="lower right")


def usage(runs: Runs, path: Path) -> None:
    """Above: shares of the leaves of every layer after training, largest first. Below: effective leaves over epochs."""
    names = [name for name in ("fff-32", "fff-24+8", "no-balance", "no-gate", "random-nodes") if name in runs]
    figure, axes = plt.subplots(2, len(names), figsize=(2.3 * len(names), 4.4), sharey="row", squeeze=False)
    for name, above, below in zip(names, axes[0], axes[1], strict=True):
        for layer, epochs in enumerate(zip(*runs[name][0]["usage"], strict=True)):
            style = {"color": BLUES[layer], "label": f"block {layer + 1}"}
            shares = [count / sum(epochs[-1]) for count in sorted(epochs[-1], reverse=True)]
            above.bar([leaf + 0.27 * (layer - 1) for leaf in range(len(shares))], shares, 0.25, **style)
            below.plot(range(1, len(epochs) + 1), [effective_leaves(e) for e in epochs], marker="o", ms=3, **style)
            below.set_xticks(range(1, len(epochs) + 1))
        above.axhline(1 / 8, color="#aaaaaa", lw=0.8, ls="--")
        above.set(title=name, xlabel="leaf, by its share")
        below.set(xlabel="epoch", ylim=(0, 8.3))
    axes[0][0].set_ylabel("share of test tokens")
    axes[1][0].set_ylabel("effective leaves of 8")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(runs: Runs) -> None:
    """Per arm: cost, training loss and test accuracy over the seeds, effective leaves."""
    columns = ("arm", "seeds", "neurons used", "operations", "weights", "loss", "accuracy, %", "range", "leaves")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in (name for name in ARMS if name in runs):
        logs, ends, losses = (
            runs[name],
            [100 * value for value in last(runs[name])],
            [r["loss"][-1] for r in runs[name]],
        )
        spread = f" ± {statistics.stdev(ends):.2f}" if len(ends) > 1 else ""
        cost = (logs[0]["active"], f"{logs[0]['operations']:,}", f"{logs[0]['weights']:,}")
        quality = (f"{statistics.mean(losses):.3f}", f"{statistics.mean(ends):.2f}{spread}")
        cells = (name, len(logs), *cost, *quality, f"{min(ends):.2f} to {max(ends):.2f}", evenness(logs))
        print(f"| {' | '.join(map(str, cells))} |")


def evenness(logs: list[dict[str, Any]]) -> str:
    """Effective leaves after training per block, mean over the seeds: "7.1 6.8 5.9"; nothing for a dense layer."""
    ends = [log["usage"][-1] or log.get("hardened_usage", []) for log in logs]
    return " ".join(f"{statistics.mean(map(effective_leaves, layer)):.1f}" for layer in zip(*ends, strict=True))


def main() -> None:
    path = Path(sys.argv[1])
    runs, long = (by_arm(read(file)) for file in (path, path.with_stem(f"{path.stem}_long")))
    for kind in (runs, long):
        table(kind)
    curves(runs, long, path.with_name("curves.png"))
    usage(runs, path.with_name("usage.png"))


if __name__ == "__main__":
    main()
