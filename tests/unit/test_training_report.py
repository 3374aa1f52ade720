"""The training report: what it says of logs that are whole, torn, resumed, unfinished or hostile, and who has won."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from curate.costs.energy import Energy, Joules
from curate.costs.ledger import CostLedger
from curate.errors import UsageError
from curate.learner.report import write_report
from curate.learner.report.history import last_ledger, read_history

HOSTILE = '<script>alert("1")</script>\u202egnp.exe<img src=x onerror=alert(2)>'
CPU = Energy(
    processor=Joules(measured=3100.0, measured_seconds=60.0),
    memory=Joules(unavailable_seconds=60.0, reasons=("no RAPL domain for memory",)),
    accelerator=Joules(unavailable_seconds=60.0, reasons=("no NVIDIA driver",)),
)


@dataclass(frozen=True)
class Run:
    """A synthetic run: accuracy rises as 1 - exp(-step / pace), up to `top`."""

    seed: int = 0
    criterion: str = "learnability"
    steps: int = 300
    pace: float = 40.0
    top: float = 0.46
    model: str = "curate-tiny"
    ledgers: bool = True
    finished: bool = True
    lag: bool = False
    estimator: float | None = None

    @property
    def selects(self) -> bool:
        return self.criterion != "uniform"

    def ledger(self, step: int) -> CostLedger:
        ledger = CostLedger("node").add(
            "training", samples=128 * step, flops=step * 5.6e11, optimiser=step * 1e9, seconds=0.15 * step, energy=CPU
        )
        if not self.selects:
            return ledger
        ledger = ledger.add("scoring", samples=640 * step, flops=step * 9.4e11, seconds=0.2 * step)
        return ledger.add("reference", samples=2500, flops=3.6e12, seconds=9.0).add("evaluation", flops=step * 1e10)

    def accuracy(self, step: int) -> float:
        fall = 0.03 * max(step - 200, 0) / 100 if not self.selects else 0.0
        return round(self.top * (1 - math.exp(-step / self.pace)) - fall + 0.004 * math.sin(7 * self.seed + step), 4)

    def records(self) -> Iterator[dict[str, Any]]:
        settings = {"model": self.model, "criterion": self.criterion, "seed": self.seed, "lr": 2e-3, "gain": 100.0,
                    "betas": [0.9, 0.95], "augment": False, "eval_shards": [HOSTILE]}  # fmt: skip
        factor = {"factor": 2.67, "factor_text": "without reuse: 2/3 + 5/3"} if self.selects else {"factor": 1.0}
        yield {"kind": "start", "model": self.model, "reference": "local-dir:ref" if self.selects else None,
               "criterion": self.criterion, "settings": settings, "samples": 2500, "steps": self.steps,
               "super_batch": 640 if self.selects else 128, "sub_batch": 128, "chunks": 16, "parameters": 1234567,
               "flops_per_sample": 1.46e9, **factor}  # fmt: skip
        if self.estimator is not None:
            yield {"kind": "probe", "estimator": "forward", "progress": self.estimator, "cosine": 0.002, "seeds": 16,
                   "heads_progress": 0.08}  # fmt: skip
        for step in range(1, self.steps + 1):
            yield self.step(step)
            yield from self.measurements(step)
        if self.finished:
            yield {"kind": "end", "steps": self.steps, "seconds": 0.35 * self.steps, "loss": 1.9, "factor": 2.71,
                   "repeats": {"1": 900, "2": 330, "3": 60, "11": 4}, "ledger": self.ledger(self.steps).as_json()}  # fmt: skip

    def step(self, step: int) -> dict[str, Any]:
        late = step / self.steps
        selecting = self.selects and step <= 200
        wave = math.sin(step * 12.9898 + self.seed)
        chunks = [round((1.2 - late) * (1 - 0.03 * n) - 0.02 * n + 0.05 * wave, 4) for n in range(16)]
        return {
            "kind": "step", "step": step, "samples": 128 * step, "candidates": 640 * step if self.selects else 0,
            "loss": 1.8 + 3.0 * math.exp(-step / self.pace) + 0.15 * wave, "lr": 1e-3 * (1 - late),
            "phase": "selecting" if selecting else "uniform", "gain": 100.0 if selecting else 0.0,
            "keep": 0.2 if selecting else 1.0, "chunk_scores": chunks if selecting else None,
            "effective": 6 + 180 * late**2 + 3 * wave if selecting else None,
            "clean": 0.9 - 0.2 * late + 0.04 * wave if self.selects else 0.2, "clean_pool": 0.2 + 0.02 * wave,
            "flops": self.ledger(step).flops(), "seconds": (0.35 if self.selects else 0.15) * step,
        }  # fmt: skip

    def measurements(self, step: int) -> Iterator[dict[str, Any]]:
        if self.selects and step % 50 == 0:
            learner = {"loss": 2.2 * math.exp(-step / 150) + 0.9, "recall": 0.5 * (1 - math.exp(-step / 120))}
            yield {"kind": "watch", "step": step, "learner": learner, "reference": {"loss": 1.48, "recall": 0.41},
                   "noise": 0.31, "phase": "selecting"}  # fmt: skip
        if self.selects and step == 200:
            yield {"kind": "handover", "step": 200, "from": "selecting", "to": "uniform",
                   "why": "the learner's loss on the trusted set (1.42) is below the reference's (1.48)"}  # fmt: skip
        if self.lag and step % 50 == 0:
            yield {"kind": "lag", "step": step, "lag": 4, "rank_correlation": 0.97, "overlap": 0.91}
        if step % 20 == 0:
            accuracy = self.accuracy(step)
            record: dict[str, Any] = {
                "kind": "eval", "step": step, "samples": 128 * step, "flops": self.ledger(step).flops(),
                "seconds": (0.35 if self.selects else 0.15) * step,
                "retrieval": {"pairs": 500, "pool": 100, "image_to_text": accuracy - 0.1, "text_to_image": accuracy - 0.12},
                "zeroshot": {"samples": 2000, "classes": 10, "accuracy": accuracy},
            }  # fmt: skip
            yield record | ({"ledger": self.ledger(step).as_json()} if self.ledgers else {})

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.records()))
        return folder
