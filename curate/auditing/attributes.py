"""A file of zero-shot attributes: groups that a model is asked about, in YAML; every wrong field is told with its line.

    schema: 1
    model: ViT-L-14:datacomp_xl_s13b_b90k    # as after --reference; never one that scored the pool
    threshold: 0.8                           # the probability that the best group must reach, else the model abstains
    templates: ["a photo of {c}.", "{c}"]    # each prompt in each of them; left out: the prompts as they stand
    columns:
      - column: perceived setting
        groups:
          - {name: indoors, prompts: [a room, the inside of a building]}
          - {name: outdoors, prompts: [a landscape, a street]}
        otherwise: [a drawing, a page of text]   # where one of these fits best, the model abstains as well

A softmax model shares 1 out among the groups and `otherwise`, so without `otherwise` it names a group for a picture of
none. Names are values, never keys: the reader of YAML turns a dash in a key into an underscore.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from curate.auditing.columns import check_group_count, shown
from curate.errors import ModelError, UsageError
from curate.evaluation.labels import fill
from curate.marked_yaml import Marked, Place, read_yaml
from curate.models.spec import ModelSpec, parse_spec

AS_IT_STANDS: Final = "{c}"
_FEWEST: Final = 2  # groups of a column: one alone has no rest to be compared with

_Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
_Texts = Annotated[tuple[_Text, ...], Field(min_length=1)]


class _Section(BaseModel):
    """Keys that are not known are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Group(_Section):
    name: _Text
    prompts: _Texts


class _Column(_Section):
    column: _Text
    groups: tuple[_Group, ...]
    otherwise: tuple[_Text, ...] = ()


class _File(_Section):
    version: Literal[1] = Field(alias="schema")
    model: _Text
    threshold: float = Field(gt=0, lt=1, strict=True)
    templates: _Texts = (AS_IT_STANDS,)
    columns: Annotated[tuple[_Column, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Group:
    """A group and what the model is asked for it; the embeddings of the prompts are averaged."""

    name: str
    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """A column to be: its groups, and the prompts (there may be none) under which a picture is in none of them."""

    name: str
    groups: tuple[Group, ...]
    otherwise: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attributes:
    """A checked file. `model` is where its weights come from; nothing of it is loaded yet."""

    model: ModelSpec
    threshold: float
    templates: tuple[str, ...]
    columns: tuple[Attribute, ...]
    marked: Marked = field(default=Marked("", None, {}), compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns' names as an audit shows them."""
        return tuple(shown(column.name) for column in self.columns)

    @property
    def model_name(self) -> str:
        """What the model is called in a sentence: without the folders above it, so that reports do not depend on them.

        Example: "ViT-B-32:epoch_20.pt" for `ViT-B-32:/models/epoch_20.pt`.
        """
        last = Path(self.model.location).name
        if self.model.kind == "directory":
            return shown(last)
        return shown(f"{self.model.architecture}:{last}" if self.model.kind == "file" else self.model.text)

    def as_json(self) -> dict[str, Any]:
        """What the file asks, the model by name."""
        columns = [
            {"column": one.name, "groups": [[g.name, *g.prompts] for g in one.groups], "otherwise": one.otherwise}
            for one in self.columns
        ]
        return {"model": self.model.text, "threshold": self.threshold, "templates": self.templates, "columns": columns}


def read_attributes(path: Path) -> Attributes:
    """Errors: UsageError naming file, line and field, for anything that is not as the module describes.

    Example: `a.yaml:3: threshold: 1.2: Input should be less than 1`.
    """
    return check_attributes(read_yaml(path))


def check_attributes(marked: Marked) -> Attributes:
    """The attributes that a file names. Errors: as `read_attributes`."""
    if not isinstance(marked.value, dict):
        raise marked.error((), "a file of attributes has keys and values")
    try:
        found = _File(**marked.value)
    except ValidationError as error:
        items = sorted(error.errors(), key=lambda item: item["type"] == "missing")  # a misspelt key is also missing
        raise UsageError("; ".join(str(_problem(item, marked)) for item in items)) from None
    for number, template in enumerate(found.templates):
        if fill(template, "\0") == template:
            raise marked.error(("templates", number), f"{template!r} has no place for a prompt; write {{c}} there")
    _refuse_twins(marked, ("columns",), (shown(column.column) for column in found.columns))
    columns = tuple(_attribute(marked, number, column) for number, column in enumerate(found.columns))
    return Attributes(_model(marked, found.model), found.threshold, found.templates, columns, marked)


def _problem(item: Any, marked: Marked) -> UsageError:
    place: Place = tuple(item["loc"])
    if item["type"] in ("model_type", "model_attributes_type", "tuple_type"):
        return marked.error(place, f"{'a list' if item['type'] == 'tuple_type' else 'keys and values'} expected here")
    models: dict[int, type[_Section]] = {1: _File, 3: _Column}  # by how deep the key stands
    fields = models.get(len(place), _Group).model_fields
    return marked.problem(place, item, sorted(info.alias or key for key, info in fields.items()))


def _model(marked: Marked, text: str) -> ModelSpec:
    try:
        spec = parse_spec(text)
    except ModelError as error:
        raise marked.error(("model",), str(error)) from error
    if spec.kind == "untrained":
        raise marked.error(("model",), f"{text!r} names no weights, so it would guess; write {text}:TAG or {text}:FILE")
    return spec


def _attribute(marked: Marked, number: int, given: _Column) -> Attribute:
    place: Place = ("columns", number, "groups")
    if len(given.groups) < _FEWEST:
        raise marked.error(place, f"{_FEWEST} groups or more are needed; `otherwise` is for pictures of none")
    check_group_count(given.column, len(given.groups))
    _refuse_twins(marked, place, (shown(group.name) for group in given.groups))
    everything = [prompt for group in given.groups for prompt in dict.fromkeys(group.prompts)]
    _refuse_twins(marked, place, (*everything, *dict.fromkeys(given.otherwise)))
    groups = tuple(Group(group.name, group.prompts) for group in given.groups)
    return Attribute(given.column, groups, given.otherwise)


def _refuse_twins(marked: Marked, place: Place, names: Iterable[str]) -> None:
    """Columns or groups of one name, and groups of one prompt, could not be told apart."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise marked.error(place, f"{twice[0]!r} stands in two of them")
