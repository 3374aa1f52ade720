"""Zero-shot attributes of a pool: its images embedded by a model that had no part in the selection, then compared.

The images go through the scoring pass, which keeps its tables under the weights' digest: the next audit with the same
model, whatever its name, prompts and threshold, embeds nothing. Cost: a forward pass of both towers for each sample the
first time, and 4 D bytes of disk; then the prompts alone. In memory is one shard's table.
"""

# N samples of a shard, n of them embedded, G groups, P prompts, T tokens, D width

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from curate import scores
from curate.auditing.attributes import Attribute, Attributes
from curate.auditing.columns import shown
from curate.auditing.zero_shot import PREDICTED, group_vectors, guesses, probabilities, with_model
from curate.chosen import read_training
from curate.errors import CurateError, UsageError
from curate.evaluation.zeroshot import PROMPTS
from curate.models.embed import DualEncoder
from curate.models.load import load_model
from curate.models.spec import CONFIG_FILE, parse_spec
from curate.pipelines.passes import Job, Running, path_of, score_pass
from curate.run_record import RunRecord, TeeRecord, read_record, run_path
from curate.settings import RunSettings, ScoreSettings
from curate.shards.sources import ShardSource

DIRECTORY: Final = "attributes"  # in the audit's store; below it a store per model


def predict(
    running: Running,
    place: Path,
    output: Path,
    sources: tuple[ShardSource, ...],
    attributes: Attributes,
    wanted: Collection[str] | None,
) -> pa.Table | None:
    """What the model takes each sample of the shards for: sample_id and "predicted:NAME", as `predicted_columns` reads.

    Tables of embeddings are kept below `place`; `output` is what was audited. None where no column is `wanted`.
    Errors: UsageError for a model that scored the pool or learned on it, ModelError, ShardError.
    """
    asked = [one for one in attributes.columns if wanted is None or shown(one.name) in wanted]
    if not asked:
        return None
    _refuse_named(output, attributes)
    encoder = load_model(attributes.model.absolute)
    _refuse_scorer(output, attributes, encoder.identity.checkpoint)
    vectors = _vectors(encoder, attributes, asked)
    parts = [
        _guessed(table, vectors, encoder, attributes.threshold)
        for table in _embedded(running, place, sources, attributes, encoder)
    ]
    return with_model(pa.concat_tables(parts), encoder.identity.checkpoint, encoder.loss)


def _vectors(
    encoder: DualEncoder, attributes: Attributes, asked: Sequence[Attribute]
) -> dict[str, tuple[NDArray[np.float32], int]]:
    """Name -> the vectors of its groups, and how many groups there are without `otherwise`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in units: the same bits whatever runs beside it
    try:
        return {
            one.name: (group_vectors(one, attributes.templates, lambda texts: _embed(encoder, texts)), len(one.groups))
            for one in asked
        }
    finally:
        torch.set_num_threads(threads)


def _embed(encoder: DualEncoder, texts: Sequence[str]) -> NDArray[np.float32]:
    """Unit vectors, a few hundred captions at a time."""
    token_PT = encoder.tokenize(texts)
    return np.concatenate([encoder.embed_texts(part).numpy() for part in token_PT.split(PROMPTS)])


def _embedded(
    running: Running, place: Path, sources: tuple[ShardSource, ...], attributes: Attributes, encoder: DualEncoder
) -> Iterator[pa.Table]:
    """sample_id and ref_image of each shard, scored now or by an earlier audit."""
    checkpoint = encoder.identity.checkpoint
    identity = encoder.identity.to_json() | {"name": f"sha256:{checkpoint}"}  # a copy elsewhere is the same model
    settings = RunSettings(score=ScoreSettings(reference=attributes.model.absolute), select=None)
    record = RunRecord(settings, sources, {"reference": identity})
    job = Job(place / DIRECTORY / checkpoint[:32], record, running.engine, quiet=running.quiet)
    job.store.prepare()
    for receipt in score_pass(job):
        yield scores.read_table(path_of(job, receipt), ["sample_id", "ref_image"])


def _guessed(
    table: pa.Table, vectors: Mapping[str, tuple[NDArray[np.float32], int]], encoder: DualEncoder, threshold: float
) -> pa.Table:
    valid_N = pc.is_valid(table["ref_image"]).to_numpy()
    image_nD = scores.unpack(table["ref_image"].filter(pa.array(valid_N)))
    columns = {"sample_id": table["sample_id"].combine_chunks()}
    for name, (group_GD, groups) in vectors.items():
        codes_N = np.zeros(len(table), np.int32)
        found_nG = probabilities(image_nD, group_GD, loss=encoder.loss, scale=encoder.scale, bias=encoder.bias)
        codes_N[valid_N] = guesses(found_nG, threshold, groups)
        columns[PREDICTED + name] = pa.array(codes_N, mask=~valid_N)
    return pa.table(columns)


def scored_by(output: Path) -> dict[str, str]:
    """Checkpoint digests of the models that had a part in a selection: role -> sha256 of the weights.

    Those that a record pins; of a training also the learner as it began and as it ended, where its weights are here.
    """
    found: dict[str, str] = {}
    run: Path | None = output
    if run_path(output).is_file():
        record = read_record(output)
        found |= {role: identity["checkpoint"] for role, identity in record.models.items()}
        run = record.run if isinstance(record, TeeRecord) else None
    if run is not None and (run / "_curate" / "TRAIN.json").is_file():
        found |= {role: identity["checkpoint"] for role, identity in read_training(run).models.items()}
    if run is not None and (run / CONFIG_FILE).is_file():
        found["learner"] = load_model(str(run)).identity.checkpoint
    starts = {role: _digest(spec) for role, spec in _named_models(output).items() if role not in found}
    return found | {role: digest for role, digest in starts.items() if digest}


def _refuse_named(output: Path, attributes: Attributes) -> None:
    """By its name alone, since the weights that a training names need not be here."""
    for role, spec in _named_models(output).items():
        if spec == attributes.model.absolute:
            raise _same(attributes, role)


def _refuse_scorer(output: Path, attributes: Attributes, checkpoint: str) -> None:
    for role, digest in scored_by(output).items():
        if digest == checkpoint:
            raise _same(attributes, role)


def _same(attributes: Attributes, role: str) -> UsageError:
    return attributes.marked.error(
        ("model",),
        f"{attributes.model_name} is the {role} of this selection, so its errors are what the audit looks for; name a "
        "model that had no part in it",
    )


def _named_models(output: Path) -> dict[str, str]:
    """The models that a training was given, by role, as specs."""
    if run_path(output).is_file():
        record = read_record(output)
        settings = record.train if isinstance(record, TeeRecord) else {}
    else:
        settings = read_training(output).settings
    given = {"reference": settings.get("reference"), "start of the learner": settings.get("model")}
    return {role: spec for role, spec in given.items() if spec}


def _digest(spec: str) -> str | None:
    """Of weights that lie on this machine; None for others, whose name has been compared."""
    try:
        local = parse_spec(spec).kind in ("directory", "file")
        return load_model(spec).identity.checkpoint if local else None
    except CurateError:
        return None
