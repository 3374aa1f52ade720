"""What verbs print: the plan, the result, the verification, the bar of a training run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from curate.reasons import REASONS
from curate.results import RunResult

if TYPE_CHECKING:
    from rich.console import Console

    from curate.learner.settings import TrainResult
    from curate.verification import Verification

_MARKS = {True: "ok", False: "FAILED", None: "not tried"}
_GROUPS_SHOWN = 12
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def amount(value: float, unit: str) -> str:
    """A number with a decimal prefix: `amount(3.3e13, "FLOP")` is "33.0 TFLOP"."""
    step = 0
    while abs(value) >= 1000 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:,.{1 if step else 0}f} {_PREFIXES[step]}{unit}"


def duration(seconds: float) -> str:
    """`duration(3700)` is "1 h 2 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def result_lines(result: RunResult) -> list[str]:
    """The summary of a run: counts, and every reason but the two that need no explanation."""
    counts = ", ".join(f"{count:,} {name}" for name, count in result.counts.items() if name != "in")
    lines = [f"{result.output}: {result.counts['in']:,} samples in = {counts} ({duration(result.seconds)})"]
    for reason, count in result.reasons.items():
        if reason not in ("selected", "not-selected"):
            lines.append(f"  {count:,} {reason}: {REASONS[reason]}")
    if result.shards:
        lines.append(
            f"  shards {result.shards[0]} to {result.shards[-1]} ({len(result.shards)}); ledger: _curate/ledger"
        )
    lines += policy_lines(result.certificate) if result.certificate is not None else []
    if result.counts.get("kept") == 0:
        lines.append("  nothing was selected: raise --keep, or look at the reasons in the ledger")
    return lines


def policy_lines(certificate: Mapping[str, Any]) -> list[str]:
    """How a selection kept to its policy, those that missed a bound first, and what that cost."""
    groups = sorted(certificate["groups"], key=lambda row: row["L"] <= row["C"] <= row["V"])
    lines = [f"  policy: {_group_said(row)}" for row in groups[:_GROUPS_SHOWN]]
    if len(groups) > _GROUPS_SHOWN:
        lines.append(f"  policy: {len(groups) - _GROUPS_SHOWN} more groups are in certificate.json")
    if certificate["conflicts"]:
        first, draws = certificate["conflicts"][0], certificate["draws"]
        lines.append(
            f"  policy: {certificate['draws_with_conflict']} of {draws} draws could not keep every bound; most often "
            f"({first['draws']}): {first['conflict']}"
        )
    return [*lines, *_price_lines(certificate)]


def _group_said(row: Mapping[str, Any]) -> str:
    """Example: "gender=female: 15 of 40 chosen, at least 15: at its floor"."""
    least = [f"at least {row['L']:,}"] if row["L"] else []
    most = [f"at most {row['V']:,}"] if row["V"] < row["n"] else []
    chosen = f"{row['group']}: {row['C']:,} of {row['n']:,} chosen"
    return f"{', '.join([chosen, *least, *most])}: {row['reason']}"


def _price_lines(certificate: Mapping[str, Any]) -> list[str]:
    price = certificate["price"]
    if price is None:
        return []
    plain, kept = (price[name] / price["members"] for name in ("score_without", "score_with_policy"))
    share = f" ({(plain - kept) / abs(plain):.1%})" if plain else ""
    unit = certificate.get("price_unit", "score")
    price_said = f"price {plain - kept:.4g} of {unit} per sample{share}"
    return [f"  policy: {price_said}: {kept:.4g} with the policy, {plain:.4g} without"]


def fitted_line(result: TrainResult) -> str:
    """The summary of a training run."""
    skipped = f", {sum(result.skipped.values())} samples skipped" if result.skipped else ""
    work = f"{result.steps} steps over {result.samples} samples in {result.seconds:.0f} s"
    return f"{result.path}: {work}, loss {result.loss:.4f}{skipped}"


def render_plan(plan: Any, console: Console) -> None:
    """The plan of `curate score --dry-run` (a `curate.pipelines.costing.Plan`)."""
    flops = ", ".join(f"{name} {amount(value, 'FLOP')}" for name, value in plan.flops.items() if name != "total")
    rows = {
        "samples": f"{plan.samples:,} in {plan.shards} shards, {plan.quarantined:,} cannot be used",
        "super-batches": f"{plan.super_batches} of up to {plan.super_batch:,}, "
        f"up to {plan.sub_batch:,} drawn from each",
        "selected": f"{plan.selected:,}",
        "compute": f"{amount(plan.flops['total'], 'FLOP')} ({flops})",
        "factor": f"{plan.factor:.2f} x plain training of {plan.factor_of} on the selected samples, scoring counted",
        "bytes": f"{amount(plan.bytes_in, 'B')} read, {amount(plan.bytes_scores, 'B')} of scores, "
        f"about {amount(plan.bytes_out, 'B')} of shards",
        "time": f"about {duration(plan.seconds)} of scoring at {plan.samples_per_second:,.0f} samples/s "
        f"(from {plan.probed} samples on one core)",
    }
    for name, text in rows.items():
        console.print(f"{name:<14}{text}", markup=False, highlight=False)


def render_verification(verification: Verification, console: Console) -> None:
    """One line per check, and the verdict."""
    for check in verification.checks:
        console.print(f"{_MARKS[check.ok]:<10}{check.name:<20}{check.detail}", markup=False, highlight=False)
    verdict = "verified" if verification.ok else "NOT verified: the files contradict each other"
    console.print(f"{verification.output}: {verdict}", markup=False, highlight=False)


@contextlib.contextmanager
def training_bar() -> Iterator[Callable[[Any], None]]:
    """A progress callback for `curate.train`: a bar on a terminal, plain lines elsewhere."""
    from curate.progress import progress

    with contextlib.ExitStack() as stack:
        shown: list[Any] = []

        def report(state: Any) -> None:
            if not shown:
                shown.append(stack.enter_context(progress("train", state.steps, "steps")))
            shown[0].advance(1, f"loss {state.loss:.4f}, {state.samples_per_second:,.0f} samples/s")

        yield report
