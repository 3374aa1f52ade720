"""Put the runs of the study into results.json and tables.md.

    python collect.py RUNS DIRECTORY

Accuracy is zero-shot on 5,000 test images, in percent, mean over seeds. "Reached" is the first measurement at which an
arm is as good as uniform's best one of the same seed, noise and tower, where uniform is the arm of uniform draws that
did best, whatever its learning rate and warm-up. FLOPs are training, scoring and the optimiser, with the reference's
part (fitting excluded, scoring the pool once) in the last column. "Worst" is the largest lag behind uniform at equal
steps of the mean over seeds, smoothed over five measurements (125 steps).
"""

# S seeds, E evaluations

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from curate.learner.journal import read_log

RUN = re.compile(r"(.+)-noise-([\d.]+)-seed-(\d+)")
SHOWN = (50, 100, 150, 200, 300, 400, 600, 800, 1000)


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: steps, accuracy, FLOPs without and with the reference's, candidates at each evaluation; phases; the
    clean share of what was trained on."""

    step_E: list[int]
    accuracy_E: list[float]
    flops_E: list[float]
    whole_E: list[float]
    candidates_E: list[int]
    events: list[dict[str, Any]]
    clean: float | None

    def at(self, step: int) -> float | None:
        """Accuracy at a step, None where it was not measured."""
        return self.accuracy_E[self.step_E.index(step)] if step in self.step_E else None

    def best(self) -> float:
        return max(self.accuracy_E)

    def within(self, spent_E: Sequence[float], limit: float) -> float:
        """Accuracy at the last evaluation that spent no more."""
        return [a for a, spent in zip(self.accuracy_E, spent_E, strict=True) if spent <= limit][-1]

    def first(self, target: float) -> int | None:
        """The first evaluation that reaches the target."""
        return next((n for n, value in enumerate(self.accuracy_E) if value >= target), None)


def read(run: Path) -> Curve:
    """A finished run's log."""
    lines = list(read_log(run / "log.jsonl"))
    evals = [line for line in lines if line["kind"] == "eval"]
    reference = [line["ledger"]["reference"]["flops"] for line in evals]
    steps = [line for line in lines if line["kind"] == "step"]
    looked = {line["step"]: max(line["candidates"], line["samples"]) for line in steps} | {0: 0}
    clean = [line["clean"] for line in lines if line["kind"] == "step" and line["clean"] is not None]
    return Curve(
        [line["step"] for line in evals],
        [round(100 * line["zeroshot"]["accuracy"], 2) for line in evals],
        [line["flops"] - part for line, part in zip(evals, reference, strict=True)],
        [line["flops"] for line in evals],
        [looked[line["step"]] for line in evals],
        [{k: line[k] for k in ("step", "to", "why")} for line in lines if line["kind"] == "handover"],
        round(fmean(clean), 3) if clean else None,
    )


def gather(runs: Path) -> dict[tuple[str, float], dict[int, Curve]]:
    """Curves by (arm, noise) and seed."""
    found: dict[tuple[str, float], dict[int, Curve]] = defaultdict(dict)
    for path in sorted(runs.iterdir()):
        if (name := RUN.fullmatch(path.name)) and (path / "done").exists():
            found[name[1], float(name[2])][int(name[3])] = read(path)
    return dict(found)


def table(found: dict[tuple[str, float], dict[int, Curve]], noise: float) -> list[str]:
    """Markdown rows of one noise level: accuracy by step, best, and the price of uniform's best."""
    head = ["arm", "seeds", *map(str, SHOWN), "best", "at equal FLOPs", "at equal candidates", "worst", "reached by"]
    head += ["fewer steps", "fewer FLOPs", "with reference"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (arm, at), curves in found.items():
        if at == noise:
            base = _baseline(found, arm, noise)
            rows.append(
                "| "
                + " | ".join([arm, str(len(curves)), *_levels(curves), *_budgets(curves, base), *_prices(curves, base)])
                + " |"
            )
    return rows


def _levels(curves: dict[int, Curve]) -> list[str]:
    cells = []
    for step in SHOWN:
        values = [value for curve in curves.values() if (value := curve.at(step)) is not None]
        cells.append(f"{fmean(values):.1f}" if values else "")
    return [*cells, f"{_best(curves):.1f}"]


def _baseline(found: dict[tuple[str, float], dict[int, Curve]], arm: str, noise: float) -> dict[int, Curve]:
    """Uniform draws of the same tower, at the rate and warm-up whose best accuracy is highest (mean over all seeds)."""
    plain = re.compile(tower_of(arm) + "uniform.*")
    arms = [curves for (name, at), curves in found.items() if at == noise and plain.fullmatch(name)]
    most = max(map(len, arms), default=0)
    return max((one for one in arms if len(one) == most), key=_best, default={})


def tower_of(arm: str) -> str:
    """What the names of a tower's arms begin with: "" is the ConvNet."""
    return next((tower for tower in ("vit-fff-", "vit-") if arm.startswith(tower)), "")


def _best(curves: dict[int, Curve]) -> float:
    return fmean(curve.best() for curve in curves.values())


def _budgets(curves: dict[int, Curve], base: dict[int, Curve]) -> list[str]:
    """Accuracy within what uniform spent in all its steps, and the largest smoothed lag behind it at equal steps."""
    seeds = sorted(curves.keys() & base.keys())
    if not seeds:
        return ["", "", ""]
    flops = [curves[s].within(curves[s].flops_E, base[s].flops_E[-1]) for s in seeds]
    candidates = [curves[s].within(curves[s].candidates_E, base[s].candidates_E[-1]) for s in seeds]
    count = min(len(curves[s].accuracy_E) for s in seeds)
    gaps = [fmean(curves[s].accuracy_E[n] - base[s].accuracy_E[n] for s in seeds) for n in range(1, count)]
    smooth = [fmean(gaps[n : n + 5]) for n in range(len(gaps) - 4)] or gaps
    return [f"{fmean(flops):.1f}", f"{fmean(candidates):.1f}", f"{min(smooth):+.1f}"]


def _prices(curves: dict[int, Curve], base: dict[int, Curve]) -> list[str]:
    """Seeds that reached uniform's best, and geometric means of the ratios over these."""
    ratios = []
    for seed in sorted(curves.keys() & base.keys()):
        plain, ours = base[seed], curves[seed]
        there, here = plain.first(plain.best()), ours.first(plain.best())
        if there and here:
            ratios.append([
                plain.step_E[there] / ours.step_E[here],
                plain.flops_E[there] / ours.flops_E[here],
                plain.flops_E[there] / ours.whole_E[here],
            ])  # fmt: skip
    reached = f"{len(ratios)} of {len(curves.keys() & base.keys())}"
    if not ratios:
        return [reached, "", "", ""]
    return [reached, *(f"{_geometric([row[n] for row in ratios]):.1f}" for n in range(3))]


def _geometric(values: list[float]) -> float:
    product = 1.0
    for value in values:
        product *= value
    return float(product ** (1 / len(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    found = gather(args.runs)
    plain = {
        f"{arm}-noise-{noise:g}": {
            seed: {"step": c.step_E, "accuracy": c.accuracy_E, "flops": [float(f"{f:.4g}") for f in c.flops_E],
                   "candidates": c.candidates_E,
                   "events": c.events, "clean": c.clean}
            for seed, c in curves.items()
        }
        for (arm, noise), curves in found.items()
    }  # fmt: skip
    (args.directory / "results.json").write_text(json.dumps(plain) + "\n")
    lines = []
    for noise in sorted({noise for _, noise in found}, reverse=True):
        lines += [f"Noise {noise:.0%}", "", *table(found, noise), ""]
    (args.directory / "tables.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
