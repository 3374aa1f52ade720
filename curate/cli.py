"""The command line: parse, call, print. One thin function per verb; everything heavy is imported when a verb runs.

Results go to standard output (`--json`: one JSON value and nothing else), progress and remarks to standard error.
Exit codes: 0 done, 1 failed, 2 usage, 3 finished with loss above tolerance, 4 verification mismatch, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Env

from curate import __version__
from curate.errors import CurateError
from curate.notes import notes_as_lines

if TYPE_CHECKING:
    from curate.results import RunResult

app = App(
    name="curate",
    version=__version__,
    config=Env("CURATE_"),
    suppress_keyboard_interrupt=False,  # `main` says how to go on
    default_parameter=Parameter(show_env_var=False),
    help="""Pick, from many image-text pairs, the ones a model can learn from now.

    Start with `curate demo` (no data, no network, no GPU), `curate doctor` and `curate inspect SHARDS`;
    `curate score SHARDS -o OUT --reference R` is the main job. Every option can also be set in the environment,
    as CURATE_VERB_OPTION (CURATE_SCORE_KEEP=0.1).""",
)

Flag = Annotated[bool, Parameter(negative="")]  # without a --no- twin: it is off unless given
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON value on standard output.")]
Output = Annotated[Path, Parameter(name=["--output", "-o"], help="The directory that is written.")]
To = Annotated[Path | None, Parameter(name=["--output", "-o"], help="Write there, and leave OUT as it is.")]


@Parameter(name="*")
@dataclass(frozen=True)
class EngineOptions:
    """Where the work runs.

    Parameters
    ----------
    workers
        Units of work at the same time on this machine; up to 4 are threads of this process, more are processes.
    scheduler
        Address of a running Dask scheduler (tls://host:port, or tcp:// on loopback); its workers need to see the
        same paths.
    engine
        inline: no Dask at all. threads: one process. processes: one process per worker.
    allow_remote_scheduler
        Accept a tcp:// scheduler beyond loopback; its protocol lets whoever reaches it run code.
    """

    workers: Annotated[int | None, Parameter(group="Engine")] = None
    scheduler: Annotated[str | None, Parameter(group="Engine")] = None
    engine: Annotated[Literal["inline", "threads", "processes"] | None, Parameter(group="Engine")] = None
    allow_remote_scheduler: Annotated[bool, Parameter(group="Engine", negative="")] = False


LOCAL = EngineOptions()


@app.command
def demo(
    output: Output = Path("demo"),
    *,
    samples: int = 4000,
    steps: int = 120,
    seed: int = 0,
    overwrite: Flag = False,
    json: Json = False,
) -> int:
    """See every pass on a corpus that is drawn here: no network, no GPU, no data, about a minute on two cores.

    Scenes with captions are drawn, faults are planted in them (mismatched and boilerplate captions, near-duplicates,
    blur), a small reference is fitted on a clean part, and the pool is scored, selected, written and verified.

    Example: curate demo -o demo --samples 800

    Parameters
    ----------
    samples
        Pairs in the pool that is filtered.
    seed
        Another seed draws another corpus.
    steps
        Optimiser steps of the reference; fewer are quicker and separate less.
    overwrite
        Replace an earlier demo in that directory.
    """
    from curate.pipelines.demonstration import demo, render_demonstration

    result = demo(output, samples=samples, steps=steps, seed=seed, overwrite=overwrite)
    if json:
        return _print_json(result.as_json())
    render_demonstration(result, _console())
    return 0


@app.command
def doctor(*, json: Json = False) -> int:
    """Look at this machine: versions, cores, memory, GPU, bf16, decode and matrix rates, and what falls back to what.

    Example: curate doctor
    """
    from curate.examination import examine, render_examination

    examination = examine()
    if json:
        return _print_json(examination.as_json())
    render_examination(examination, _console())
    return 0


@app.command
def inspect(*shards: str, decode: Flag = False, json: Json = False) -> int:
    """Look at shards before anything runs on them: counts, formats, corrupt members, duplicate keys, captions, sizes.

    Example: curate inspect 'shards/{00000..00009}.tar' --json

    Parameters
    ----------
    shards
        Files, directories, brace patterns or fsspec URLs.
    decode
        Decode every image instead of reading its header only.
    """
    from curate.inspection import inspect_shards, render_inspection

    inspection = inspect_shards(shards, decode=decode)
    if json:
        return _print_json(inspection.as_json())
    render_inspection(inspection, _console())
    return 0


@app.command
def score(
    *shards: str,
    output: Output,
    reference: str,
    learner: str | None = None,
    keep: float | None = None,
    sub_batch: int | None = None,
    super_batch: int = 20_480,
    chunks: int = 16,
    criterion: Literal["learnability", "easy-reference", "hard-learner"] | None = None,
    gain: float = 100.0,
    loss: Literal["sigmoid", "softmax", "auto"] = "auto",
    seed: int = 0,
    deduplicate: Literal["off", "exact", "near"] = "exact",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    batch_size: int = 64,
    samples_per_shard: int | None = None,
    tolerance: float = 0.05,
    reference_cache: Path | None = None,
    scores_only: Flag = False,
    dry_run: Flag = False,
    overwrite: Flag = False,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Score shards with a reference model (and the learner), select sub-batches, write them to new shards.

    The same command again resumes an interrupted run. Exit code 3: finished, but a shard lost more than --tolerance.

    Example: curate score shards/ -o filtered --reference ViT-B-32:laion2b_s34b_b79k --keep 0.2 --dry-run

    Parameters
    ----------
    shards
        Files, directories, brace patterns or fsspec URLs of WebDataset shards.
    reference
        A small pretrained model: an open_clip name (ViT-B-32:laion2b_s34b_b79k), hf-hub:..., local-dir:..., or a
        directory that `curate train` wrote.
    learner
        The model that is to learn, at the checkpoint it has now; needed by learnability and hard-learner.
    keep
        Share of the candidates that is kept (0.2 unless --sub-batch is given).
    sub_batch
        Samples drawn from each super-batch, instead of --keep.
    super_batch
        Candidates that are drawn from together.
    chunks
        Steps in which a sub-batch is drawn.
    criterion
        learnability (with a learner; else easy-reference) finds what can be learned now; easy-reference is the
        stronger noise filter; hard-learner takes noise for difficulty.
    gain
        Sharpness of the draw.
    loss
        The models' own, unless given.
    deduplicate
        Drop copies within a super-batch first: the sampler is drawn to them. near: by perceptual hash.
    precision
        auto: bf16 where the hardware computes it, checked against fp32.
    batch_size
        Samples that are embedded together; part of what fixes the bits of a score.
    samples_per_shard
        Samples in an output shard, at most 10000; fewer by default for small outputs, so that loaders have 8 shards.
    tolerance
        Share of a shard's samples that may be lost before the run ends with exit code 3.
    reference_cache
        An earlier output whose reference embeddings are used again; refused if they are of another model.
    scores_only
        Stop after scoring; `curate select` draws later.
    dry_run
        Print the plan (samples, super-batches, FLOPs, bytes, time) and write nothing.
    overwrite
        Replace a run that is in the output directory.
    """
    from curate.pipelines import runner

    values: dict[str, Any] = {
        "reference": reference, "learner": learner, "keep": keep, "sub_batch": sub_batch, "super_batch": super_batch,
        "chunks": chunks, "criterion": criterion, "gain": gain, "loss": loss, "seed": seed,
        "deduplicate": deduplicate, "precision": precision, "batch_size": batch_size,
        "samples_per_shard": samples_per_shard, "reference_cache": reference_cache,
    }  # fmt: skip
    if dry_run:
        plan = runner.plan(shards, output, **values)
        if json:
            return _print_json(plan.as_json())
        from curate.reports import render_plan

        render_plan(plan, _console())
        return 0
    result = runner.score(
        shards, output, **values, **asdict(running), tolerance=tolerance, scores_only=scores_only,
        overwrite=overwrite, quiet=False,
    )  # fmt: skip
    return _print_result(result, json)


@app.command
def select(
    out: Path,
    /,
    *,
    output: To = None,
    keep: float | None = None,
    sub_batch: int | None = None,
    super_batch: int | None = None,
    chunks: int | None = None,
    criterion: Literal["learnability", "easy-reference", "hard-learner"] | None = None,
    gain: float | None = None,
    loss: Literal["sigmoid", "softmax"] | None = None,
    seed: int | None = None,
    deduplicate: Literal["off", "exact", "near"] | None = None,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Draw anew from the scores stored in OUT, without a model; what is not given stays as it was.

    The shards written from the earlier selection are taken back; `curate write` writes the new ones.

    Example: curate select filtered -o stricter --keep 0.1

    Parameters
    ----------
    out
        An output directory of `curate score`.
    keep, sub_batch, super_batch, chunks, criterion, gain, loss, seed, deduplicate
        As in `curate score`.
    """
    from curate.pipelines import repeating

    result = repeating.select(
        out, to=output, keep=keep, sub_batch=sub_batch, super_batch=super_batch, chunks=chunks, criterion=criterion,
        gain=gain, loss=loss, seed=seed, deduplicate=deduplicate, **asdict(running), quiet=False,
    )  # fmt: skip
    code = _print_result(result, json)
    if not json:
        print(f"next: curate write {result.output}", file=sys.stderr)
    return code


@app.command
def write(
    out: Path,
    /,
    *,
    output: To = None,
    samples_per_shard: int | None = None,
    tolerance: float = 0.05,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Write the shards of the selection stored in OUT, without a model.

    Example: curate write filtered -o resharded --samples-per-shard 1000

    Parameters
    ----------
    out
        An output directory of `curate score` or `curate select`.
    samples_per_shard
        Samples in an output shard, at most 10000.
    tolerance
        As in `curate score`.
    """
    from curate.pipelines import repeating

    result = repeating.write(
        out, to=output, samples_per_shard=samples_per_shard, tolerance=tolerance, **asdict(running), quiet=False
    )
    return _print_result(result, json)


@app.command
def verify(out: Path, /, *, load: bool = True, json: Json = False) -> int:
    """Prove OUT from its files: accounting, digests, pairs, sub-batches, and that webdataset and open_clip load it.

    Exit code 4 if anything contradicts anything else.

    Example: curate verify filtered

    Parameters
    ----------
    out
        An output directory.
    load
        Also load a sample with webdataset and with open_clip's own data pipeline.
    """
    from curate.pipelines.runner import local_output
    from curate.reports import render_verification
    from curate.verification import verify

    verification = verify(local_output(out), load=load)
    if json:
        _print_json(verification.as_json())
    else:
        render_verification(verification, _console())
    return 0 if verification.ok else 4


@app.command
def explain(out: Path, key: str | None = None, /, *, sheet: Path | None = None, json: Json = False) -> int:
    """Say why a sample was kept, dropped or rejected (scores, rank, sub-batch, reason), or without KEY sum all up.

    Example: curate explain filtered 000000042

    Parameters
    ----------
    out
        An output directory.
    key
        The sample's original key, its new key, its DataComp uid or its sample id.
    sheet
        Draw a contact sheet of kept, dropped and rejected samples there (PNG); reads the original shards.
    """
    from curate.explanation import explain, summarise
    from curate.pipelines.runner import local_output

    path = local_output(out)
    found = [] if key is None else explain(path, key)
    if sheet is not None:
        from curate.contact_sheet import contact_sheet

        print(contact_sheet(path, sheet), file=sys.stderr)
    if key is None:
        summary = summarise(path)
        return _print_json(summary) if json else _print_lines(f"{n:>12,}  {what}" for what, n in summary.items())
    if json:
        return _print_json([explanation.as_json() for explanation in found])
    return _print_lines("\n".join([*explanation.sentences, ""]) for explanation in found)


@app.command
def train(
    *shards: str,
    output: Output,
    model: str = "curate-tiny",
    criterion: Literal["uniform"] = "uniform",
    loss: Literal["sigmoid", "softmax"] = "sigmoid",
    batch: int = 128,
    steps: int | None = None,
    epochs: float = 10.0,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    augment: Flag = False,
    seed: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    eval_shards: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    overwrite: Flag = False,
    json: Json = False,
) -> int:
    """Fit a small open_clip model on shards, drawn uniformly, and save a checkpoint that open_clip loads.

    It makes references: `curate score ... --reference CKPT`, or in open_clip `local-dir:CKPT`.

    Example: curate train shards/ -o reference --model curate-tiny --epochs 5

    Parameters
    ----------
    shards
        Files, directories, brace patterns or fsspec URLs.
    model
        curate-tiny, curate-small, or any architecture of open_clip.
    steps
        Optimiser steps; instead of --epochs.
    augment
        Shift and zoom images by up to a tenth.
    eval_shards
        Shards on which image-text retrieval is measured at the end.
    overwrite
        Replace a checkpoint that is in the output directory.
    """
    from curate.learner.train import train
    from curate.reports import fitted_line, training_bar

    settings: dict[str, Any] = {
        "model": model, "criterion": criterion, "loss": loss, "batch": batch, "steps": steps, "epochs": epochs,
        "lr": lr, "weight_decay": weight_decay, "warmup": warmup, "augment": augment, "seed": seed,
        "precision": precision, "eval_shards": eval_shards,
    }  # fmt: skip
    with training_bar() as report:
        result = train(shards, output, overwrite=overwrite, progress=report, **settings)
    if json:
        return _print_json({**asdict(result), "path": str(result.path)})
    print(fitted_line(result), file=sys.stderr)
    return _print_lines([f"local-dir:{result.path}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never lets a known error out as a traceback."""
    try:
        with notes_as_lines():
            return int(app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except CycloptsError as error:
        return _fail(f"{error} See `{' '.join(('curate', *(error.command_chain or ())))} --help`.", 2)
    except CurateError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command resumes", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = error.filename or "input or output"
        return _fail(f"{where}: {error.strerror or error}; check the path and the disk", 1)


def _fail(message: str, code: int) -> int:
    print(f"curate: {message}", file=sys.stderr)
    return code


def _console() -> Any:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))
    return 0


def _print_lines(lines: Iterable[str]) -> int:
    print("\n".join(lines))
    return 0


def _print_result(result: RunResult, as_json: bool) -> int:
    """The summary, and as the last line open_clip's command for the new shards."""
    if as_json:
        return _print_json(result.as_json())
    from curate.formats.openclip import webdataset_note
    from curate.reports import result_lines

    print("\n".join(result_lines(result)), file=sys.stderr)
    if result.train_command is not None:
        if note := webdataset_note():
            print(f"curate: note: {note}", file=sys.stderr)
        print(result.train_command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
