"""`--overwrite`: an earlier run stays whole until the one in its place can be drawn.

What a run is refused for may be known only after its scores (a policy that its candidates cannot meet), so it is scored
beside the earlier one, in OUT/_curate/next, which is an output directory of its own; then the earlier run is taken
back, its record replaced, the scores linked, and the directory goes. Killed before that, OUT holds the earlier run;
killed after, the new one; in between no SUCCESS, and the same command goes on. Cost: no byte is copied where the file
system has hard links; while it is scored the new run's scores lie beside the old ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from curate.errors import UsageError
from curate.pipelines import finishing
from curate.receipts import DIRECTORIES, Store
from curate.run_record import RunRecord, pin_run, read_run, repin_run, run_path
from curate.storage import remove, sync_directory

NEXT: Final = "next"  # below OUT/_curate
_SCORED: Final = ("score", "direction", "traits", "policy")


def scoring_place(output: Path, record: RunRecord, *, overwrite: bool) -> Path:
    """Where the run is scored: `output`, pinned, or with an earlier run there the directory beside it.

    Scores that a killed or refused call left there are gone on with where they are of the same shards and models.
    Errors: RunMismatch where `output` belongs to another run and is not to be replaced; UsageError where replacing it
    would remove shards that are to be scored.
    """
    staged = output / "_curate" / NEXT
    if overwrite:
        _refuse_own_shards(output, record)
    if not (overwrite and run_path(output).exists()):
        if overwrite and output.exists():
            finishing.reopen(output, keep=())
            shutil.rmtree(output / "_curate", ignore_errors=True)
        pin_run(output, record)
        Store.of(output).prepare()
        if staged.exists() and _scores_of(staged, record):  # killed while it took the earlier run's place
            _take_scores(staged, output)
        return output
    if not _scores_of(staged, record):
        shutil.rmtree(staged, ignore_errors=True)
    repin_run(staged, record)
    Store.of(staged).prepare()
    return staged


@contextmanager
def unscored(place: Path, output: Path) -> Iterator[None]:
    """A refusal before the first score leaves no trace of the run, so that the mended command finds the place free.

    Scores that are there already stay, as `earlier_kept` says.
    """
    with earlier_kept(place, output):
        try:
            yield
        except UsageError:
            if not any(Store.of(place).receipts("score")):
                _take_back(place)
            raise


@contextmanager
def earlier_kept(staged: Path, output: Path) -> Iterator[None]:
    """A refusal says that the earlier run is as it was, where there is one."""
    try:
        yield
    except UsageError as error:
        if staged == output:
            raise
        kept = f"; what was scored is kept in {staged} for the next --overwrite, and may be removed"
        raise UsageError(
            f"{error}. The earlier run in {output} is as it was{kept if staged.exists() else ''}"
        ) from error


def take_place(staged: Path, output: Path, record: RunRecord) -> None:
    """Remove the earlier run from `output`, and give its place to the one that was scored in `staged`.

    Does nothing where both are the same.
    """
    if staged == output:
        return
    finishing.reopen(output, keep=())  # SUCCESS first
    for path in (output / "_curate").iterdir():
        if path.name not in (NEXT, run_path(output).name):
            shutil.rmtree(path) if path.is_dir() else remove(path)
    repin_run(output, record)
    Store.of(output).prepare()
    _take_scores(staged, output)


def link_stages(old: Store, new: Store, stages: Sequence[str]) -> None:
    """Give files and receipts of these stages a second name in `new`; copies where the file system has no links."""
    for stage in (*stages, "commits"):  # receipts last: they speak of the files
        for path in (old.root / stage).glob("*"):
            name = new.root / stage / path.name
            if stage == "commits" and path.stem.partition("-")[0] not in stages:
                continue
            if not name.exists():
                _link_or_copy(path, name)


def _take_back(place: Path) -> None:
    """Remove a run that has no score, and nothing else that lies there."""
    remove(run_path(place))
    for stage in DIRECTORIES:
        shutil.rmtree(place / "_curate" / stage, ignore_errors=True)
    with suppress(OSError):  # something else is there
        (place / "_curate").rmdir()
        place.rmdir()


def _refuse_own_shards(output: Path, record: RunRecord) -> None:
    """Shards of the earlier run are needed until the new ones are written, and gone before."""
    place = output.resolve()
    for path in (Path(source.url).resolve() for source in record.inputs if "://" not in source.url):
        if path.parent == place or path.is_relative_to(place / "_curate"):
            raise UsageError(f"--overwrite would remove {path}, which this run needs; choose another output directory")


def _take_scores(staged: Path, output: Path) -> None:
    old, new = Store.of(staged), Store.of(output)
    link_stages(old, new, _SCORED)
    for stage in (*_SCORED, "commits"):
        sync_directory(new.root / stage)  # before the other names go
    shutil.rmtree(staged)


def _scores_of(staged: Path, record: RunRecord) -> bool:
    """Are the scores in `staged` those that the run needs?"""
    try:
        there = read_run(staged)
    except UsageError:
        return False
    return _scored(there) == _scored(record)


def _scored(record: RunRecord) -> tuple[object, ...]:
    return record.inputs, record.models, record.settings.score, record.tool


def _link_or_copy(path: Path, name: Path) -> None:
    try:
        name.hardlink_to(path)
    except OSError:
        partial = name.parent.parent / "attempts" / f"{name.name}.{os.urandom(6).hex()}.tmp"
        shutil.copyfile(path, partial)
        partial.replace(name)
