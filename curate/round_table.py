"""What the rounds of a recipe did, as one row each: pairs, steps, loss, metrics, FLOPs by phase, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.costs.ledger import PHASES, CostLedger
from curate.reports import amount, duration

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round. `pairs` came in and `kept` were left to train on; both None where nothing was scored before training.

    `loss` is the mean over the last tenth of the steps, `flops` is keyed by phase, `seconds` is wall time of all calls,
    interrupted ones included.
    """

    name: str
    pairs: int | None
    kept: int | None
    steps: int
    samples: int
    loss: float
    metrics: dict[str, float]
    flops: dict[str, float]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RecipeResult:
    """What `run` did: `model` is the learner of the last round. Also written as summary.json."""

    output: Path
    model: Path
    rows: tuple[RoundRow, ...]
    digest: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "schema": 1,
            "recipe": self.digest,
            "output": str(self.output),
            "model": str(self.model),
            "rounds": [row.as_json() for row in self.rows],
            "flops": {phase: sum(row.flops[phase] for row in self.rows) for phase in PHASES},
            "seconds": round(sum(row.seconds for row in self.rows), 3),
        }


def round_row(
    name: str, score: Mapping[str, Any] | None, train: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> RoundRow:
    """The row of a round, from what its parts left. The fit of a reference is all counted as the reference's."""
    ledger = of_reference(train) if name == "reference" else CostLedger.from_json(train["ledger"])
    if score is not None:
        ledger = CostLedger.from_json(score["ledger"]) + ledger
    flops = {str(name): getattr(ledger, name).flops + getattr(ledger, name).optimiser for name in PHASES}
    parts = [part for part in (score, train, evaluation) if part is not None]
    return RoundRow(
        name=name,
        pairs=None if score is None else score["counts"]["in"],
        kept=None if score is None else score["counts"]["kept"],
        steps=train["steps"],
        samples=train["samples"],
        loss=train["loss"],
        metrics={} if evaluation is None else _metrics(evaluation["found"]),
        flops=flops,
        seconds=sum(part["seconds"] for part in parts),
    )


def of_reference(train: Mapping[str, Any]) -> CostLedger:
    """What fitting the reference has cost, all of it under `reference`."""
    whole = CostLedger.from_json(train["ledger"]).total
    return CostLedger().add(
        "reference", samples=whole.samples, flops=whole.flops + whole.optimiser, seconds=whole.seconds,
        energy=whole.energy,
    )  # fmt: skip


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures that a table has room for."""
    metrics = {}
    if found["zeroshot"] is not None:
        metrics["zero-shot"] = found["zeroshot"]["top1"]["value"]
    if found["retrieval"] is not None:
        for name, side in (("image>text@1", "image_to_text"), ("text>image@1", "text_to_image")):
            metrics[name] = found["retrieval"][side]["1"]["recall"]["value"]
    return metrics


def render_rounds(result: RecipeResult, console: Console) -> None:
    """Print a row for each round, and the sum; the phases' columns are FLOPs."""
    metrics = list(dict.fromkeys(name for row in result.rows for name in row.metrics))
    lines = [["round", "in", "kept", "steps", "loss", *metrics, *PHASES[:3], "time"]]
    for row in result.rows:
        shown = [f"{row.metrics[name]:.1%}" if name in row.metrics else "" for name in metrics]
        counts = [_count(row.pairs), _count(row.kept), _count(row.steps)]
        lines.append([row.name, *counts, f"{row.loss:.4f}", *shown, *_costs([row])])
    if len(result.rows) > 1:
        steps = sum(row.steps for row in result.rows)
        lines.append(["all", "", "", _count(steps), "", *("" for _ in metrics), *_costs(result.rows)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        console.print("  ".join(cells), markup=False, highlight=False, soft_wrap=True)


def _costs(rows: Sequence[RoundRow]) -> list[str]:
    flops = [sum(row.flops[phase] for row in rows) for phase in PHASES[:3]]
    return [*(amount(value, "").strip() if value else "-" for value in flops), duration(sum(r.seconds for r in rows))]


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
