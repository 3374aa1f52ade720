"""What a training run keeps in its directory beside the checkpoint: pinned settings, states, chosen samples, journal.

RUN/_curate/TRAIN.json     settings, inputs with their digests, models; pinned when the run starts
RUN/_curate/state/         the last two states
RUN/_curate/chosen/        which samples each step trained on
RUN/_curate/next/          what a run that is to take this one's place has been asked; gone when it has begun, but for
                           the scores of one that was refused
RUN/_curate/reference/     the reference's scores; trusted/ those of the trusted pairs
RUN/log.jsonl              the journal; RUN/tensorboard and RUN/report.html show it
RUN/certificate.json       under a policy: what it asked of the draws, what it got; RUN/_curate/policy holds who is in
                           its groups
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import RunMismatch, UsageError
from curate.learner.checkpoint import TRAINING_FILE
from curate.learner.journal import LOG
from curate.learner.settings import FREE
from curate.models.spec import CONFIG_FILE, FEEDFORWARD_FILE, WEIGHTS_FILE
from curate.run_record import differences
from curate.storage import leftovers, make_directory, put_if_absent, readable_json, remove


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Paths of one run."""

    root: Path

    @property
    def own(self) -> Path:
        return self.root / "_curate"

    @property
    def record(self) -> Path:
        return self.own / "TRAIN.json"

    @property
    def state(self) -> Path:
        return self.own / "state"

    @property
    def chosen(self) -> Path:
        return self.own / "chosen"

    @property
    def reference(self) -> Path:
        return self.own / "reference"

    @property
    def trusted(self) -> Path:
        return self.own / "trusted"

    @property
    def events(self) -> Path:
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def certificate(self) -> Path:
        return self.root / "certificate.json"

    @property
    def policy(self) -> Path:
        return self.own / "policy"

    @property
    def next(self) -> Path:
        return self.own / "next"

    @property
    def next_reference(self) -> Path:
        return self.next / "reference"

    @property
    def log(self) -> Path:
        return self.root / LOG

    @property
    def finished(self) -> bool:
        """Does the checkpoint of a finished run lie there?"""
        return (self.root / CONFIG_FILE).is_file()


def check_run(files: RunFiles, *, overwrite: bool) -> None:
    """Refuse a directory that holds something else. Errors: UsageError; call it before the work, not after."""
    root = files.root
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file; a training run is a directory")
    present = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if not present or files.record.is_file() or (overwrite and files.finished) or _only_scores(files, present):
        return
    if files.finished:
        raise UsageError(f"{root} is not empty: it holds a finished checkpoint; --overwrite replaces it")
    advice = f"and holds no {CONFIG_FILE}, so it is not a checkpoint" if overwrite else "choose another directory"
    raise UsageError(f"{root} is not empty, {advice}")


@contextlib.contextmanager
def alone(files: RunFiles) -> Iterator[None]:
    """Keep other processes out of a run while the context lasts; a killed one keeps nobody out. Errors: UsageError."""
    make_directory(files.root)
    handle = os.open(files.root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process trains in {files.root}; wait for its end, or choose another directory"
                ) from None
        yield
    finally:
        os.close(handle)


def begin_run(files: RunFiles, record: dict[str, Any], *, overwrite: bool) -> None:
    """Make the directory and pin the run, or check that the one that was begun there is the same.

    What a killed process left half written goes. Errors: RunMismatch names every difference.
    """
    if overwrite and (files.record.is_file() or files.finished):
        _clear(files)
    make_directory(files.own)
    for directory in (files.root, files.own, files.state, files.chosen):
        for path in leftovers(directory):
            remove(path)
    if put_if_absent(files.record, readable_json(record)):
        return
    there = json.loads(files.record.read_bytes())
    there["settings"] = {name: value for name, value in there["settings"].items() if name not in FREE}
    found = list(differences(there, json.loads(readable_json(record))))
    if found:
        raise RunMismatch(
            f"{files.root} belongs to another run: {'; '.join(found[:6])}. The command that began it resumes "
            "it; choose another directory, or --overwrite to begin anew"
        )


def forget(files: RunFiles) -> None:
    """Take a run back that has not made a step, so that other settings can be tried in its place; the reference's
    scores stay."""
    if not files.finished and not files.state.is_dir() and not files.log.exists():
        clear_but_scores(files.own)


def clear_but_scores(own: Path) -> None:
    """Remove what a run keeps in `own` but the reference's scores, and `own` where there are none."""
    for path in own.glob("*"):
        if path.is_file():
            remove(path)
        elif path.name != "reference":
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty, or not there
        own.rmdir()


def _only_scores(files: RunFiles, present: set[str]) -> bool:
    """Is all that is there what a call left that was refused after its reference's pass?"""
    return present == {files.own.name} and [path.name for path in files.own.iterdir()] == [files.reference.name]


def _clear(files: RunFiles) -> None:
    """Remove a run, and nothing else that lies there; its record last, so that what an interrupt leaves is known.

    What the next run has been asked already stays.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE, FEEDFORWARD_FILE, TRAINING_FILE):
        remove(files.root / name)
    for path in (files.report, files.log, files.certificate):
        remove(path)
    shutil.rmtree(files.events, ignore_errors=True)
    for path in files.own.glob("*"):
        if path.is_dir() and path != files.next:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and path != files.record:
            remove(path)
    remove(files.record)
