"""An evaluation as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from curate.evaluation.interval import Share
from curate.evaluation.retrieval import Retrieval
from curate.evaluation.zeroshot import ClassFigures, ZeroShot
from curate.inspection import printable

if TYPE_CHECKING:
    from rich.console import Console

    from curate.evaluation.measure import Evaluation

MOST_ROWS: Final = 20


def render_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print what was measured; names of classes are printed as text, whatever markup they hold."""
    model = evaluation.model
    console.print(f"{model.name} ({model.precision}), {evaluation.seconds:.1f} s", markup=False, highlight=False)
    if evaluation.zeroshot is not None:
        console.print(_accuracy(evaluation.zeroshot))
        console.print(_classes(evaluation.zeroshot.classes))
        _print_skipped(evaluation.zeroshot.skipped, console)
    if evaluation.retrieval is not None:
        console.print(_recall(evaluation.retrieval))
        _print_skipped(evaluation.retrieval.skipped, console)


def _accuracy(found: ZeroShot) -> Table:
    prompts = f"{len(found.templates)} prompts" if len(found.templates) > 1 else repr(printable(found.templates[0]))
    title = f"Zero-shot: {found.images:,} images, {len(found.classes):,} classes, {prompts}"
    table = Table("measure", "share", "95 % interval", title=Text(title))
    for name, share in (("top-1", found.top1), ("top-5", found.top5), ("mean per class", found.mean_per_class)):
        table.add_row(name, _percent(share.value), _interval(share))
    return table


def _classes(classes: tuple[ClassFigures, ...]) -> Table:
    """The classes from the worst; of many, the worst only."""
    ordered = sorted(classes, key=lambda one: (one.top1.value if one.top1 else 2.0, one.name))
    title = "Classes" if len(ordered) <= MOST_ROWS else f"The {MOST_ROWS} classes with the lowest share"
    table = Table("class", "images", "top-1", "95 % interval", title=title)
    for one in ordered[:MOST_ROWS]:
        shown = ("", "") if one.top1 is None else (_percent(one.top1.value), _interval(one.top1))
        table.add_row(Text(printable(one.name), overflow="fold"), f"{one.images:,}", *shown)
    return table


def _recall(found: Retrieval) -> Table:
    pools = f"in {found.pools:,} pools of {found.pool:,}" if found.pools > 1 or found.left_over else "in one pool"
    rest = f", {found.left_over:,} left over" if found.left_over else ""
    title = f"Retrieval: {found.images:,} images, {found.captions:,} captions, {pools}{rest}"
    table = Table("recall", "share", "95 % interval", "chance", title=title)
    for direction, at in (("image to text", found.image_to_text), ("text to image", found.text_to_image)):
        for k, one in at.items():
            table.add_row(
                f"{direction} at {k}", _percent(one.recall.value), _interval(one.recall), _percent(one.chance)
            )
    return table


def _print_skipped(skipped: dict[str, int], console: Console) -> None:
    if skipped:
        what = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        console.print(f"left out: {what}", markup=False, highlight=False)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(share: Share) -> str:
    return f"{100 * share.low:.1f} to {100 * share.high:.1f} %"
