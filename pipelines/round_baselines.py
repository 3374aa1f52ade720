"""Which runs each round of a recipe is compared with: its own, never those of another round.

    train: {baselines: [runs/iid]}      # an output of `curate run`: round N stands beside its round N
    train: {baselines: [iid-0, iid-1]}  # outputs of `curate train`: each stands beside the round that has its seed

Rounds count their seeds up, and reports pair runs by seed; so a second recipe with the same seed and number of rounds,
without selection, gives every round a partner that is as far on as it is. Costs reading the runs' logs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from curate.errors import UsageError
from curate.learner.report.history import read_history
from curate.recipe import Recipe


def baselines_by_round(recipe: Recipe, seeds: Sequence[int]) -> list[tuple[str, ...]]:
    """The baselines of each round, whose training seeds these are.

    Errors: UsageError with the line, for a run that is not there, has no such round, or has a seed of no round.
    """
    given = [Path(path).expanduser() for path in recipe.train.get("baselines", ())]
    try:
        found = [_beside(path, seeds) for path in given]
    except UsageError as error:
        raise recipe.marked.error(("train", "baselines"), str(error)) from error
    return [tuple(str(runs[number]) for runs in found if number in runs) for number in range(len(seeds))]


def _beside(path: Path, seeds: Sequence[int]) -> dict[int, Path]:
    """Index of a round -> the run of `path` that it is compared with."""
    if not (path / "recipe.json").is_file():
        seed = _seed(path)
        if seed not in seeds:
            raise UsageError(f"{path} has seed {seed}, {_of_rounds(seeds)}; runs are compared by seed: train it anew")
        return {seeds.index(seed): path}
    runs = {number: path / f"round-{number + 1}" / "learner" for number in range(len(seeds))}
    there: int = json.loads((path / "recipe.json").read_bytes())["rounds"]
    for number, run in runs.items():
        if number >= there:
            raise UsageError(
                f"{path} has no round {number + 1}; give it as many as here first, --set rounds={len(seeds)}"
            )
        if (seed := _seed(run)) != seeds[number]:
            raise UsageError(
                f"{run} has seed {seed}, the round here {seeds[number]}; runs are compared by seed: give both recipes "
                "the same train.seed"
            )
    return runs


def _seed(run: Path) -> int | None:
    return read_history(run).seed


def _of_rounds(seeds: Sequence[int]) -> str:
    return f"the round has {seeds[0]}" if len(seeds) == 1 else f"the rounds have {seeds[0]} to {seeds[-1]}"
