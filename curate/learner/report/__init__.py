"""The report of training runs: findings in sentences, charts, costs and settings in one HTML file, from logs alone.

Runs that differ by their seed are shown together, as a mean with a band; baselines stand beside them in every chart of
a metric, and are paired with the runs by seed for the statement of cost. Costs a pass over the logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from curate import __version__
from curate.errors import UsageError
from curate.learner.report.cost_findings import cost_table
from curate.learner.report.course import Group, course_of
from curate.learner.report.figures import loss_figures, metric_figures
from curate.learner.report.findings import findings
from curate.learner.report.history import History, read_history
from curate.learner.report.metrics import chosen_metric
from curate.learner.report.policy import policy_sections
from curate.learner.report.race import Comparison, compare
from curate.learner.report.selection_figures import selection_figures
from curate.learner.report.tables import budget_table, run_table, settings_table
from curate.learner.report.words import name_of, seeds
from curate.reporting.page import Page, Section, render
from curate.storage import make_directory, replace_file


def write_report(
    runs: Sequence[Path] | Path,
    output: Path,
    *,
    baselines: Sequence[Path] | Path = (),
    metric: str | None = None,
    target: float | None = None,
    grams_per_kwh: float | None = None,
) -> Path:
    """Write the report of RUN directories (one configuration, any number of seeds) to `output`, and return that path.

    `metric` is "accuracy" (zero-shot), "recall" (retrieval at rank 1, mean of both directions), "image_to_text" or
    "text_to_image"; None takes the first of the former two that every log has. `target` is the value whose cost is
    compared; None takes the lowest of the baselines' best values. `grams_per_kwh` is the intensity by which joules
    become CO2; without it none is stated. The file is replaced at once, and equal logs give equal bytes. Example:
    `write_report(Path("RUN"), Path("RUN/report.html"), baselines=[Path("IID")])`.

    Errors: UsageError for no run, a directory without a readable log, an unknown metric, two runs of one seed, or an
    intensity that is not a finite number of 0 or more; StorageError.
    """
    ours, theirs = (_read(paths) for paths in (runs, baselines))
    if not ours:
        raise UsageError("a training report needs at least one run")
    judged = chosen_metric(metric, [*ours, *theirs])
    race = compare(ours, theirs, judged, target, name=name_of(ours)) if theirs else None
    page = render(_page(ours, theirs, race, judged, grams_per_kwh))
    make_directory(output.parent)
    replace_file(output, page.encode())
    return output


def _read(paths: Sequence[Path] | Path) -> list[History]:
    return [read_history(path) for path in ([paths] if isinstance(paths, Path) else paths)]


def _page(
    runs: Sequence[History],
    baselines: Sequence[History],
    race: Comparison | None,
    judged: str | None,
    grams_per_kwh: float | None,
) -> Page:
    groups = _groups(runs, baselines)
    course = course_of(groups)
    target = race.target if race is not None and race.statement is not None else None
    metrics = list(metric_figures(groups, judged, target))
    costs = [table for group in groups for table in cost_table(group.runs, group.name, grams_per_kwh)]
    sections = [
        Section("Metrics", _seen(groups), metrics, budget_table(race, groups[0].name)),
        Section("Loss", "", list(loss_figures(groups, course))),
        Section("Selection", "", list(selection_figures(groups, course))),
        *policy_sections(groups, course),
        Section("Cost", "", (), costs),
        Section("Runs and settings", "", (), [run_table(groups), settings_table(groups)]),
    ]
    subtitle = f"{groups[0].name}, {seeds(runs)}"
    subtitle += f", against {groups[1].name}, {seeds(baselines)}" if baselines else ""
    footer = f"Written by curate {__version__} from log.jsonl of each run. This file loads nothing and runs nothing."
    return Page("Training report", subtitle, findings(runs, baselines, race, grams_per_kwh), sections, footer)


def _groups(runs: Sequence[History], baselines: Sequence[History]) -> list[Group]:
    ours, theirs = name_of(runs), name_of(baselines)
    if ours == theirs:
        ours, theirs = f"{ours} (runs)", f"{theirs} (baselines)"
    return [Group(ours, runs, 0), *([Group(theirs, baselines, 1)] if baselines else [])]


def _seen(groups: Sequence[Group]) -> str:
    if not any(run.evals for group in groups for run in group.runs):
        return "The logs hold no evaluation: give the run held-out shards (--eval) to see a metric here."
    several = any(len(group.runs) > 1 for group in groups)
    return "Lines are means over seeds, bands go from the lowest to the highest seed." if several else ""
