"""What a recipe would be refused for, found while the earlier run that it is to replace is whole.

    its own files      inputs, models, caches and label files that `--overwrite` would remove
    reference, learner their weights, losses and cache, as far as they are not to be trained first
    training           model, pairs, held-out and trusted pairs, and its policy, where it reads shards that are there
    scoring            pairs in every set of shards; the policy held against the candidates of every round, unless its
                       groups, or near-duplicates, are known after scoring only

What a round leaves to the next is not known before: pairs that `score` will have written, learners. Costs an index and
a digest of what is trained on, and where `score` has a policy one decoding of the pool, which is kept below
OUT/_curate/next until the end of the check, so that a killed one goes on.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from curate.errors import CurateError, UsageError
from curate.learner.dataset import open_pairs
from curate.learner.held_out import held_out_pairs
from curate.learner.measuring import opened_measure
from curate.learner.settings import TrainSettings, parse_settings
from curate.learner.start import Start, prepare
from curate.marked_yaml import Place
from curate.models.load import load_model
from curate.models.spec import parse_spec
from curate.pipelines.aligning import trusted_settings
from curate.pipelines.engine import Engine, open_engine
from curate.pipelines.modelling import default_criterion
from curate.pipelines.overwriting import NEXT
from curate.pipelines.policing import asked_policy
from curate.pipelines.reference_pass import Where, check_cache, check_trusted, reference_model
from curate.pipelines.round_place import written
from curate.pipelines.round_plan import Part, RecipePlan
from curate.pipelines.round_policing import check_policy_of_rounds, selecting
from curate.pipelines.runner import list_shards, local_output, plan_run
from curate.pipelines.training import check_report, check_sources, of_size
from curate.pipelines.training_policy import check_bounds, pinned
from curate.policy.ahead import refuse_without_reference, scored_names
from curate.policy.given import GivenPolicy
from curate.recipe import Recipe
from curate.settings import ScoreSettings
from curate.shards.captions import read_caption
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import ShardSource, expand_shards, open_shard
from curate.shards.tarindex import index_tar

_SHARDS: Final = ("shards", "trusted", "eval_shards", "zeroshot", "retrieval")
_MODELS: Final = ("model", "learner")
_FILES: Final = ("policy", "labels", "reference_cache", "classes", "templates", "baselines")


def check_rounds(recipe: Recipe, plan: RecipePlan, where: Where) -> None:
    """Look over all rounds of a recipe whose output holds another run, and leave that as it is.

    Errors: UsageError with the line, for all that the module names; it says that the earlier run is as it was.
    """
    beside = plan.output / "_curate" / NEXT
    try:
        _refuse_own(recipe, plan.output)
        with _engine(where) as engine:
            _check_losses(recipe, *_check_models(recipe, plan, where, beside))
            _check_scoring(recipe, plan, engine, beside, quiet=where.quiet)
        if recipe.eval is not None:
            _check_readable(recipe, ("eval", "zeroshot"), captioned=False)
            _check_readable(recipe, ("eval", "retrieval"))
    except CurateError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UsageError(f"{error}. The earlier run in {plan.output} is as it was") from error


@contextlib.contextmanager
def named(recipe: Recipe, place: Place) -> Iterator[None]:
    """An error about something that the recipe names, with its line."""
    try:
        yield
    except CurateError as error:
        raise recipe.marked.error(place, str(error)) from error


@contextlib.contextmanager
def _engine(where: Where) -> Iterator[Engine]:
    with open_engine(
        workers=where.workers, scheduler=where.scheduler, mode=where.engine, allow_remote=where.allow_remote
    ) as engine:
        yield engine


def _refuse_own(recipe: Recipe, output: Path) -> None:
    """What the earlier run wrote cannot make way for a run that reads it, by whichever name."""
    removed, whole = [path.resolve() for path in written(output)], output.resolve()
    for place, path in _needed(recipe):
        real = path.resolve()
        if real == whole or any(real.is_relative_to(one) for one in removed):
            raise recipe.marked.error(
                place, f"--overwrite would remove {path}, which this run needs; choose another output directory"
            )


def _needed(recipe: Recipe) -> Iterator[tuple[Place, Path]]:
    """Everything on this machine that a recipe names, and where."""
    sections: dict[Place, Any] = {("score",): recipe.score, ("train",): recipe.train, ("eval",): recipe.eval}
    sections |= {("reference", "train"): recipe.fit, (): {"shards": recipe.shards}}
    for section, given in sections.items():
        for name, value in (given or {}).items():
            yield from (((*section, name), path) for path in _paths(name, value))
    if recipe.reference is not None:
        yield from ((("reference",), path) for path in _paths("model", recipe.reference))


def _paths(name: str, value: Any) -> list[Path]:
    if not value:
        return []
    if name in _SHARDS:
        return [Path(source.url) for source in expand_shards(value) if "://" not in source.url]
    if name in _MODELS:
        spec = parse_spec(value)
        return [Path(spec.location)] if spec.kind in ("directory", "file") else []
    if name in _FILES:
        return [local_output(one) for one in ((value,) if isinstance(value, str) else value)]
    return []


def _check_models(recipe: Recipe, plan: RecipePlan, where: Where, beside: Path) -> tuple[TrainSettings, str | None]:
    """How is trained, and the reference's loss; None without one that scores or is fitted."""
    fitted, loss = plan.fit is not None, None
    if plan.fit is not None:
        with named(recipe, ("reference", "train")):
            loss = _check_training(plan.fit, where, beside / "reference").loss
    elif recipe.reference is not None and recipe.score is not None:
        with named(recipe, ("reference",)):
            loss = load_model(recipe.reference, precision=recipe.score.get("precision", "auto")).loss
    train = plan.rounds[0].train
    there = recipe.score is None or "shards" in recipe.train
    with named(recipe, ("train", "policy") if recipe.train.get("policy") else ("train",)):
        cache = recipe.train.get("reference_cache")
        return _check_training(train, where, beside / "train", cache=cache, fitted=fitted, there=there), loss


def _check_training(
    part: Part, where: Where, place: Path, *, cache: str | None = None, fitted: bool = False, there: bool = True
) -> TrainSettings:
    """Refuse what `train` would refuse. `fitted`: its reference is yet to be; `there`: its shards are; `cache`: the
    embeddings that the recipe itself names, since those of the part may be the earlier run's.

    Memberships of its policy are kept below `place`.
    """
    options = dict(part.options)
    given = asked_policy(*(options.pop(name, None) for name in ("policy", "labels", "on")))
    if given is not None:
        pinned(given)
    for name in ("write_shards", "reference_cache"):
        options.pop(name, None)
    check_report([local_output(run) for run in options.pop("baselines", ())], options.pop("grams_per_kwh", None))
    settings = parse_settings(options)
    if given is not None and settings.reference is None:
        refuse_without_reference(given)
    settings = replace(settings, model=parse_spec(settings.model).absolute)
    start = prepare(settings)
    reference = None if fitted else reference_model(settings, start, groups=bool(scored_names(given)))
    if reference is not None and cache is not None:
        check_cache(local_output(cache), reference)
    check_trusted(settings, start)
    with opened_measure(start, settings):
        if there:
            _check_pairs(settings, start, tuple(expand_shards(part.shards)), given, where, place)
    return settings


def _check_pairs(
    settings: TrainSettings, start: Start, sources: tuple[ShardSource, ...], given: GivenPolicy | None, where: Where,
    place: Path,
) -> None:  # fmt: skip
    with open_pairs(sources, start.tokenizer, start.rule, memory_gb=settings.memory_gb, label=settings.label) as opened:
        of_size(settings, len(opened.pairs))
        check_sources(settings, sources, opened)
        held_out_pairs(settings, opened.contents)
        if given is not None:
            check_bounds(given, settings, opened, sources, place, where)


def _check_losses(recipe: Recipe, settings: TrainSettings, reference: str | None) -> None:
    """What is trained is weighed against the reference by the one loss that both have, unless another is named."""
    if reference in (None, settings.loss):
        return
    told = f"the reference has the {reference} loss, the learner is to be trained with {settings.loss}"
    score = recipe.score
    if settings.uses_reference:
        raise recipe.marked.error(("train", "loss"), f"{told}: their losses do not compare; train both with one")
    if score is not None and recipe.rounds > 1 and score.get("loss", "auto") == "auto" and not _weighs_one(score):
        raise recipe.marked.error(
            ("score", "loss"), f"{told}: round 2 scores with both; say sigmoid or softmax, or train both with one"
        )


def _weighs_one(score: dict[str, Any]) -> bool:
    criterion = score.get("criterion") or default_criterion(learner=True, trusted=bool(score.get("trusted")))
    return criterion in ("alignment", "easy-reference")


def _check_scoring(recipe: Recipe, plan: RecipePlan, engine: Engine, beside: Path, *, quiet: bool) -> None:
    parts = [one.score for one in plan.rounds if one.score is not None]
    if not parts:
        return
    first = parts[0]
    _check_readable(recipe, ("shards",))
    _check_readable(recipe, ("score", "trusted"))
    if plan.fit is None:
        with named(recipe, ("score",)):
            _check_settings(first)
    given = asked_policy(*(first.options.get(name) for name in ("policy", "labels", "on")))
    if given is not None:
        with named(recipe, ("score", "policy")):
            check_policy_of_rounds(parts, given, engine, beside, quiet=quiet)


def _check_settings(part: Part) -> None:
    """Refuse what `score` would refuse before it scores."""
    options = part.options
    clean = list_shards(options["trusted"]) if options.get("trusted") else ()
    of_score = {name: options[name] for name in ScoreSettings.model_fields if name in options and name != "trusted"}
    of_score |= trusted_settings(clean, options.get("trusted_size", 256))
    _, choice = plan_run(
        list_shards(part.shards), of_score, selecting(options), {}, options.get("criterion"),
        options.get("loss", "auto"),
    )  # fmt: skip
    if options["reference_cache"] is not None:
        choice.check_cache(local_output(options["reference_cache"]))


def _check_readable(recipe: Recipe, place: Place, *, captioned: bool = True) -> None:
    """Shards of which at least one holds a pair, as far as its headers tell; each is opened."""
    given: Any = {"score": recipe.score, "eval": recipe.eval, "shards": {"shards": recipe.shards}}[str(place[0])] or {}
    patterns = given.get(str(place[-1]))
    if not patterns:
        return
    with named(recipe, place):
        sources, found = expand_shards(patterns), False
        for source in sources:
            if found and "://" in source.url:
                continue  # looked up already, and opening it would fetch it
            with open_shard(source) as data:
                found = found or any(_is_pair(data, entry, captioned) for entry in group_samples(index_tar(data), ""))
        if not found:
            raise UsageError(f"no readable pair in {len(sources)} shards; `curate inspect` shows each sample")


def _is_pair(data: memoryview, entry: SampleEntry, captioned: bool) -> bool:
    if entry.reason is not None or entry.image() is None:
        return False
    return not captioned or read_caption(data, entry)[0] is not None
