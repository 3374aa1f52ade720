"""Read a small YAML file into plain values, and remember the line of each, so that a message can name it.

What is read is YAML 1.2's core: `on` and `no` are text, 1e-3 is a number. Refused are keys given twice, anchors and
aliases (a few lines of them can stand for gigabytes), tags, and more than 64 kB. A dash in a key is an underscore, so
that options may be written as on the command line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from curate.errors import UsageError

LARGEST: Final = 65_536
Place = tuple[str | int, ...]  # keys and positions from the top: ("train", "steps")

_TAG = "tag:yaml.org,2002:"
_SCALARS: Final = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)


@dataclass(frozen=True, slots=True)
class Marked:
    """A value as read, and where each part of it stands: "recipe.yaml:7", or the option that gave it."""

    name: str
    value: Any
    where: Mapping[Place, str]

    def at(self, *place: str | int) -> str:
        """Where a place stands; where it is missing, what it would be part of."""
        while place and place not in self.where:
            place = place[:-1]
        return self.where.get(place, self.name)

    def error(self, place: Place, message: str) -> UsageError:
        """An error about a place. Example: `recipe.yaml:7: train.steps: Input should be a valid integer`."""
        field = ".".join(str(part) for part in place)
        return UsageError(f"{self.at(*place)}: {field + ': ' if field else ''}{message}")

    def problem(self, place: Place, item: Mapping[str, Any], known: Iterable[str]) -> UsageError:
        """An entry of pydantic's report as an error about a place; `known` are the keys that may stand there."""
        if item["type"] == "extra_forbidden":
            return self.error(place, suggestion("unknown", str(place[-1]), known))
        if item["type"] == "missing":
            return self.error(place, "is missing")
        return self.error(place, f"{item['input']!r}: {str(item['msg']).removeprefix('Value error, ')}")

    def changed(self, change: str) -> Marked:
        """With one field changed: "train.steps=20", or "eval.retrieval=[held/]". Errors: UsageError."""
        field, sign, text = change.partition("=")
        names: list[str] = [part.strip().replace("-", "_") for part in field.split(".")]
        option = f"--set {change}"
        if not sign or not all(names):
            raise UsageError(f"{option}: write FIELD=VALUE, as in --set train.steps=20")
        given = parse_yaml(text, option)
        above: dict[Place, str] = {tuple(names[:depth]): option for depth in range(1, len(names))}
        where: dict[Place, str] = {**above, **self.where, tuple(names): option}
        return Marked(self.name, _replaced(self.value, names, given.value, option), where)


def read_yaml(path: Path) -> Marked:
    """Errors: UsageError, with the line where it is known, for a file that is missing, too large or no such YAML."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UsageError(f"{path}: larger than {LARGEST:,} bytes, so it is no recipe")
        return parse_yaml(content.decode("utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from error


def parse_yaml(text: str, name: str) -> Marked:
    """The one document in `text`. Errors: as `read_yaml`."""
    where: dict[Place, str] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else _plain(node, (), name, where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{name}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that no YAML may hold
        raise UsageError(f"{name}: {str(error).splitlines()[0]}") from error
    except RecursionError:
        raise UsageError(f"{name}: nested too deep") from None
    return Marked(name, value, where)


class _Loader(yaml.SafeLoader):
    """Composes nodes; what a scalar means is `_SCALARS`, not the rules of YAML 1.1 that PyYAML has."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - an attribute of the library's class

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if event.anchor is not None:
            problem = "anchors and aliases (& and *) are not read; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)


def _plain(node: Any, place: Place, name: str, where: dict[Place, str]) -> Any:
    """The value of a node; its lines and those of its parts go to `where`."""
    here = f"{name}:{node.start_mark.line + 1}"
    where.setdefault(place, here)
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, place, name, where)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_plain(inner, (*place, number), name, where) for number, inner in enumerate(node.value)]
    if not isinstance(node, yaml.ScalarNode) or kind not in ("str", *(scalar for scalar, *_ in _SCALARS)):
        raise UsageError(f"{here}: the tag {node.tag} is not read; leave it out")
    return _scalar(kind, node.value, here)


def _mapping(node: Any, place: Place, name: str, where: dict[Place, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in node.value:
        here = f"{name}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
            raise UsageError(f"{here}: a key is a word")
        word = key.value.replace("-", "_")
        if word in found:
            raise UsageError(
                f"{here}: {'.'.join(map(str, (*place, word)))} is given twice (first: {where[*place, word]})"
            )
        where[*place, word] = here  # the key's line, also where its value begins further down
        found[word] = _plain(inner, (*place, word), name, where)
    return found


def _scalar(kind: str, text: str, here: str) -> Any:
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text, 0 if text.startswith(("0o", "0x")) else 10)
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower())) if kind == "float" else text
    except (ValueError, KeyError):
        raise UsageError(f"{here}: {text[:40]!r} is not of the kind that its tag says, or too long") from None


def _replaced(value: Any, names: list[str], new: Any, option: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{option}: there is no {names[0]!r} below a value that is no section")
    inner = dict(value or {})
    inner[names[0]] = new if len(names) == 1 else _replaced(inner.get(names[0]), names[1:], new, option)
    return inner


def suggestion(problem: str, name: str, known: Iterable[str]) -> str:
    """A problem with a name, and the nearest known one, or the first dozen of them."""
    names = [str(one) for one in known]
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"{problem}; did you mean {near[0]!r}?"
    return f"{problem}; there are {', '.join(names[:12])}{' and others' if len(names) > 12 else ''}"
