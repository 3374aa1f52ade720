"""Draw accuracy against steps and against FLOPs: the ConvNet by noise, then the transformers; needs matplotlib.

python plot.py RUNS curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import matplotlib
from collect import Curve, gather, tower_of

matplotlib.use("Agg")
from matplotlib import pyplot

SOONEST = ("uniform-lr-3e-4", *(f"{arm}-from-1280-warm-20" for arm in ("jest", "flexi", "easy-reference")))
LINES = {"": ("uniform", "jest", "handover", "flexi", "flexi-handover"), "vit-": SOONEST, "vit-fff-": SOONEST}


def draw(found: dict[tuple[str, float], dict[int, Curve]], path: Path) -> None:
    """Accuracy against steps and against FLOPs, one row of panels for each tower and noise level."""
    rows = sorted({(tower_of(arm), noise) for arm, noise in found})
    figure, panels = pyplot.subplots(len(rows), 2, figsize=(11, 3.1 * len(rows)), squeeze=False)
    for row, (tower, noise) in zip(panels, rows, strict=True):
        for arm in (tower + line for line in LINES[tower]):
            curves = list(found.get((arm, noise), {}).values())
            if not curves:
                continue
            shortest = min(len(curve.step_E) for curve in curves)
            mean_E = [fmean(curve.accuracy_E[n] for curve in curves) for n in range(shortest)]
            flops_E = [fmean(curve.flops_E[n] for curve in curves) / 1e12 for n in range(shortest)]
            row[0].plot(curves[0].step_E[:shortest], mean_E, label=arm)
            row[1].plot(flops_E, mean_E, label=arm)
        row[0].set(ylabel=f"accuracy %, noise {noise:.0%}", xlabel="steps")
        row[1].set(xlabel="TFLOP, scoring counted", xlim=(0, None))
        row[0].legend(fontsize=8, loc="lower right")
        for panel in row:
            panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(gather(args.runs), args.picture)


if __name__ == "__main__":
    main()
