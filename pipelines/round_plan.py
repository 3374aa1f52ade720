"""What the rounds of a recipe will do, decided before any of them starts: no model is loaded, no data read.

OUT/reference               a reference that is fitted first
OUT/round-1/filtered        what `score` wrote, OUT/round-1/learner what `train` left, and so on
OUT/round-2/...             scored with the learner of round 1, which is also what training goes on from
OUT/_curate/*.json          what each part did, written when it is done
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.models.spec import parse_spec
from curate.pipelines.round_baselines import baselines_by_round
from curate.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Part:
    """One call: its positional arguments (shards, output), the named ones, and the file that says it is done."""

    shards: tuple[str, ...]
    output: Path
    options: dict[str, Any]
    receipt: Path

    @property
    def state(self) -> str:
        """Is it done, begun, or to do?"""
        if self.receipt.is_file():
            return "done"
        return "begun" if self.output.is_dir() and any(self.output.iterdir()) else "to do"


@dataclass(frozen=True, slots=True)
class Round:
    """Round `number`: scoring (None in a recipe that draws online), training, and what is measured."""

    number: int
    score: Part | None
    train: Part
    evaluate: Path | None


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """All rounds, and the fit of the reference before them, if there is one."""

    output: Path
    fit: Part | None
    fit_evaluate: Path | None
    rounds: tuple[Round, ...]

    @property
    def lines(self) -> list[str]:
        """The plan in words, a line for each call."""
        lines = [] if self.fit is None else [f"reference  fit {training_line(self.fit)} [{self.fit.state}]"]
        for one in self.rounds:
            if one.score is not None:
                lines.append(f"round {one.number:<4} score {scoring_line(one.score)} [{one.score.state}]")
            lines.append(f"round {one.number:<4} train {training_line(one.train)} [{one.train.state}]")
            if one.evaluate is not None:
                lines.append(f"round {one.number:<4} evaluate [{'done' if one.evaluate.is_file() else 'to do'}]")
        return lines

    def as_json(self) -> dict[str, Any]:
        return {"output": str(self.output), "plan": self.lines}


def plan_rounds(recipe: Recipe, output: Path) -> RecipePlan:
    """The calls that a recipe stands for. Errors: ModelError for a `train.model` that does not exist; UsageError for
    baselines that no round can be compared with.

    A round is scored with the learner of the round before. The first has `score.learner`, or `train.model` where that
    is trained already; without either it falls back to easy-reference, which needs none. Each round draws with a seed
    of its own, counted up from the one given.
    """
    reference = str(output / "reference") if recipe.fit is not None else recipe.reference
    fit = None if recipe.fit is None else _fit(recipe.fit, output)
    measured = recipe.eval is not None
    numbers = range(1, recipe.rounds + 1)
    beside = baselines_by_round(recipe, [_seed(recipe, number) for number in numbers])
    rounds = tuple(_round(recipe, output, reference, number, beside[number - 1]) for number in numbers)
    evaluate = _receipt(output, 0, "evaluate") if measured and fit is not None else None
    return RecipePlan(output, fit, evaluate, rounds)


def _seed(recipe: Recipe, number: int) -> int:
    """The seed that a round trains with, and that its baseline has."""
    return int(recipe.train.get("seed", 0)) + number - 1


def _folder(output: Path, number: int) -> Path:
    return output / f"round-{number}"


def _receipt(output: Path, number: int, part: str) -> Path:
    """What says that a part is done, and what it did; round 0 is the fit of the reference."""
    return output / "_curate" / f"{f'round-{number}' if number else 'reference'}-{part}.json"


def _fit(given: dict[str, Any], output: Path) -> Part:
    options = {name: value for name, value in given.items() if name != "shards"}
    return Part(given["shards"], output / "reference", options, _receipt(output, 0, "train"))


def _round(recipe: Recipe, output: Path, reference: str | None, number: int, baselines: tuple[str, ...]) -> Round:
    score = None if recipe.score is None else _score(recipe, output, str(reference), number)
    train = _train(recipe, output, reference, number, baselines)
    return Round(number, score, train, None if recipe.eval is None else _receipt(output, number, "evaluate"))


def _score(recipe: Recipe, output: Path, reference: str, number: int) -> Part:
    options, folder = dict(recipe.score or {}), _folder(output, number)
    learner, cache = options.pop("learner", None), options.pop("reference_cache", None)
    if number > 1:
        learner, cache = str(_folder(output, number - 1) / "learner"), str(_folder(output, 1) / "filtered")
    elif learner is None and _is_trained(recipe.train.get("model", "")):
        learner = recipe.train["model"]
    if learner is None:
        options = _without_learner(options)
    elif options.get("criterion") == "easy-reference":
        learner = None
    options |= {"reference": reference, "learner": learner, "reference_cache": cache}
    options |= {"seed": options.get("seed", 0) + number - 1}
    return Part(recipe.shards, folder / "filtered", options, _receipt(output, number, "score"))


def _without_learner(options: dict[str, Any]) -> dict[str, Any]:
    """Easy-reference, the one criterion that needs no learner; alignment's gain is in other units."""
    dropped = {"trusted", "trusted_size"} | ({"gain"} if options.get("criterion") == "alignment" else set())
    return {name: value for name, value in options.items() if name not in dropped} | {"criterion": "easy-reference"}


def _is_trained(model: str) -> bool:
    return bool(model) and parse_spec(model).kind != "untrained"


def _train(recipe: Recipe, output: Path, reference: str | None, number: int, baselines: tuple[str, ...]) -> Part:
    given, folder = recipe.train, _folder(output, number)
    options = {"gain": None} | recipe.settings | {"seed": _seed(recipe, number)}
    if number > 1 and not given.get("fresh"):
        options["model"] = str(_folder(output, number - 1) / "learner")
    if "criterion" not in options:
        options["criterion"] = "learnability" if recipe.score is None and reference is not None else "uniform"
    if options["criterion"] != "uniform":
        options["reference"] = reference
        options["reference_cache"] = _cache(recipe, output, number)
    if given.get("write_shards"):
        options["write_shards"] = str(folder / "chosen")
    if baselines:
        options["baselines"] = baselines
    for name in ("policy", "labels", "on", "grams_per_kwh"):
        if given.get(name) is not None:
            options[name] = given[name]
    filtered = (str(folder / "filtered"),) if recipe.score is not None else recipe.shards
    return Part(given.get("shards", filtered), folder / "learner", options, _receipt(output, number, "train"))


def _cache(recipe: Recipe, output: Path, number: int) -> str | None:
    """Where the reference's embeddings of the shards that are trained on lie already, if anywhere."""
    given: str | None = recipe.train.get("reference_cache")
    if given is not None:
        return given
    if recipe.score is not None:  # of use where `train.shards` are the pool; the filtered shards are new ones
        same = recipe.score.get("precision", "auto") == recipe.train.get("precision", "auto")
        return str(_folder(output, number) / "filtered") if same and "shards" in recipe.train else None
    return str(_folder(output, 1) / "learner" / "_curate" / "reference") if number > 1 else None


def scoring_line(part: Part) -> str:
    """What `score` is called for."""
    options = part.options
    criterion = options.get("criterion") or ("alignment" if options.get("trusted") else "learnability")
    share = (
        f"{options['sub_batch']} of a super-batch" if options.get("sub_batch") else f"{options.get('keep', 0.2):.0%}"
    )
    by = options["reference"] + (f" and {options['learner']}" if options["learner"] else "")
    cached = ", its embeddings as stored" if options["reference_cache"] else ""
    return f"{_names(part.shards)} by {criterion} with {by}{cached}; keep {share} -> {part.output}"


def training_line(part: Part) -> str:
    """What `train` is called for."""
    options = part.options
    length = f"{options['steps']} steps" if options.get("steps") else f"{options.get('epochs', 10.0):g} epochs"
    start, batch = options.get("model", "curate-tiny"), options.get("batch", 128)
    drawn = f", drawn by {options['criterion']}" if options.get("criterion", "uniform") != "uniform" else ""
    return f"{start} on {_names(part.shards)}: {length}, batch {batch}{drawn} -> {part.output}"


def _names(shards: Sequence[str]) -> str:
    return ", ".join(shards) if len(shards) < 4 else f"{shards[0]} and {len(shards) - 1} more"
