"""The verb that runs a recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from curate.cli.options import LOCAL, EngineOptions, Flag, Json
from curate.cli.printing import console, print_json, print_lines


def run(
    recipe: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    change: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    dry_run: Flag = False,
    overwrite: Flag = False,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Run rounds of score, train and evaluate as a YAML recipe says; each round scores with what the last has trained.

    The same command again goes on where it was interrupted. examples/recipe.yaml explains every section; options of a
    section are those of the verb.

    Example: curate run recipe.yaml --set rounds=3 --set train.steps=200 --dry-run

    Parameters
    ----------
    recipe
        A YAML file; what it does not know is refused with the line.
    output
        Write there instead of where the recipe says.
    change
        FIELD=VALUE in place of what the recipe says, as often as needed: --set score.keep=0.1.
    dry_run
        Print what each round would do, and what is done already; write nothing.
    overwrite
        Remove the run that is in the output directory, and begin anew; what can be refused before the first round is
        refused first, and costs that run nothing.
    """
    from curate.pipelines import rounds

    if dry_run:
        plan = rounds.plan_recipe(recipe, output, changes=change)
        return print_json(plan.as_json()) if json else print_lines(plan.lines)
    result = rounds.run(recipe, output, changes=change, overwrite=overwrite, **asdict(running), quiet=False)
    if json:
        return print_json(result.as_json())
    from curate.round_table import render_rounds

    render_rounds(result, console())
    return print_lines([f"local-dir:{result.model}"])
