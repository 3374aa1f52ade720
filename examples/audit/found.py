"""What is kept of audits and certificates: the figures that tables and drawings are made of, rounded, in one file."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from curate.auditing.outcome import ColumnAudit, GroupRow
from curate.pipelines.auditing import AuditResult

DIGITS: Final = 3  # what the tables show, and one more


@dataclass(frozen=True, slots=True)
class Results:
    """The file with everything found so far: part, then key."""

    path: Path

    def read(self) -> dict[str, dict[str, Any]]:
        """All parts."""
        found: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return found

    def has(self, part: str, key: str) -> bool:
        """Whether this was found before."""
        return key in self.read().get(part, {})

    def add(self, part: str, key: str, value: Any) -> None:
        """Write one more value, keys in order; the file is under its name only when complete."""
        every = self.read()
        every.setdefault(part, {})[key] = value
        parts = (f'"{name}": {{\n{_lines(found)}\n}}' for name, found in sorted(every.items()))
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        os.replace(partial, self.path)


def _lines(found: dict[str, Any]) -> str:
    compact = {key: json.dumps(value, separators=(",", ":"), ensure_ascii=False) for key, value in found.items()}
    return ",\n".join(f" {json.dumps(key)}: {text}" for key, text in sorted(compact.items()))


def audited(result: AuditResult) -> dict[str, Any]:
    """An audit: how much of what, its random selections, its verdict, and a row for each group."""
    found = result.audit
    return {
        "pool": found.pool,
        "selected": found.selected,
        "exposures": found.exposures,
        "duplicate_clusters": found.duplicate_clusters,
        "flags": found.flags,
        "tests": found.placebo.tests,
        "random": [min(found.placebo.flags), max(found.placebo.flags)],  # flags of 20 random selections
        "verdict": None if result.verdict is None else result.verdict.result,
        "checks": {} if result.verdict is None else {row.group: row.result for row in result.verdict.groups},
        "columns": {column.name: _column(column) for column in found.columns},
    }


def certified(certificate: dict[str, Any] | None) -> dict[str, Any] | None:
    """A certificate: the groups with what they were owed and got, conflicts, and the price."""
    if certificate is None:
        return None
    return {name: certificate[name] for name in ("candidates", "chosen", "draws_with_conflict", "price")} | {
        "groups": {row["group"]: [row["n"], row["L"], row["C"], row["reason"]] for row in certificate["groups"]}
    }


def agreement(output: Path, labels: Path) -> dict[str, dict[str, int]]:
    """Label of a person's gender -> what the caption mentions, as the last audit of `output` read it -> samples."""
    with open(labels, newline="") as file:
        label = {row["key"]: row["gender"] for row in csv.DictReader(file)}
    read = pq.read_table(output / "_curate" / "audit" / "assignments.parquet", columns=["key", "gender"])
    found: dict[str, dict[str, int]] = {}
    for key, groups in zip(*(read[name].to_pylist() for name in ("key", "gender")), strict=True):
        said, row = " and ".join(sorted(groups)) or "neither", found.setdefault(label[key] or "no person", {})
        row[said] = row.get(said, 0) + 1
    return {name: dict(sorted(row.items())) for name, row in sorted(found.items())}


def _column(column: ColumnAudit) -> dict[str, Any]:
    return {"unknown": round(column.unknown_share, DIGITS), "groups": {row.group: _row(row) for row in column.groups}}


def _row(row: GroupRow) -> dict[str, Any]:
    when = row.early_late
    found: dict[str, Any] = {
        "n": row.pool,
        "kept": row.selected,
        "rate": _three(row.rate),
        "ratio": _three(row.ratio),
        "q": None if row.q is None else float(f"{row.q:.2g}"),
        "level": row.level,
        "sees": [_short(row.could_see.below), _short(row.could_see.above)],
        "held": [[one.confounder, _three(one.ratio), one.explains] for one in row.conditional],
        "losses": None if row.losses is None else [_short(row.losses.learner), _short(row.losses.reference)],
        "draws": None if row.exposures is None else row.exposures.exposures,
        "late": None if when is None else [when.early, when.late, _three(when.ratio), _short(when.q)],
    }
    return {name: value for name, value in found.items() if value is not None or name in ("rate", "ratio", "q")}


def _three(value: Any) -> list[float | None] | None:
    return None if value is None else [_short(value.value), _short(value.low), _short(value.high)]


def _short(value: float | None) -> float | None:
    return None if value is None or value != value or abs(value) == float("inf") else round(value, DIGITS)
