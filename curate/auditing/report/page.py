"""An audit as one HTML file: findings, verdict, figures, tables, galleries, how to read it, and the audit's own JSON.

No request leaves the page and no script runs in it but one: the fixed script that sorts tables, which the page's
policy admits by its SHA-256. Without it every table stays readable. All text is escaped by the template; the JSON is in
a block that browsers do not run, with `<` written as an escape. Equal audits give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from markupsafe import Markup

from curate import __version__
from curate.auditing.columns import shown
from curate.auditing.composition import Composition
from curate.auditing.outcome import Audit, ColumnAudit, GroupRow
from curate.auditing.report import cells, reading
from curate.auditing.report.cells import SortTable
from curate.auditing.report.figures import title_of
from curate.auditing.report.galleries import Gallery
from curate.auditing.report.tables import association_table, behind_table, draws_table, group_table, overview
from curate.auditing.report.verdicts import policy_part
from curate.auditing.sentences import chance, explained, finding, flagged, silence
from curate.policy.checking import Verdict
from curate.policy.schema import Policy
from curate.reporting.page import CSP, Figure, Page, Section, environment, render

MOST_FINDINGS: Final = 12
PAIRS: Final = "Associations"


@dataclass(frozen=True, slots=True)
class Told:
    """A finding: the word it stands under, where the word leads to, the sentence, and more to it below."""

    lead: str
    anchor: str
    text: str
    tone: str = "plain"
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ColumnPart:
    """A column of the audit: its heading, lines of facts, its figures and its tables."""

    anchor: str
    name: str
    lines: tuple[str, ...]
    figures: Sequence[Figure]
    tables: tuple[SortTable, ...]


def render_report(
    audit: Audit,
    *,
    title: str,
    pool_facts: Mapping[str, object] | None = None,
    galleries: Sequence[Gallery] = (),
    verdict: Verdict | None = None,
    policy: Policy | None = None,
    figures: Sequence[Section] = (),
    notes: Sequence[str] = (),
    limits: Sequence[str] = (),
) -> str:
    """The report as HTML, one string of the whole file.

    `pool_facts` are shown as given ({"Pool": "shards/*.tar", "Selection": "OUT"}); `galleries` come from
    `galleries.fetch`, `figures` from `figures.figures_of`. `verdict` is that of a policy, `policy` adds whose it is.
    `notes` are remarks on this audit (a column that was left out, a match rate), `limits` are added to those that hold
    for every audit. Example: `render_report(audit, title="Audit of OUT")` is a page with findings and tables.
    """
    before, by_column, after = _placed(audit, figures)
    paired, after = [one for one in after if one.title == PAIRS], [one for one in after if one.title != PAIRS]
    page = Page(title, _subtitle(audit), (), before, f"Made by curate {__version__}. Seed {audit.seed}.")
    return render(
        page,
        "audit.html",
        csp=f"{CSP}; script-src '{_digest(_script())}'",
        strip=_strip(audit),
        facts=tuple((name, str(value)) for name, value in (pool_facts or {}).items()),
        found=_found(audit),
        chance=_sentence(chance(audit.placebo, audit.flags)),
        quiet=_quiet(audit),
        verdict=None if verdict is None else policy_part(verdict, policy),
        overview=overview(audit),
        columns=[
            _column(place, column, by_column.get(title_of(column), ())) for place, column in enumerate(audit.columns, 1)
        ],
        after=after,
        pairs_drawn=[figure for one in paired for figure in one.figures],
        associations=association_table(audit.associations),
        galleries=galleries,
        notes=tuple(notes),
        limits=(*reading.LIMITS, *limits),
        terms=reading.terms(audit),
        data=embedded(audit.as_json() | {"policy": None if verdict is None else verdict.as_json()}),
        script=_script(),
    )


def embedded(value: Any) -> Markup:
    """JSON for a block of type application/json: nothing in it can end the block or start markup."""
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, so no U+2028 either
    for character in "<>&":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    return Markup(plain)


@cache
def _script() -> Markup:
    source, _, _ = environment().loader.get_source(environment(), "sorting.js")  # type: ignore[union-attr]
    return Markup(source)


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _subtitle(audit: Audit) -> str:
    drawn = "" if audit.exposures is None else f", drawn {audit.exposures:,} times in all"
    return (
        f"What a selection of {audit.selected:,} from {audit.pool:,} samples kept and left out, group by group{drawn}"
    )


def _strip(audit: Audit) -> tuple[tuple[str, str], ...]:
    """The figures on top: each a number and what it counts."""
    flags = audit.placebo.flags
    by_chance = f"{min(flags)} to {max(flags)}" if flags else "\u2013"
    return (
        (f"{audit.pool:,}", "samples in the pool"),
        (f"{audit.selected:,}", f"selected, {cells.percent(audit.selected / audit.pool)}"),
        (f"{len(audit.rows):,}", f"groups in {len(audit.columns)} columns"),
        (f"{audit.flags:,}", "groups flagged"),
        (by_chance, "flagged in random selections of equal size"),
    )


def _found(audit: Audit) -> tuple[Told, ...]:
    """The flagged groups in sentences, the furthest from 1 first; beyond twelve they are counted."""
    place = {column.name: number for number, column in enumerate(audit.columns, 1)}
    column_of = {column.name: column for column in audit.columns}
    rows = flagged(audit)
    told = [_flag(row, column_of[row.column], f"column-{place[row.column]}") for row in rows[:MOST_FINDINGS]]
    rest = len(rows) - MOST_FINDINGS
    if rest > 0:
        more = "more groups were" if rest > 1 else "more group was"
        said = f"{rest:,} {more} flagged, nearer to a ratio of 1; the tables have all."
        told.append(Told("And", "columns", said))
    return tuple(told)


def _flag(row: GroupRow, column: ColumnAudit, anchor: str) -> Told:
    """The sentence without its confounders, and those below it, one a line."""
    sentence = _sentence(finding(replace(row, conditional=()), column.kind, column.model))
    held = tuple(_sentence(explained(one)) for one in row.conditional)
    return Told(row.column, anchor, sentence, "plain" if row.level == "detected" else "warning", held)


def _quiet(audit: Audit) -> tuple[Told, ...]:
    """Per column, what is not known and what could not have been seen."""
    lines = [
        (place, column, [line.removeprefix(f"{shown(column.name)}: ") for line in silence(column)])
        for place, column in enumerate(audit.columns, 1)
    ]
    return tuple(
        Told(column.name, f"column-{place}", " ".join(map(_sentence, said))) for place, column, said in lines if said
    )


def _placed(
    audit: Audit, sections: Sequence[Section]
) -> tuple[list[Section], dict[str, Sequence[Figure]], list[Section]]:
    """Sections before the columns' own, the figures of each column by title, and sections after them."""
    titles = {title_of(column) for column in audit.columns}
    filled = [one for one in sections if one.filled]
    first = next((place for place, one in enumerate(filled) if one.title in titles), len(filled))
    own = {one.title: one.figures for one in filled if one.title in titles}
    return filled[:first], own, [one for one in filled[first:] if one.title not in titles]


def _column(place: int, column: ColumnAudit, figures: Sequence[Figure]) -> ColumnPart:
    tables = (group_table(column), behind_table(column), draws_table(column))
    anchor, there = f"column-{place}", tuple(one for one in tables if one)
    return ColumnPart(anchor, title_of(column), tuple(_facts(column)), figures, there)


def _facts(column: ColumnAudit) -> list[str]:
    known = f"{cells.percent(column.coverage)} of the pool known, {cells.percent(column.unknown_share)} not"
    together = "; groups may overlap" if column.overlapping else ""
    family = f"; q within the family {column.family!r}" if column.family != "all" else ""
    lines = [_sentence(column.provenance), f"{known}{together}{family}."]
    if column.composition is not None:
        lines.append(_mix(column.composition))
    return lines


def _mix(found: Composition) -> str:
    moved, apart = found.total_variation, found.jensen_shannon
    low, high, by_chance = map(cells.percent, (moved.low, moved.high, moved.by_chance))
    return (
        f"The mix moved by {cells.percent(moved.value)} in total variation ({low} to {high}; a random selection of "
        f"this size: {by_chance}), by {apart.value:.4f} bits in Jensen-Shannon divergence ({apart.low:.4f} to "
        f"{apart.high:.4f}; {apart.by_chance:.4f})."
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:].rstrip('.')}."
