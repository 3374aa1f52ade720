"""What a training run keeps in its directory beside the checkpoint: pinned settings, states, chosen samples, journal.

RUN/_curate/TRAIN.json     settings, inputs with their digests, models; pinned when the run starts
RUN/_curate/state/         the last two states
RUN/_curate/chosen/        which samples each step trained on
RUN/_curate/reference/     the reference's scores
RUN/log.jsonl              the journal; RUN/tensorboard and RUN/report.html show it
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import RunMismatch, UsageError
from curate.learner.journal import LOG
from curate.models.spec import CONFIG_FILE
from curate.run_record import differences
from curate.storage import make_directory, put_if_absent, readable_json, remove


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
    if not present or files.record.is_file() or (overwrite and files.finished):
        return
    if files.finished:
        raise UsageError(f"{root} is not empty: it holds a finished checkpoint; --overwrite replaces it")
    advice = f"and holds no {CONFIG_FILE}, so it is not a checkpoint" if overwrite else "choose another directory"
    raise UsageError(f"{root} is not empty, {advice}")


def begin_run(files: RunFiles, record: dict[str, Any], *, overwrite: bool) -> None:
    """Make the directory and pin the run, or check that the one that was begun there is the same.

    Errors: RunMismatch names every difference.
    """
    if overwrite and files.root.is_dir():
        for path in files.root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else remove(path)
    make_directory(files.own)
    if put_if_absent(files.record, readable_json(record)):
        return
    found = list(differences(json.loads(files.record.read_bytes()), json.loads(readable_json(record))))
    if found:
        raise RunMismatch(
            f"{files.root} belongs to another run: {'; '.join(found[:6])}. The command that began it resumes "
            "it; choose another directory, or --overwrite to begin anew"
        )
