"""Score one shard: index, decode, embed with reference and learner; one parquet, rejects included.

Bits do not depend on workers: a batch is fixed by the shard and the batch size, and each batch is computed by one
thread with torch's own threads off; threads run batches side by side, so one decodes while another runs the model.
Memory is bounded by a page of rows and one batch of images per thread (a group of them with alignment, `aligning.py`).
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from curate import scores
from curate.errors import CurateWarning, ModelError
from curate.models.embed import DualEncoder
from curate.models.identity import ModelIdentity
from curate.models.load import load_model
from curate.pipelines.aligning import GROUP_ROWS, Aligner, evenly, open_aligner
from curate.pipelines.threads import Borrowed, borrowed
from curate.reading import ReadLimits, Sample, read_samples
from curate.receipts import Attempt, Receipt, Store, Unit
from curate.score_rows import PREFIX, score_rows, score_schema, spread
from curate.settings import ScoreSettings
from curate.shards.captions import read_caption
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import ShardSource, open_shard, shard_digest
from curate.shards.tarindex import index_tar

# N rows of a page, M of them readable, D width, T context length

PAGE = 4096


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """One shard to score, and with what. Holds names, never models: a worker loads those once per process."""

    output: Path
    source: ShardSource
    settings: ScoreSettings
    models: dict[str, Any]  # role -> ModelIdentity as json; "reference", and "learner" where there is one
    threads: int
    shared: bool = False  # are these threads of all units of a process, or of this one alone?
    cache: Path | None = None
    direction: Path | None = None  # of alignment; what it is made of is in the settings

    @property
    def unit(self) -> Unit:
        source = {"url": self.source.url, "size": self.source.size, "etag": self.source.etag}
        settings = self.settings.model_dump(exclude={"reference", "learner", "precision"}, exclude_none=True)
        return Unit("score", {"source": source, "settings": settings, "models": self.models})


def score_shard(spec: ScoreSpec) -> Receipt:
    """The receipt of one scored shard; its facts count rows, candidates and reasons."""
    return Store.of(spec.output).commit(spec.unit, functools.partial(_score, spec))


def _score(spec: ScoreSpec, attempt: Attempt) -> dict[str, Any]:
    with open_shard(spec.source) as data:
        with ThreadPoolExecutor(1) as beside:  # the digest needs no lock, the index little else
            digesting = beside.submit(shard_digest, data)
            index = index_tar(data)
            digest = digesting.result()
        entries = group_samples(index, digest)
        encoders = _encoders(spec)
        facts: dict[str, Any] = {
            "shard": spec.source.url,
            "digest": digest,
            "rows": len(entries),
            "unread_bytes": 0 if index.flaw is None else max(0, spec.source.size - index.flaw.offset),
            "flaw": None if index.flaw is None else f"{index.flaw.reason} at byte {index.flaw.offset}",
            "models": {role: _model_facts(encoder) for role, encoder in encoders.items()},
        }
        cached = _cached_reference(spec, digest)
        with open_aligner(spec.settings, spec.direction) as aligner:
            pages = list(_pages(spec, data, entries, encoders, cached, aligner))
    table = pa.concat_tables(pages) if pages else score_schema(encoders).empty_table()
    reasons = Counter(reason for reason in table["reason"].to_pylist() if reason is not None)
    facts |= {"candidates": len(entries) - sum(reasons.values()), "reasons": dict(sorted(reasons.items()))}
    with attempt.open(".parquet") as file:
        scores.write_table(file, table, {"identity": spec.models, **facts})
    return facts | {"reference_cached": cached is not None}


def _encoders(spec: ScoreSpec) -> dict[str, DualEncoder]:
    names = {"reference": spec.settings.reference, "learner": spec.settings.learner}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurateWarning)  # the driver has said it already
        encoders = {role: load_model(name, precision=spec.settings.precision) for role, name in names.items() if name}
    for role, encoder in encoders.items():
        differences = encoder.identity.differences(ModelIdentity.from_json(spec.models[role]))
        if differences:
            raise ModelError(f"this worker loads another {role} than the run began with: {'; '.join(differences)}")
    return encoders


def _model_facts(encoder: DualEncoder) -> dict[str, Any]:
    return {"loss": encoder.loss, "scale": encoder.scale, "bias": encoder.bias, "width": encoder.width}


def _cached_reference(spec: ScoreSpec, digest: str) -> pa.Table | None:
    """The reference columns that an earlier run stored for a shard with the same bytes."""
    if spec.cache is None:
        return None
    path = _cached_paths(spec.cache).get(digest)
    if path is None:
        return None
    wanted = ModelIdentity.from_json(spec.models["reference"])
    stored = ModelIdentity.from_json(scores.read_facts(path)["identity"]["reference"])
    if stored.differences(wanted):
        return None  # the driver has refused such a cache already; a unit never mixes
    return scores.read_table(path, ["reason", "ref_image", "ref_text"])


@functools.lru_cache(maxsize=8)
def _cached_paths(cache: Path) -> dict[str, Path]:
    store = Store.of(cache)
    found = ((receipt.facts["digest"], store.locate(receipt.outputs[0])) for receipt in store.receipts("score"))
    return {digest: path for digest, path in found if path is not None}


def _pages(
    spec: ScoreSpec,
    data: memoryview,
    entries: list[SampleEntry],
    encoders: dict[str, DualEncoder],
    cached: pa.Table | None,
    aligner: Aligner | None,
) -> Iterator[pa.Table]:
    min_side = max(encoder.min_side for encoder in encoders.values())
    limits = ReadLimits(spec.settings.max_pixels, spec.settings.max_caption_bytes, min_side)
    start = 0
    # even pages for alignment: a last one of a few rows would be scored among these few
    for page in evenly(entries, PAGE) if aligner else _batches(entries, PAGE):
        rows = None if cached is None else cached.slice(start, len(page))
        start += len(page)
        with borrowed(spec.threads, shared=spec.shared) as pool:
            made = _page(data, page, limits, spec.settings.batch_size, encoders, rows, aligner, pool)
        yield made


def _batches(entries: Sequence[SampleEntry], size: int) -> list[Sequence[SampleEntry]]:
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def _page(
    data: memoryview,
    entries: Sequence[SampleEntry],
    limits: ReadLimits,
    batch_size: int,
    encoders: dict[str, DualEncoder],
    cached: pa.Table | None,
    aligner: Aligner | None,
    pool: Borrowed,
) -> pa.Table:
    """Rows of one page. Captions are tokenised here while the pool is at the images; texts follow these in its queue.

    So no thread waits between images and texts, and the last pieces of work of a page are short ones.
    """
    seen = {role: encoder for role, encoder in encoders.items() if role != "reference" or cached is None}
    groups = evenly(_batches(entries, batch_size), max(1, GROUP_ROWS // batch_size) if aligner else 1)
    read_group = functools.partial(_read_group, data, limits, seen)
    embed_group = functools.partial(_embed_group, seen, aligner)
    if seen:
        reading = pool.read(read_group, embed_group, groups)
    else:  # no thread has anything else to do
        reading = pool.map(lambda group: embed_group(read_group(group)), groups)
    captions = _captions(data, entries, limits) if seen else {}
    texts = {role: _embed_captions(encoder, captions, batch_size, pool) for role, encoder in seen.items()}
    read = [batch for group in reading for batch in group]
    samples = [sample for batch in read for sample in batch.samples]
    good_N = np.array([sample.reason is None for sample in samples], bool)
    if cached is not None and not np.array_equal(good_N, [reason is None for reason in cached["reason"].to_pylist()]):
        return _page(
            data, entries, limits, batch_size, encoders, None, aligner, pool
        )  # read under other limits: embed anew
    columns: dict[str, pa.Array] = {}
    for role in seen:
        image_MD = np.concatenate([batch.images[role] for batch in read])
        columns[f"{PREFIX[role]}_image"] = spread(image_MD, good_N)
        columns[f"{PREFIX[role]}_text"] = spread(texts[role](good_N), good_N)
    if aligner is not None:
        score_N = np.zeros(len(samples), np.float32)
        score_N[good_N] = np.concatenate([batch.alignment for batch in read if batch.alignment is not None])
        columns["alignment"] = pa.array(score_N, mask=~good_N)
    if cached is not None:
        columns |= {name: cached[name].combine_chunks() for name in ("ref_image", "ref_text")}
    return score_rows(samples, columns, encoders)


@dataclass(frozen=True, slots=True)
class _Read:
    """A batch as read: samples without pixels, and for each model the resized pixels of those that can be used."""

    samples: list[Sample]
    pixels: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Batch:
    """What became of a batch: image embeddings per model."""

    samples: list[Sample]
    images: dict[str, NDArray[np.float32]]
    alignment: NDArray[np.float32] | None = None


def _read_group(
    data: memoryview, limits: ReadLimits, encoders: dict[str, DualEncoder], group: Sequence[Sequence[SampleEntry]]
) -> list[_Read]:
    """Read the batches of a group, which alignment scores together; without it a group is one batch."""
    return [_read_batch(data, limits, encoders, entries) for entries in group]


def _read_batch(
    data: memoryview, limits: ReadLimits, encoders: dict[str, DualEncoder], entries: Sequence[SampleEntry]
) -> _Read:
    """A picture is resized for each encoder, and dropped before the next is read."""
    resized: dict[str, list[NDArray[np.uint8]]] = {role: [] for role in encoders}

    def see(rgb_HWC: NDArray[np.uint8]) -> None:
        for role, encoder in encoders.items():
            resized[role].append(encoder.rule.pixels(rgb_HWC))

    samples = read_samples(data, entries, limits, see)
    return _Read(samples, {role: encoder.stack(resized[role]) for role, encoder in encoders.items() if resized[role]})


def _embed_group(encoders: dict[str, DualEncoder], aligner: Aligner | None, group: list[_Read]) -> list[_Batch]:
    embedded = [
        _Batch(
            read.samples, {role: _embed_images(encoder, read.pixels.get(role)) for role, encoder in encoders.items()}
        )
        for read in group
    ]
    if aligner is None:
        return embedded
    captions = [sample.caption or "" for read in group for sample in read.samples if sample.reason is None]
    score_M = aligner([read.pixels["learner"] for read in group if "learner" in read.pixels], captions)
    first, *others = embedded
    return [replace(first, alignment=score_M), *others]


def _embed_images(encoder: DualEncoder, image_BCHW: Tensor | None) -> NDArray[np.float32]:
    if image_BCHW is None:
        return np.zeros((0, encoder.width), np.float32)
    return encoder.embed_images(image_BCHW).numpy()


def _captions(data: memoryview, entries: Sequence[SampleEntry], limits: ReadLimits) -> dict[int, str]:
    """The captions of a page by row, those of unreadable images included: these are not known yet, and few."""
    read = (
        None if entry.reason is not None else read_caption(data, entry, max_bytes=limits.max_caption_bytes)[0]
        for entry in entries
    )
    return {row: caption for row, caption in enumerate(read) if caption is not None}


def _embed_captions(
    encoder: DualEncoder, captions: dict[int, str], batch_size: int, pool: Borrowed
) -> Callable[[NDArray[np.bool_]], NDArray[np.float32]]:
    """Have captions embedded; the function waits for it and gives the embeddings of some of these rows, in order.

    Batches are made of captions of like length, as each is trimmed to its longest.
    """
    token_nT = encoder.tokenize(list(captions.values()))
    order_n = np.argsort((token_nT != 0).sum(1).numpy(), kind="stable")
    batches = [token_nT[order_n[start : start + batch_size]] for start in range(0, len(order_n), batch_size)]
    embedding = pool.map(encoder.embed_texts, batches)

    def rows(wanted_N: NDArray[np.bool_]) -> NDArray[np.float32]:
        sorted_nD = np.concatenate([np.zeros((0, encoder.width), np.float32), *(text.numpy() for text in embedding)])
        text_nD = np.empty_like(sorted_nD)
        text_nD[order_n] = sorted_nD
        return text_nD[wanted_N[list(captions)]]

    return rows
