"""A run's log.jsonl as a value: what was trained, its steps and its measurements. Forgiving, since reports are made of
runs that were killed, resumed or are still going.

A torn last line is left out. A step that comes a second time means that the run was resumed from before it: everything
from that step on is replaced by what follows. A figure that is missing, not a number or endless is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from curate.costs.ledger import CostLedger
from curate.errors import UsageError
from curate.learner.journal import LOG

Record = Mapping[str, Any]
METRICS: Final = ("accuracy", "recall", "image_to_text", "text_to_image")
_DATED: Final = ("step", "watch", "handover", "lag", "eval", "quota", "short")
_ONCE: Final = ("start", "probe", "policy", "certificate", "end")
_DIRECTIONS: Final = ("image_to_text", "text_to_image")


@dataclass(frozen=True, slots=True)
class History:
    """One run. The lists are in the order of steps; `end` is None for a run that has not finished."""

    path: Path
    start: Record = field(default_factory=dict)
    steps: Sequence[Record] = ()
    watches: Sequence[Record] = ()
    handovers: Sequence[Record] = ()
    lags: Sequence[Record] = ()
    evals: Sequence[Record] = ()
    probes: Sequence[Record] = ()
    quotas: Sequence[Record] = ()
    shorts: Sequence[Record] = ()
    policy: Record | None = None
    certificate: Record | None = None
    end: Record | None = None
    resumed: int = 0
    unreadable: int = 0

    @property
    def settings(self) -> Record:
        """The settings as the log's first line has them."""
        found = self.start.get("settings")
        return found if isinstance(found, Mapping) else {}

    @property
    def seed(self) -> int | None:
        """The seed, by which runs are paired."""
        seed = self.settings.get("seed")
        return seed if type(seed) is int else None

    @property
    def before(self) -> CostLedger:
        """What was spent for this run before it began, as by the scoring and the earlier rounds of a recipe."""
        return ledger_of({"ledger": self.start.get("before")}) or CostLedger()

    @property
    def last_step(self) -> int:
        """How many steps the log has."""
        return int(number(self.steps[-1], "step") or 0) if self.steps else 0


def read_history(run: Path) -> History:
    """Read RUN/log.jsonl. Errors: UsageError where there is none, or nothing in it can be read."""
    path = run / LOG
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise UsageError(
            f"{run}: no {LOG} can be read ({error.strerror}); is it the directory of a training run?"
        ) from error
    lines = [line for line in text.split("\n") if line.strip()]
    records = [_parsed(line) for line in lines]
    torn = bool(records) and records[-1] is None and not text.endswith("\n")
    found = [record for record in records if record is not None]
    if not found:
        raise UsageError(f"{path}: no line of it is a record of a training run")
    return _history(run, found, unreadable=len(records) - len(found) - torn)


def number(record: Record | None, *keys: str) -> float | None:
    """The finite number under these nested keys, or None. Example: `number(r, "zeroshot", "accuracy")`."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def word(record: Record | None, key: str) -> str | None:
    """The text under a key, or None where there is none."""
    value = (record or {}).get(key)
    return value if isinstance(value, str) and value else None


def score_of(record: Record, metric: str) -> float | None:
    """A metric of an "eval" record: zero-shot "accuracy", retrieval at rank 1 in one direction, or their mean
    ("recall")."""
    if metric == "accuracy":
        return number(record, "zeroshot", "accuracy")
    if metric in _DIRECTIONS:
        return number(record, "retrieval", metric)
    both = [number(record, "retrieval", way) for way in _DIRECTIONS]
    return None if both[0] is None or both[1] is None else (both[0] + both[1]) / 2


def ledger_of(record: Record | None) -> CostLedger | None:
    """The cost ledger of an "eval" or "end" record, or None where it has none that can be read."""
    try:
        return CostLedger.from_json((record or {}).get("ledger"))
    except UsageError:
        return None


def last_ledger(run: History) -> CostLedger | None:
    """The latest ledger that the log has: the run's, or what an unfinished run had spent at its last evaluation."""
    found = (ledger_of(record) for record in (run.end, *reversed(run.evals)))
    return next((ledger for ledger in found if ledger is not None), None)


def chunks_of(record: Record) -> list[float] | None:
    """The mean scores of a step's chunks, or None where it had none."""
    scores = record.get("chunk_scores")
    if not isinstance(scores, list) or not scores:
        return None
    values = [number({"at": score}, "at") for score in scores]
    return [value for value in values if value is not None] if None not in values else None


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def _history(run: Path, records: Iterable[dict[str, Any]], unreadable: int) -> History:
    kept: dict[str, list[Record]] = {kind: [] for kind in (*_DATED, *_ONCE)}
    resumed = 0
    for record in records:
        kind = record["kind"]
        if kind not in kept or (kind in _DATED and number(record, "step") is None):
            continue
        if kind == "step" and _again(kept, record):
            resumed += 1
        kept[kind].append(record)
    end = kept["end"][-1] if kept["end"] else None
    starts = kept["start"] or [{}]
    return History(
        path=run,
        start=starts[0],
        steps=kept["step"],
        watches=kept["watch"],
        handovers=kept["handover"],
        lags=kept["lag"],
        evals=kept["eval"],
        probes=kept["probe"],
        quotas=kept["quota"],
        shorts=kept["short"],
        policy=kept["policy"][-1] if kept["policy"] else None,
        certificate=kept["certificate"][-1] if kept["certificate"] else None,
        end=end,
        resumed=max(resumed, len(starts) - 1),
        unreadable=unreadable,
    )


def _again(kept: dict[str, list[Record]], record: Record) -> bool:
    """Does this step come a second time? Then what was logged from it on goes."""
    here = number(record, "step") or 0
    if not kept["step"] or (number(kept["step"][-1], "step") or 0) < here:
        return False
    for kind in _DATED:
        kept[kind] = [old for old in kept[kind] if (number(old, "step") or 0) < here]
    kept["end"], kept["certificate"] = [], []
    return True
