"""How much planted noise the pool held and how much the selection still holds, from the truth and the ledger.

A fault's share is counted before among all input samples and after among the kept ones. Near-duplicates are counted
without asking which of two is the copy: among n samples of d distinct drawings, n - d are redundant. So a selection
that keeps a copy and drops its source holds no near-duplicate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate.demonstration.corpus import BROKEN, FAULTS
from curate.errors import VerificationError

if TYPE_CHECKING:
    from rich.table import Table

ANY = "any planted fault"


@dataclass(frozen=True, slots=True)
class NoiseRow:
    """Samples with one fault, before (in the pool) and after (among the kept)."""

    fault: str
    before: int
    before_of: int
    after: int
    after_of: int

    @property
    def share_before(self) -> float:
        """Share of the pool, 0 to 1."""
        return self.before / self.before_of if self.before_of else 0.0

    @property
    def share_after(self) -> float:
        """Share of the kept samples, 0 to 1."""
        return self.after / self.after_of if self.after_of else 0.0


@dataclass(frozen=True, slots=True)
class NoiseTable:
    """One row per fault and one for any of them; the groups; and what became of the samples broken in structure."""

    rows: tuple[NoiseRow, ...]
    groups: tuple[NoiseRow, ...]
    broken: int
    broken_quarantined: int
    separation: float | None  # area under the curve of reference similarity, sound against mismatched captions

    def row(self, fault: str) -> NoiseRow:
        """The row of `fault`, or of `ANY`."""
        return next(row for row in self.rows if row.fault == fault)

    def as_json(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        return asdict(self)


def noise_table(truth: pa.Table, ledger: pa.Table) -> NoiseTable:
    """Join the pool's truth (`corpus.TRUTH_SCHEMA`) with the ledger on (shard name, position) and count.

    Example: 4000 samples with 1000 mismatched captions of which 15 are among 800 kept give
    NoiseRow("mismatched-caption", 1000, 4000, 15, 800): 25 % before, 1.9 % after.
    Raises VerificationError where the ledger is not of this corpus.
    """
    joined = _join(truth, ledger)
    kept = [row for row in joined if row["status"] == "kept"]
    rows = [_row(fault, joined, kept) for fault in FAULTS]
    any_before, any_after = (sum(_count(fault, part) for fault in FAULTS) for part in (joined, kept))
    rows.append(NoiseRow(ANY, any_before, len(joined), any_after, len(kept)))
    names = sorted({row["group"] for row in joined})
    groups = [NoiseRow(name, _members(name, joined), len(joined), _members(name, kept), len(kept)) for name in names]
    broken = [row for row in joined if row["fault"] in BROKEN]
    quarantined = sum(row["status"] == "quarantined" for row in broken)
    return NoiseTable(tuple(rows), tuple(groups), len(broken), quarantined, _separation(joined))


def _join(truth: pa.Table, ledger: pa.Table) -> list[dict[str, Any]]:
    known = {(row["shard"], row["ordinal"]): row for row in truth.to_pylist() if row["part"] == "pool"}
    joined = []
    columns = ["shard", "ordinal", "key", "status", "reference_similarity"]
    for row in ledger.select(columns).to_pylist():
        name = row["shard"].rsplit("/", 1)[-1]
        true = known.get((name, row["ordinal"]))
        if true is None or true["key"] != row["key"]:
            raise VerificationError(
                f"shard {name}, sample {row['key']!r}: not in the corpus's truth; take a run's ledger on this corpus"
            )
        joined.append({**true, "status": row["status"], "similarity": row["reference_similarity"]})
    return joined


def _row(fault: str, joined: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> NoiseRow:
    return NoiseRow(fault, _count(fault, joined), len(joined), _count(fault, kept), len(kept))


def _count(fault: str, rows: Sequence[dict[str, Any]]) -> int:
    if fault == "near-duplicate":
        return len(rows) - len({row["origin"] for row in rows})
    return sum(row["fault"] == fault for row in rows)


def _members(group: str, rows: Sequence[dict[str, Any]]) -> int:
    return sum(row["group"] == group for row in rows)


def _separation(joined: Sequence[dict[str, Any]]) -> float | None:
    """Probability that a sound pair is more similar to the reference than a mismatched one (ties count half)."""
    scored = [row for row in joined if row["similarity"] is not None]
    sound = [row["similarity"] for row in scored if row["fault"] is None]
    wrong = [row["similarity"] for row in scored if row["fault"] == "mismatched-caption"]
    return area_under_curve(sound, wrong) if sound and wrong else None


def area_under_curve(high: Sequence[float], low: Sequence[float]) -> float:
    """Share of pairs (h, l) with h > l, ties counting half (Mann-Whitney U over its maximum). O(n log n).

    >>> area_under_curve([3.0, 2.0], [1.0, 2.0])
    0.875
    """
    ordered = np.sort(np.asarray(low, float))
    below = np.searchsorted(ordered, np.asarray(high, float), "left").sum()
    not_above = np.searchsorted(ordered, np.asarray(high, float), "right").sum()
    return float((below + not_above) / 2 / (len(high) * len(low)))


def noise_view(table: NoiseTable) -> Table:
    """The table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    title = Text("Noise before and after", style="bold")
    view = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    view.add_column("", no_wrap=True)
    for heading in ("in the pool", "", "kept", "", "change"):
        view.add_column(heading, justify="right", header_style="dim", no_wrap=True)
    for row in table.rows:
        last = row.fault == ANY
        style = "bold" if last else ""
        view.add_row(*_cells(row), style=style, end_section=last)
    for row in table.groups:
        view.add_row(*_cells(row), style="dim")
    return view


def _cells(row: NoiseRow) -> list[str]:
    if not row.before:
        change = "-"
    elif not row.after:
        change = "none left"
    else:
        ratio = row.share_after / row.share_before
        change = f"{1 / ratio:.1f}x less" if ratio < 0.95 else f"{ratio:.1f}x more" if ratio > 1.05 else "same"
    return [row.fault, f"{row.before:,}", f"{row.share_before:.1%}", f"{row.after:,}", f"{row.share_after:.1%}", change]
