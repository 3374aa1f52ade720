"""Verbs that look and change nothing: the machine, shards, a finished run; and the demonstration of them all."""

from __future__ import annotations

import sys
from pathlib import Path

from curate.cli.options import Flag, Json, Output
from curate.cli.printing import console, print_json, print_lines


def demo(
    output: Output = Path("demo"),
    *,
    samples: int = 4000,
    steps: int = 120,
    learning: int = 100,
    seed: int = 0,
    overwrite: Flag = False,
    json: Json = False,
) -> int:
    """See every pass on a corpus that is drawn here: no network, no GPU, no data, under two minutes on two cores.

    Scenes with captions are drawn, faults are planted in them (mismatched and boilerplate captions, near-duplicates,
    blur), a small reference is fitted on a clean part, and the pool is scored, selected, written and verified. An audit
    then finds the group that the reference treats unevenly, and a policy repairs it. Last, two learners train on the
    faulty pool side by side, one on uniform draws, one on joint ones.

    Example: curate demo -o demo --samples 800

    Parameters
    ----------
    samples
        Pairs in the pool that is filtered.
    seed
        Another seed draws another corpus.
    steps
        Optimiser steps of the reference; fewer are quicker and separate less.
    learning
        Optimiser steps of each learner.
    overwrite
        Replace an earlier demo in that directory.
    """
    from curate.pipelines.demonstration import demo, render_demonstration

    result = demo(output, samples=samples, steps=steps, learning=learning, seed=seed, overwrite=overwrite)
    if json:
        return print_json(result.as_json())
    render_demonstration(result, console())
    return 0


def doctor(*, json: Json = False) -> int:
    """Look at this machine: versions, cores, memory, GPU, bf16, decode and matrix rates, and what falls back to what.

    Example: curate doctor
    """
    from curate.examination import examine, render_examination

    examination = examine()
    if json:
        return print_json(examination.as_json())
    render_examination(examination, console())
    return 0


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
        return print_json(inspection.as_json())
    render_inspection(inspection, console())
    return 0


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
        print_json(verification.as_json())
    else:
        render_verification(verification, console())
    return 0 if verification.ok else 4


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
        return print_json(summary) if json else print_lines(f"{n:>12,}  {what}" for what, n in summary.items())
    if json:
        return print_json([explanation.as_json() for explanation in found])
    return print_lines("\n".join([*explanation.sentences, ""]) for explanation in found)
