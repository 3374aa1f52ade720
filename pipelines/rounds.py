"""`run`: a recipe's rounds of score -> train -> evaluate, each part resumable, the whole the same call again.

    OUT/recipe.json      the recipe, its inputs and their digest; a changed one is refused
    OUT/summary.json     a row for each finished round
    OUT/reference, OUT/round-1/filtered, OUT/round-1/learner, ...

A part that is done is known by its receipt in OUT/_curate and not looked at again; one that was interrupted takes
itself up. Costs what its parts cost; the reference embeds the pool in round 1 only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from curate import __version__
from curate.costs.ledger import CostLedger
from curate.errors import StorageError, UsageError
from curate.evaluation.labels import find_labels, read_templates
from curate.evaluation.measure import evaluate
from curate.learner.checkpoint import TRAINING_FILE
from curate.marked_yaml import Place
from curate.models.spec import parse_spec
from curate.pipelines.engine import Mode
from curate.pipelines.policing import asked_policy
from curate.pipelines.reference_pass import Where
from curate.pipelines.round_checks import check_rounds, named
from curate.pipelines.round_costs import score_ledger
from curate.pipelines.round_place import begin, refuse_change
from curate.pipelines.round_plan import Part, RecipePlan, plan_rounds, scoring_line, training_line
from curate.pipelines.runner import local_output, score
from curate.pipelines.training import train
from curate.recipe import Recipe, read_recipe
from curate.reports import training_bar
from curate.round_table import RecipeResult, RoundRow, of_reference, round_row
from curate.shards.sources import expand_shards
from curate.storage import canonical_json, readable_json, remove, replace_file


@dataclass(frozen=True, slots=True)
class _Place:
    """On what the parts run; none of it changes what comes out."""

    engine: dict[str, Any]
    quiet: bool

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def run(
    recipe: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    *,
    changes: Sequence[str] = (),
    overwrite: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    engine: Mode | None = None,
    allow_remote_scheduler: bool = False,
    quiet: bool = True,
) -> RecipeResult:
    """Run the rounds of a recipe file; `output` stands in for the one it names, `changes` for some of its fields.

    Where the run was interrupted, the same call goes on. A recipe may be given more rounds later, nothing else.
    `overwrite` removes the run that is there when the new one has been found to be possible, as far as that can be
    known before it begins (`curate.pipelines.round_checks`); an earlier run stays whole until then.

    Errors: UsageError with file, line and field for what the recipe says; RunMismatch, naming every difference, where
    the output belongs to another recipe; what `score`, `train` and `evaluate` raise.
    Example: `run("recipe.yaml", changes=["rounds=3", "train.steps=100"]).rows[-1].loss`.
    """
    checked = read_recipe(Path(recipe), changes)
    place = local_output(checked.output if output is None else output)
    inputs = check_inputs(checked)
    plan = plan_rounds(checked, place)
    record = _record(checked, inputs)
    options = {"workers": workers, "scheduler": scheduler, "engine": engine}
    where = _Place(options | {"allow_remote_scheduler": allow_remote_scheduler}, quiet)
    asked = Where(None, workers, scheduler, engine, allow_remote_scheduler, quiet)
    begin(place, record, overwrite=overwrite, check=lambda: check_rounds(checked, plan, asked))
    rows: list[RoundRow] = []
    for row in _rows(checked, plan, where):
        rows.append(row)
        result = RecipeResult(place, plan.rounds[-1].train.output, tuple(rows), record["digest"])
        replace_file(place / "summary.json", readable_json(result.as_json()))
    return result


def plan_recipe(
    recipe: str | PathLike[str], output: str | PathLike[str] | None = None, *, changes: Sequence[str] = ()
) -> RecipePlan:
    """What `run` with the same arguments would do, and what is done already; writes nothing. Errors: as `run`."""
    checked = read_recipe(Path(recipe), changes)
    place = local_output(checked.output if output is None else output)
    record = _record(checked, check_inputs(checked))
    refuse_change(place, record)
    return plan_rounds(checked, place)


def check_inputs(recipe: Recipe) -> dict[str, Any]:
    """The shards, models, policies and labels that a recipe names, as they are now: all there, before anything starts.

    Errors: UsageError with the line of what is not there.
    """
    sections = {"score": recipe.score, "train": recipe.train, "eval": recipe.eval, "reference.train": recipe.fit}
    found: dict[str, Any] = {"shards": _expanded(recipe, ("shards",), recipe.shards)}
    for section, given in sections.items():
        for name in ("shards", "trusted", "eval_shards", "zeroshot", "retrieval"):
            if given and given.get(name):
                place = (*section.split("."), name)
                found[".".join(place)] = _expanded(recipe, place, given[name])
        for name in ("model", "learner"):
            if given and given.get(name):
                found[f"{section}.{name}"] = _model(recipe, (*section.split("."), name), given[name])
    for section in ("score", "train"):
        given = sections[section] or {}
        with named(recipe, (section, "policy" if given.get("policy") else "labels")):
            policy = asked_policy(given.get("policy"), given.get("labels"), given.get("on"))
        if policy is not None:
            found[f"{section}.policy"] = policy.settings.model_dump()
    if recipe.reference is not None:
        found["reference"] = _model(recipe, ("reference",), recipe.reference)
    if recipe.eval is not None and recipe.eval.get("zeroshot"):
        with named(recipe, ("eval", "zeroshot")):
            _check_labels(recipe.eval)
    return found


def _expanded(recipe: Recipe, place: Place, shards: Sequence[str]) -> list[dict[str, Any]]:
    with named(recipe, place):
        return [asdict(source) for source in expand_shards(shards)]


def _model(recipe: Recipe, place: Place, name: str) -> str:
    with named(recipe, place):
        return parse_spec(name).absolute


def _check_labels(given: dict[str, Any]) -> None:
    sources = expand_shards(given["zeroshot"])
    classes, templates = (None if given.get(name) is None else Path(given[name]) for name in ("classes", "templates"))
    find_labels(sources, classes=classes, field=given.get("label"))
    read_templates(sources, templates)


def _record(recipe: Recipe, inputs: dict[str, Any]) -> dict[str, Any]:
    """recipe.json."""
    pinned = {"recipe": recipe.as_json(), "inputs": inputs}
    digest = hashlib.sha256(canonical_json(pinned)).hexdigest()
    return {"schema": 1, "tool": __version__, "rounds": recipe.rounds, "digest": digest, **pinned}


def _rows(recipe: Recipe, plan: RecipePlan, place: _Place) -> Iterator[RoundRow]:
    """Run what is not done; a row for each round, and before them one for the reference where it is fitted.

    Each training is told what was spent for it before, so that its report charges it in comparisons.
    """
    spent = CostLedger()
    if plan.fit is not None:
        trained = _trained(plan.fit, place, "reference", spent)
        spent += of_reference(trained)
        yield round_row("reference", None, trained, _evaluated(recipe, plan.fit, plan.fit_evaluate, place, "reference"))
    for one in plan.rounds:
        name = f"round {one.number} of {len(plan.rounds)}"
        scored = None if one.score is None else _scored(one.score, place, name)
        if scored is not None:
            spent += CostLedger.from_json(scored["ledger"])
        trained = _trained(one.train, place, name, spent)
        spent += CostLedger.from_json(trained["ledger"])
        yield round_row(str(one.number), scored, trained, _evaluated(recipe, one.train, one.evaluate, place, name))


def _scored(part: Part, place: _Place, name: str) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        place.say(f"{name}: score {scoring_line(part)}")
        result = score(part.shards, part.output, **part.options, **place.engine, quiet=place.quiet)
        ledger = score_ledger(part.output, result.seconds)
        return {"counts": result.counts, "reasons": result.reasons, "ledger": ledger.as_json()}

    found = _once(part.receipt, part.output, work)
    if not found["counts"]["kept"]:
        raise UsageError(
            f"{name}: nothing was selected of {found['counts']['in']} pairs; raise score.keep, or look at the reasons "
            f"in the ledger of {part.output}"
        )
    return found


def _trained(part: Part, place: _Place, name: str, spent: CostLedger) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        place.say(f"{name}: train {training_line(part)}")
        with training_bar() as bar:
            result = train(
                part.shards, part.output, **part.options, **place.engine, quiet=place.quiet, before=spent,
                progress=None if place.quiet else bar,
            )  # fmt: skip
        ledger = json.loads((result.path / TRAINING_FILE).read_bytes())["ledger"]
        trained = {"samples": ledger["training"]["samples"], "pairs": result.samples, "ledger": ledger}
        return trained | {"steps": result.steps, "loss": result.loss, "skipped": result.skipped}

    return _once(part.receipt, part.output, work)


def _evaluated(recipe: Recipe, part: Part, receipt: Path | None, place: _Place, name: str) -> dict[str, Any] | None:
    given = recipe.eval
    if given is None or receipt is None:
        return None

    def work() -> dict[str, Any]:
        place.say(f"{name}: evaluate {part.output}")
        return {"found": evaluate(part.output, **given, quiet=place.quiet).as_json()}

    return _once(receipt, part.output, work)


def _once(receipt: Path, output: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part did: from its receipt, or done now. `seconds` are those of all calls it took, interrupted or not."""
    if receipt.is_file() and output.is_dir():
        found: dict[str, Any] = json.loads(receipt.read_bytes())
        return found
    spent = receipt.with_suffix(".seconds")
    before = float(spent.read_text()) if spent.is_file() else 0.0
    began = time.perf_counter()
    try:
        found = work()
    except BaseException:
        with contextlib.suppress(StorageError):
            replace_file(spent, f"{before + time.perf_counter() - began:.3f}".encode())
        raise
    found |= {"seconds": round(before + time.perf_counter() - began, 3)}
    replace_file(receipt, readable_json(found))
    remove(spent)
    return found
