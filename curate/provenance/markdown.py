"""Markdown of text that comes from the web: names and captions stay text, whatever they hold.

Characters without a form go first (`reporting.markup.visible`: control characters, lone surrogates, marks of direction,
line breaks), then everything that Markdown or HTML would read is escaped. Cells of a table are made by `text`, never by
`code`: a backslash before a bar means another thing inside a code span.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from curate.reporting.markup import visible

LONGEST: Final = 300  # characters of one name

_MEANT = re.compile(r"[\\`*_\[\]~|$]")
_AT_START = re.compile(r"^((?=[-+=#])|\d+(?=[.)](?:\s|$)))")  # a list, a heading, or the line under one
_LINKED = re.compile(r":(?=//)|(?<=\bwww)\.", re.IGNORECASE)  # GitHub makes links of bare addresses


def shortened(value: object, longest: int = LONGEST) -> str:
    """`value` as visible text of at most `longest` characters, cut in the middle.

    >>> shortened("a\\u202eb\\n<i>")
    'ab <i>'
    """
    seen = visible(value).strip()
    half = longest // 2
    return seen if len(seen) <= longest else f"{seen[: half - 2]} ... {seen[3 - half :]}"


def text(value: object, longest: int = LONGEST) -> str:
    """A value as plain text in a sentence, a list or a cell of a table.

    >>> text("<b>*x*|y</b>")
    '&lt;b&gt;\\\\*x\\\\*\\\\|y&lt;/b&gt;'
    """
    escaped = _MEANT.sub(r"\\\g<0>", shortened(value, longest))
    escaped = _LINKED.sub(lambda found: f"\\{found[0]}", escaped)
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _AT_START.sub(r"\g<1>\\", escaped, count=1)


def sentence(value: object) -> str:
    """A sentence with names in it, as plain text of at most 4,000 characters."""
    return text(value, 4_000)


def code(value: object) -> str:
    """A value as a code span, for lists and sentences.

    >>> code("a`b")
    '``a`b``'
    """
    seen = shortened(value) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", seen)), default=0))
    room = " " if seen.startswith("`") or seen.endswith("`") else ""
    return f"{fence}{room}{seen}{room}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Lines of a table; cells are Markdown already. Columns `right` hold figures."""
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    return [_row(head), _row(rule), *(_row(row) for row in rows)]


def fenced_json(value: Any) -> list[str]:
    """A block of JSON: every line of it begins with a bracket, a quote or blanks, so none can end the block."""
    return ["```json", *json.dumps(value, sort_keys=True, indent=1, allow_nan=False).splitlines(), "```"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
