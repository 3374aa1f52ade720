"""A page of findings, figures and tables as one HTML file: no script, no remote asset, a policy that forbids both.

Values flow one way: sections hold blocks, `render` gives text. The template escapes everything; only the charts'
Markup is placed as it is. The same page gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from curate.reporting.frame import Chart
from curate.reporting.markup import visible
from curate.reporting.palette import LIGHT, PAGE, variables

Tone = Literal["plain", "good", "warning"]
CSP: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, slots=True)
class Finding:
    """A statement in a sentence or two; `lead` is the word that it stands under."""

    lead: str
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart and what to see in it."""

    chart: Chart
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a head; the columns numbered in `numeric` stand to the right. `folded`: opened on demand."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """Figures stand side by side where there is room; tables below them."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()

    @property
    def filled(self) -> bool:
        """Is there anything in it?"""
        return bool(self.text or self.figures or self.tables)


@dataclass(frozen=True, slots=True)
class Page:
    """`subtitle` says of what; `findings` come first; `footer` says how it was made."""

    title: str
    subtitle: str
    findings: Sequence[Finding]
    sections: Sequence[Section]
    footer: str


def render(page: Page, template: str = "page.html", **more: object) -> str:
    """The page as HTML. Another template of this package can extend "page.html" and its blocks, and is given `more`.

    Example: `render(Page("Training", "RUN", [Finding("Loss", "It fell.")], [], "curate 0.1"))`.
    """
    schemes = {"paper": PAGE[0], "light": variables(dark=False), "night": PAGE[1], "dark": variables(dark=True)}
    given = {"page": page, "csp": CSP, "colours": len(LIGHT), **schemes, **more}
    return environment().get_template(template).render(given) + "\n"


@cache
def environment() -> Environment:
    """Escapes every expression that is not Markup, drops characters no one sees, and fails on a misspelt name."""
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=PackageLoader("curate.reporting", "templates"),
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalized(value: Any) -> Any:
    return value if isinstance(value, Markup) else visible(value)
