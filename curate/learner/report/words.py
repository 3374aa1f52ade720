"""Figures of one or several runs in words, and what runs are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import TypeVar

from curate.learner.report.history import History, word

T = TypeVar("T")


def over(values: Iterable[float | None], shown: Callable[[float], str]) -> str | None:
    """One value as it is, several as their mean and, where it can be seen, their range; None for none.

    Example: `over([0.39, 0.43], "{:.2f}".format)` is "0.41 (0.39 to 0.43 over 2 runs)".
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, mean, high = (shown(value) for value in (min(known), fmean(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high} over {len(known)} runs)"


def criterion_of(run: History) -> str:
    """What the run drew by; "uniform" is IID."""
    return word(run.start, "criterion") or word(run.settings, "criterion") or "unknown criterion"


def name_of(runs: Sequence[History]) -> str:
    """What a group of runs is called: JEST for learnability, IID for uniform draws unless from what was selected ahead
    of the run, else the criterion."""
    known = {"learnability": "JEST", "uniform": "IID"}
    criteria = ((criterion_of(run), run.before.scoring.flops) for run in runs)
    names = ("Selection" if name == "uniform" and ahead else known.get(name, name) for name, ahead in criteria)
    return ", ".join(dict.fromkeys(names))


def seeds(runs: Sequence[History]) -> str:
    """ "seed 0" or "3 runs, seeds 0, 1, 2"."""
    known = [str(run.seed) for run in runs if run.seed is not None]
    if len(runs) == 1:
        return f"seed {known[0]}" if known else "one run"
    return f"{len(runs)} runs" + (f", seeds {', '.join(known)}" if known else "")


def shared(texts: Iterable[tuple[History, T]]) -> list[tuple[T, list[History]]]:
    """Equal texts (or other values) once, each with the runs that it holds for, in the order of first appearance."""
    found: dict[T, list[History]] = {}
    for run, text in texts:
        found.setdefault(text, []).append(run)
    return list(found.items())


def numbered(runs: Sequence[History]) -> str:
    """ "seed 0" or "seeds 0, 1, 2"."""
    known = ["none" if run.seed is None else str(run.seed) for run in runs]
    return f"seed{'s' if len(known) > 1 else ''} {', '.join(known)}"


def differing(runs: Sequence[History]) -> list[str]:
    """Names of settings, but for the seed, that are not the same in all of these runs."""
    names = sorted({name for run in runs for name in run.settings} - {"seed"})
    return [name for name in names if len({plain(run.settings.get(name)) for run in runs}) > 1]


def plain(value: object) -> str:
    """A setting's value as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(inner) for inner in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    """`percent(0.934)` is "93.4 %", with a space that does not break."""
    return f"{100 * share:.1f}\u00a0%"
