"""Recipes: one YAML file that says what `curate run` does, checked before anything starts.

    schema: 1
    output: runs/mine
    shards: [pool/]
    reference: {train: {shards: [clean/], steps: 200}}    # or the name of a model
    rounds: 2
    score: {keep: 0.2}                                    # options of `curate score`; left out: `train` draws online
    train: {model: curate-tiny, batch: 128, steps: 500}   # options of `curate train`
    eval: {retrieval: [held-out/]}                        # options of `curate evaluate`

Paths are as on the command line: from the directory where one is. The sections are made of the settings that the verbs
have, so a new setting is a new key; every message names file, line and field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from curate.errors import UsageError
from curate.learner.settings import FREE as FREE_IN_TRAINING
from curate.learner.settings import TrainSettings, parse_settings
from curate.marked_yaml import Marked, Place, read_yaml
from curate.selection.criteria import AnyCriterion
from curate.settings import ScoreSettings, SelectSettings, WriteSettings

MOST_ROUNDS: Final = 1000
_OPTION: Final = re.compile(r"--([a-z][a-z-]*)")  # what a verb calls an option is a key here
FREE: Final = ("tolerance", "grams_per_kwh", *FREE_IN_TRAINING)  # may change between two calls: they change no result


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Several = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class _Section(BaseModel):
    """Keys that are not known are refused, and so is text where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Top(_Section):
    version: Literal[1] = Field(alias="schema")
    output: str = Field(min_length=1)
    shards: Several
    reference: Any = None
    rounds: int = Field(default=1, ge=1, le=MOST_ROUNDS)
    score: Any = None
    train: Any
    eval: Any = None


class _Reference(_Section):
    train: Any


class _Eval(_Section):
    zeroshot: Several | None = None
    retrieval: Several | None = None
    classes: str | None = None
    templates: str | None = None
    label: str | None = None
    pool: int | None = Field(default=None, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch_size: int = Field(default=64, ge=1)


def _settings_of(model: type[BaseModel], *names: str) -> dict[str, Any]:
    """Fields of another model, with their bounds, to make one of."""
    chosen = names or tuple(model.model_fields)
    return {name: (model.model_fields[name].annotation, model.model_fields[name]) for name in chosen}


def _training() -> dict[str, Any]:
    """The settings of a training run; the reference is the recipe's own."""
    hints = {name: hint for name, hint in get_type_hints(TrainSettings).items() if name != "reference"}
    return {
        name: (Annotated[hint, BeforeValidator(_as_tuple)] if "tuple" in str(hint) else hint, None)
        for name, hint in hints.items()
    }


_SCORE: Final = create_model(
    "_Score",
    __base__=_Section,
    **_settings_of(ScoreSettings, "learner", "precision", "batch_size")
    | _settings_of(SelectSettings, *(name for name in SelectSettings.model_fields if name != "policy"))
    | _settings_of(WriteSettings)
    | {
        "criterion": (AnyCriterion | None, None),
        "loss": (Literal["sigmoid", "softmax", "auto"], "auto"),
        "trusted": (Several, ()),
        "trusted_size": (int, Field(default=256, ge=2, le=65_536)),
        "tolerance": (float, Field(default=0.05, ge=0, le=1)),
        "reference_cache": (str, None),
        "policy": (str, None),
        "labels": (str, None),
        "on": (Literal["key", "uid", "sample_id"], None),
    },
)
_FIT: Final = create_model("_Fit", __base__=_Section, **_training() | {"shards": (Several, ...)})
_OF_ROUNDS: Final = (
    "shards",
    "fresh",
    "write_shards",
    "reference_cache",
    "policy",
    "labels",
    "on",
    "baselines",
    "grams_per_kwh",
)  # keys of `train` that are no settings
_TRAIN: Final = create_model(
    "_Train",
    __base__=_Section,
    **_training()
    | {
        "shards": (Several, None),
        "fresh": (bool, False),
        "write_shards": (bool, False),
        "reference_cache": (str, None),
        "policy": (str, None),
        "labels": (str, None),
        "on": (Literal["key", "uid", "sample_id"], None),
        "baselines": (Several, ()),
        "grams_per_kwh": (float, Field(default=None, ge=0)),
    },
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe. The sections hold what was given, without defaults.

    `reference` names a model, `fit` says how one is fitted first; `score` is None where training draws online. Of
    `train`, `fresh` begins every round with the model that is named rather than with the learner of the round before,
    and `write_shards` writes what was trained on to round-N/chosen.
    """

    output: str
    shards: tuple[str, ...]
    train: dict[str, Any]
    rounds: int = 1
    reference: str | None = None
    fit: dict[str, Any] | None = None
    score: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    marked: Marked = field(default=Marked("", None, {}), compare=False)

    def as_json(self) -> dict[str, Any]:
        """What `recipe.json` pins: all but the place, the number of rounds (which may grow), and what is free."""
        reference = self.reference if self.fit is None else {"train": self.fit}
        sections = {"train": self.train, "score": self.score, "eval": self.eval}
        return {name: _pinned(value) for name, value in sections.items()} | {
            "shards": list(self.shards), "reference": _pinned(reference)
        }  # fmt: skip

    @property
    def has_reference(self) -> bool:
        return self.reference is not None or self.fit is not None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of training: `train` without what concerns rounds."""
        return {name: value for name, value in self.train.items() if name not in _OF_ROUNDS}


def _pinned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _pinned(inner) for name, inner in value.items() if name not in FREE}
    return list(value) if isinstance(value, tuple) else value


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe, each of `changes` ("train.steps=20") applied to it.

    Errors: UsageError naming file, line and field: `recipe.yaml:7: train.step: unknown; did you mean 'steps'?`.
    """
    marked = read_yaml(path)
    for change in changes:
        marked = marked.changed(change)
    return check_recipe(marked)


def check_recipe(marked: Marked) -> Recipe:
    """The recipe that a file says. Errors: as `read_recipe`."""
    top = _given(_Top, marked, ())
    reference, fit = _reference(marked, top.get("reference"))
    recipe = Recipe(
        output=top["output"],
        shards=top["shards"],
        train=_given(_TRAIN, marked, ("train",)),
        rounds=top.get("rounds", 1),
        reference=reference,
        fit=fit,
        score=_given(_SCORE, marked, ("score",)) if "score" in top else None,
        eval=_given(_Eval, marked, ("eval",)) if "eval" in top else None,
        marked=marked,
    )
    _check_together(recipe)
    return recipe


def _reference(marked: Marked, given: Any) -> tuple[str | None, dict[str, Any] | None]:
    if given is None or (isinstance(given, str) and given):
        return given, None
    if not isinstance(given, dict):
        raise marked.error(("reference",), "the name of a model, or {train: {shards: [...]}} to fit one first")
    _given(_Reference, marked, ("reference",))
    place = ("reference", "train")
    fit = _given(_FIT, marked, place)
    _blamed(parse_settings, {name: value for name, value in fit.items() if name != "shards"}, marked, place)
    return None, fit


def _check_together(recipe: Recipe) -> None:
    """What no field shows alone."""
    marked, score = recipe.marked, recipe.score
    named = {"reference": "R"} if recipe.has_reference else {}
    _blamed(lambda given: parse_settings({"criterion": None, **given, **named}), recipe.settings, marked, ("train",))
    if score is not None:
        _check_score(recipe, score)
    given = recipe.eval
    if given is not None:
        if not given.get("zeroshot") and not given.get("retrieval"):
            raise marked.error(("eval",), "nothing to measure; name shards as zeroshot, retrieval, or both")
        for name, owner in {
            "classes": "zeroshot",
            "templates": "zeroshot",
            "label": "zeroshot",
            "pool": "retrieval",
        }.items():
            if given.get(name) is not None and not given.get(owner):
                raise marked.error(("eval", name), f"would do nothing without {owner}")


def _check_score(recipe: Recipe, score: dict[str, Any]) -> None:
    marked = recipe.marked
    if not recipe.has_reference:
        raise marked.error(("score",), "needs a reference; name a model as `reference`, or fit one there")
    if score.get("keep") is not None and score.get("sub_batch") is not None:
        raise marked.error(("score", "sub_batch"), "keep and sub_batch both say how much is drawn; give one")
    if (sub := score.get("sub_batch")) is not None and sub > score.get("super_batch", 20_480):
        raise marked.error(("score", "sub_batch"), f"{sub} is larger than a super-batch")
    if score.get("criterion") == "alignment" and not score.get("trusted"):
        raise marked.error(("score", "criterion"), "alignment needs a small trusted set; name its shards as `trusted`")
    train = recipe.train
    if train.get("labels") and train.get("on") != "uid" and not train.get("shards"):
        new = "keys and sample ids are new in the shards that `score` writes, which are trained on"
        raise marked.error(("train", "labels"), f"{new}; join the labels on: uid, or name other shards")


def _given(schema: type[BaseModel], marked: Marked, place: Place) -> dict[str, Any]:
    """The checked keys of a section, without defaults; a section left empty has none."""
    value = marked.value
    for name in place:
        value = value[name]
    value = {} if value is None and place else value
    if not isinstance(value, dict):
        raise marked.error(place, "keys and values are expected here" if place else "a recipe has keys and values")
    try:
        found = schema(**value)
    except ValidationError as error:
        items = sorted(error.errors(), key=lambda item: item["type"] == "missing")  # a misspelt key is also missing
        known = [info.alias or key for key, info in schema.model_fields.items()]
        problems = (marked.problem((*place, *item["loc"]), item, known) for item in items)
        raise UsageError("; ".join(map(str, problems))) from None
    return {name: getattr(found, name) for name in schema.model_fields if name in found.model_fields_set}


def _blamed(build: Callable[[dict[str, Any]], Any], given: dict[str, Any], marked: Marked, place: Place) -> None:
    """Let `build` check values together; the field named is the first without which it would not say the same."""
    if (problem := _refused(build, given)) is None:
        return
    without = ({key: value for key, value in given.items() if key != name} for name in given)
    name = next((name for name, rest in zip(given, without, strict=True) if _refused(build, rest) != problem), None)
    raise marked.error(place if name is None else (*place, name), problem)


def _refused(build: Callable[[dict[str, Any]], Any], given: dict[str, Any]) -> str | None:
    try:
        build(given)
    except UsageError as error:
        return _OPTION.sub(lambda found: found[1].replace("-", "_"), str(error).removeprefix("training settings: "))
    return None
