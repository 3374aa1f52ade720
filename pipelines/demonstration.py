"""`curate demo`: a corpus with planted faults, a reference fitted on its clean part, each pass, an audit, two learners.

No network, no GPU, no data. 110 seconds on two cores of an AMD EPYC with the defaults: drawing 7 s, fitting 30 s,
scoring, selecting and writing 4 s, audits 4 s, the learners 56 s, the rest imports and the contact sheet.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from curate.contact_sheet import contact_sheet
from curate.demonstration.corpus import Corpus, draw_corpus
from curate.demonstration.noise_table import NoiseTable, noise_table, noise_view
from curate.demonstration.race import LearnerRace, race
from curate.errors import UsageError
from curate.learner.engine import Progress
from curate.ledger import read_ledger
from curate.pipelines.demonstration_audit import Repair, audit_and_repair, repair_view
from curate.pipelines.runner import score
from curate.pipelines.training import train
from curate.progress import progress
from curate.results import RunResult
from curate.storage import make_directory, readable_json, replace_file
from curate.verification import Verification, verify

if TYPE_CHECKING:
    from rich.console import Console

STEPS: Final = 120  # of 128 pairs: the similarity then tells a right caption from a wrong one in 97 of 100 cases
LEARNING: Final = 100  # steps of each learner, 64 pairs each
_OURS: Final = (
    "corpus", "reference", "selection", "repaired", "uniform", "joint", "contact_sheet.png", "demo.json", "policy.yaml",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the demonstration left in `output`: corpus, reference, selection, contact sheet, noise, audit, learners."""

    output: Path
    corpus: Corpus
    reference: Path
    run: RunResult
    verification: Verification
    noise: NoiseTable
    repair: Repair | None  # None: the corpus is too small for an audit
    learners: LearnerRace
    sheet: Path
    seconds: dict[str, float]  # stage -> wall time

    def as_json(self) -> dict[str, Any]:
        """The result as plain JSON values; also written as `demo.json`."""
        return {
            "schema": 1,
            "output": str(self.output),
            "planted": self.corpus.planted,
            "run": self.run.as_json(),
            "verification": self.verification.as_json(),
            "noise": self.noise.as_json(),
            "audit": None if self.repair is None else self.repair.as_json(),
            "learners": self.learners.as_json(),
            "contact_sheet": str(self.sheet),
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        }


def demo(
    output: str | PathLike[str],
    *,
    seed: int = 0,
    samples: int = 4000,
    clean_reference: int = 1500,
    steps: int = STEPS,
    learning: int = LEARNING,
    keep: float = 0.2,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Demonstration:
    """Run the demonstration into `output`, which must be new or empty; `overwrite` replaces an earlier demonstration.

    Of `samples` pairs about half carry a planted fault; the share `keep` is selected by a reference that was fitted for
    `steps` steps to `clean_reference` sound pairs. Raises UsageError for an output in use.

    >>> demo("demo").noise.row("mismatched-caption").share_after < 0.05    # doctest: +SKIP
    True
    """
    path = _prepared(Path(output).expanduser().absolute(), overwrite=overwrite)
    seconds: dict[str, float] = {}
    with _timed(seconds, "drawing"):
        corpus = draw_corpus(
            path / "corpus", samples=samples, shards=_shards(samples), seed=seed, clean_reference=clean_reference,
            trusted=min(300, samples), held_out=min(400, samples),
        )  # fmt: skip
    with _timed(seconds, "fitting"), _reporting("fit", steps, quiet=quiet) as report:
        fitted = train(
            corpus.reference, path / "reference", model="curate-tiny", steps=steps, seed=seed, progress=report
        )
    with _timed(seconds, "selecting"):
        run = score(
            [corpus.directory / "pool"],
            path / "selection",
            reference=f"local-dir:{fitted.path}",
            keep=keep,
            super_batch=max(samples, 1),  # one: near-duplicates are sought within a super-batch
            seed=seed,
            deduplicate="near",
            workers=workers,
            quiet=quiet,
        )
    with _timed(seconds, "verifying"):
        verification = verify(run.output)
    with _timed(seconds, "auditing"):
        repair = audit_and_repair(corpus, run.output, path, seed=seed, workers=workers, quiet=quiet)
    with _timed(seconds, "learning"):
        learners = _learn(
            corpus, path, fitted.path, run.output, batch=min(64, samples // 10), steps=learning, seed=seed, quiet=quiet
        )
    with _timed(seconds, "reporting"):
        noise = noise_table(corpus.read_truth(), read_ledger(run.output))
        sheet = contact_sheet(run.output, path / "contact_sheet.png", seed=seed)
    result = Demonstration(path, corpus, fitted.path, run, verification, noise, repair, learners, sheet, seconds)
    replace_file(path / "demo.json", readable_json(result.as_json()))
    return result


def render_demonstration(result: Demonstration, console: Console) -> None:
    """Print the table of noise, what became of the rest, and where to look."""
    from rich.text import Text

    counts, noise = result.run.counts, result.noise
    console.print()
    console.print(noise_view(noise))
    console.print()
    if result.repair is not None:
        console.print(repair_view(result.repair))
        console.print()
    lines = [
        f"{counts['in']:,} pairs in: {counts['kept']:,} kept, {counts['dropped']:,} dropped, "
        f"{counts['quarantined']:,} quarantined ({noise.broken_quarantined} of {noise.broken} broken ones).",
        "Time: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items()) + ".",
        *([] if result.repair is None else result.repair.lines()),
        *result.learners.lines(),
        f"Verified: {_verdict(result.verification)}.",
        f"Look at  {result.sheet}",
        f"Shards   {result.run.output}",
        f"Report   {result.output / 'joint' / 'report.html'}",
        *([] if result.repair is None else [f"Audit    {result.repair.reports[0]}"]),
        f"Ask why  curate explain {result.run.output} 000000000",
    ]
    if noise.separation is not None:
        lines.insert(1, f"The reference tells a right caption from a wrong one in {noise.separation:.1%} of cases.")
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _learn(
    corpus: Corpus, path: Path, reference: Path, scored: Path, *, batch: int, steps: int, seed: int, quiet: bool
) -> LearnerRace:
    """Train one learner on uniform and one on joint draws from the pool, faults and all."""
    common: dict[str, Any] = {
        "model": "curate-tiny", "batch": batch, "steps": steps, "seed": seed, "label": "fault",
        "eval_shards": corpus.held_out, "eval_every": max(1, steps // 10), "lr": 1e-3,
    }  # fmt: skip
    with _reporting("uniform", steps, quiet=quiet) as report:
        train(corpus.pool, path / "uniform", criterion="uniform", progress=report, **common)
    with _reporting("joint", steps, quiet=quiet) as report:
        train(
            corpus.pool, path / "joint", reference=f"local-dir:{reference}", reference_cache=scored,
            criterion="learnability", trusted=corpus.trusted, watch_every=max(1, steps // 10),
            baselines=[path / "uniform"], progress=report, **common,
        )  # fmt: skip
    return race(path / "uniform", path / "joint")


def _verdict(verification: Verification) -> str:
    failed = [check.name for check in verification.checks if check.ok is False]
    passed = [check.name for check in verification.checks if check.ok]
    return f"NO, see {', '.join(failed)}" if failed else ", ".join(passed)


def _prepared(path: Path, *, overwrite: bool) -> Path:
    """Make `path`, or empty it of an earlier demonstration; never remove anything else."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; give a directory")
    present = {child.name for child in path.iterdir()} if path.is_dir() else set()
    if present and (not overwrite or not present <= set(_OURS)):
        foreign = sorted(present - set(_OURS))
        advice = f"it holds {foreign[0]!r}, which is not the demo's" if foreign else "--overwrite draws it anew"
        raise UsageError(f"{path} is not empty: {advice}. Otherwise choose another directory")
    for name in present:
        child = path / name
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    make_directory(path)
    return path


def _shards(samples: int) -> int:
    """Eight shards, fewer for a small corpus."""
    return max(1, min(8, samples // 50))


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


@contextmanager
def _reporting(title: str, steps: int, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show the steps of a training."""
    with progress(title, steps, "steps", quiet=quiet) as shown:
        yield lambda state: shown.advance(1, f"loss {state.loss:.2f}")
