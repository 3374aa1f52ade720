"""The demonstration's audit: does it find the group that is treated unevenly, and only that; can a policy mend it?

The reference hardly met German captions, so a selection by it drops them. The audit compares that group and thirty
others, in which nothing was planted, with the rest; a policy then asks for the group's share, the same scores are drawn
from anew, and the second selection is audited like the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyarrow.csv import read_csv

from curate.auditing.outcome import Audit, GroupRow
from curate.demonstration.corpus import Corpus
from curate.demonstration.labels import LABELS
from curate.pipelines.audit_files import AuditResult
from curate.pipelines.auditing import audit
from curate.pipelines.repeating import select
from curate.policy.checking import Result
from curate.storage import replace_file

if TYPE_CHECKING:
    from rich.table import Table

COLUMN: Final = "group"
PLANTED: Final = "caption-de"
POLICY: Final = """\
# What the demonstration asks of a selection; `curate audit OUT --policy` checks it, `curate select` draws within it.
schema: 1
author: curate demo
date: 2026-11-22
rationale: The reference hardly met German captions. Whoever trains on the selection needs them all the same.
columns:
  - column: group
    source: labels.csv of the demonstration, language of the caption as planted
    groups:
      - name: caption-de
        min_share: {share:g}
"""
FEWEST: Final = 10  # samples of the group, below which there is nothing to see and little to ask for


@dataclass(frozen=True, slots=True)
class Treatment:
    """The planted group in one selection: kept of how many, the ratio to the rest, and what the policy says of it."""

    kept: int
    of: int
    ratio: tuple[float, float, float] | None
    verdict: Result | None

    def as_json(self) -> dict[str, Any]:
        ratio = None if self.ratio is None else list(self.ratio)
        return {"kept": self.kept, "of": self.of, "ratio": ratio, "verdict": self.verdict}


@dataclass(frozen=True, slots=True)
class Repair:
    """`left_out`: every group that the audit finds confidently and largely left out; `before` and `after` the policy.

    `given_up` is the price: the share of the learnability of the plain draw that the policy costs, None if unknown.
    """

    left_out: tuple[str, ...]
    left_out_after: tuple[str, ...]
    groups: int
    before: Treatment
    after: Treatment
    given_up: float | None
    reports: tuple[Path, Path]

    @property
    def found_it_only(self) -> bool:
        """Did the audit find what was planted, and nothing else?"""
        return self.left_out == (f"{COLUMN}: {PLANTED}",)

    def as_json(self) -> dict[str, Any]:
        return {
            "planted": f"{COLUMN}: {PLANTED}",
            "left_out": list(self.left_out),
            "left_out_after": list(self.left_out_after),
            "groups": self.groups,
            "before": self.before.as_json(),
            "after": self.after.as_json(),
            "given_up": self.given_up,
            "reports": [str(path) for path in self.reports],
        }

    def lines(self) -> list[str]:
        """What the table does not say."""
        found, still = (", ".join(groups) or "nothing" for groups in (self.left_out, self.left_out_after))
        price = "unknown" if self.given_up is None else f"{self.given_up:.2%} of the score of the plain draw"
        return [
            f"The audit compared {self.groups} groups; confidently left out: {found} (planted: {COLUMN}: {PLANTED}).",
            f"Under the policy, confidently left out: {still}; its price: {price}.",
        ]


def audit_and_repair(
    corpus: Corpus, selection: Path, path: Path, *, seed: int, workers: int | None, quiet: bool
) -> Repair | None:
    """Audit `selection`, draw again under a policy into PATH/repaired, audit that, and compare.

    The policy asks for nine tenths of the group's share of the pool. None where the corpus is too small to have it.
    """
    labels = read_csv(corpus.labels)[COLUMN].to_pylist()
    if labels.count(PLANTED) < FEWEST:
        return None
    policy = path / "policy.yaml"
    share = math.floor(900 * labels.count(PLANTED) / len(labels)) / 1000
    replace_file(policy, POLICY.format(share=share).encode())
    asked: dict[str, Any] = {
        "labels": corpus.labels, "columns": LABELS, "policy": policy, "seed": seed, "workers": workers, "quiet": quiet,
    }  # fmt: skip
    before = audit(selection, **asked)
    drawn = select(selection, to=path / "repaired", policy=policy, labels=corpus.labels, workers=workers, quiet=quiet)
    after = audit(drawn.output, **asked)
    price = None if drawn.certificate is None else drawn.certificate["price"]
    return Repair(
        left_out(before.audit),
        left_out(after.audit),
        len(before.audit.rows),
        _treatment(before),
        _treatment(after),
        None if price is None else price["given_up_per_member"] / abs(price["score_without"] / price["members"]),
        (before.report, after.report),
    )


def left_out(found: Audit) -> tuple[str, ...]:
    """Groups that were kept less often than the rest, confidently and largely; the most left out first."""
    rows = [row for row in found.rows if row.level == "confidently large" and _ratio(row) < 1]
    return tuple(f"{row.column}: {row.group}" for row in sorted(rows, key=_ratio))


def _ratio(row: GroupRow) -> float:
    assert row.ratio is not None
    return row.ratio.value


def _treatment(result: AuditResult) -> Treatment:
    [row] = [row for row in result.audit.rows if (row.column, row.group) == (COLUMN, PLANTED)]
    ratio = None if row.ratio is None else (row.ratio.value, row.ratio.low, row.ratio.high)
    return Treatment(row.selected, row.pool, ratio, None if result.verdict is None else result.verdict.result)


def repair_view(repair: Repair) -> Table:
    """The table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    title = Text("The group that is treated unevenly: German captions", style="bold")
    view = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    for heading in ("", "kept", "rate", "to the rest", "policy"):
        view.add_column(heading, justify="left" if heading in ("", "policy") else "right", header_style="dim")
    for name, one in (("plain selection", repair.before), ("under the policy", repair.after)):
        view.add_row(name, *_cells(one))
    return view


def _cells(one: Treatment) -> Sequence[str]:
    rate = f"{one.kept / one.of:.1%}" if one.of else "-"
    ratio = "-" if one.ratio is None else "{:.2f} ({:.2f}-{:.2f})".format(*one.ratio)
    return f"{one.kept} of {one.of}", rate, ratio, one.verdict or "-"
