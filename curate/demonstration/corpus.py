"""Draw the demonstration's corpus: scenes with captions, planted faults, and the truth about both.

Every picture and caption comes from a generator seeded by (seed, part, position), so that a sample does not depend on
the others. The faults are planted in exact numbers; each sample's json and `truth.parquet` say which. About 0.9 ms per
sample of 64 x 64 pixels on one core.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance, ImageFilter

from curate.demonstration.labels import looks_of, write_labels
from curate.demonstration.phrases import boilerplate, describe
from curate.demonstration.scenes import Scene, draw, imagine
from curate.errors import UsageError
from curate.formats.img2dataset import SAMPLES_PER_SHARD
from curate.shards.tarwriter import tar_end, tar_member
from curate.storage import make_directory, replace_file

FAULTS: Final = ("mismatched-caption", "boilerplate-caption", "near-duplicate", "blurred-image")
BROKEN: Final = ("truncated-image", "missing-caption", "duplicate-key")  # each ends in the ledger as quarantined
PARTS: Final = ("pool", "reference", "trusted", "heldout")  # their places enter the seeds
POOL = 0
_SCENE, _FAULT = 0, 1  # streams of one sample
QUALITY: Final = 92  # of the JPEGs

TRUTH_SCHEMA: Final = pa.schema(
    [
        ("shard", pa.string()),  # name of the file, "00003.tar"
        ("ordinal", pa.int32()),  # position in the shard, as in the ledger
        ("key", pa.string()),
        ("part", pa.string()),  # one of PARTS
        ("fault", pa.string()),  # null, or one of FAULTS or BROKEN
        ("origin", pa.int32()),  # number of the drawing: equal for a sample and its near-duplicates
        ("group", pa.string()),  # "caption-en" or "caption-de"
        ("caption", pa.string()),
        ("true_caption", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class FaultRates:
    """Shares of the pool; a sample has at most one fault."""

    mismatched: float = 0.25
    boilerplate: float = 0.1
    near_duplicate: float = 0.1
    blurred: float = 0.1

    def __post_init__(self) -> None:
        rates = [getattr(self, field.name) for field in fields(self)]
        if min(rates) < 0 or sum(rates) > 0.95:
            raise UsageError(f"{self}: each rate must be at least 0 and their sum at most 0.95")


@dataclass(frozen=True, slots=True)
class GroupShares:
    """Shares of samples with a German caption.

    The reference hardly meets them, which is the planted cause of uneven treatment.
    """

    pool: float = 0.12
    reference: float = 0.05


@dataclass(frozen=True, slots=True)
class Corpus:
    """What was drawn: the shards of the pool and of the clean parts, and the table of truth about all.

    `labels` is a CSV of the pool's groups and looks, by key (`curate.demonstration.labels`).
    """

    directory: Path
    pool: tuple[Path, ...]
    reference: tuple[Path, ...]
    trusted: tuple[Path, ...]
    held_out: tuple[Path, ...]
    truth: Path
    labels: Path
    planted: dict[str, int]  # fault -> number in the pool

    def read_truth(self) -> pa.Table:
        """The truth about every sample, columns as in `TRUTH_SCHEMA`."""
        return pq.read_table(self.truth)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one sample is to become, decided before anything is drawn."""

    part: int
    index: int
    key: str
    shard: str
    ordinal: int
    fault: str | None
    origin: int
    origin_key: str
    language: str


def draw_corpus(
    directory: Path,
    *,
    samples: int = 4000,
    shards: int = 8,
    seed: int = 0,
    faults: FaultRates | None = None,
    groups: GroupShares | None = None,
    clean_reference: int = 1500,
    trusted: int = 0,
    held_out: int = 0,
    side: int = 64,
) -> Corpus:
    """Draw `samples` scenes into DIRECTORY/pool, faults among them, and `clean_reference` into DIRECTORY/reference;
    `trusted` and `held_out` further sound ones, captioned like the pool, into DIRECTORY/trusted and DIRECTORY/heldout.

    Shards are named and keyed as img2dataset does (`00003.tar`, key `000030017`), each sample is KEY.jpg, KEY.txt and
    KEY.json. Twelve of 4000 samples are broken in structure (cut image, no caption, repeated key). Equal arguments give
    equal bytes on one version of Pillow and numpy. Takes about 5 s for the defaults on one core.

    >>> corpus = draw_corpus(Path("demo"), samples=400, shards=2, clean_reference=100)    # doctest: +SKIP
    >>> corpus.planted["mismatched-caption"]                                              # doctest: +SKIP
    100
    """
    faults, groups = faults or FaultRates(), groups or GroupShares()
    _check(samples, shards, clean_reference)
    pool = _plan(POOL, samples, shards, seed, faults, groups.pool)
    rows: list[dict[str, Any]] = []
    paths = {"pool": _write_part(directory / "pool", pool, seed, side, rows)}
    sound = FaultRates(0, 0, 0, 0)
    for part, count, german in (
        ("reference", clean_reference, groups.reference), ("trusted", trusted, groups.pool),
        ("heldout", held_out, groups.pool),
    ):  # fmt: skip
        plans = _plan(PARTS.index(part), count, 1, seed, sound, german) if count else []
        paths[part] = _write_part(directory / part, plans, seed, side, rows)
    truth = directory / "truth.parquet"
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, TRUTH_SCHEMA), buffer)
    replace_file(truth, buffer.getvalue())
    whole = [row for row in rows if row["part"] == PARTS[POOL] and row["fault"] not in BROKEN]
    labels = write_labels(directory / "labels.csv", whole)
    planted = Counter(plan.fault for plan in pool if plan.fault is not None)
    counts = {fault: planted[fault] for fault in (*FAULTS, *BROKEN)}
    pool_paths, reference, sound_paths, held = (paths[part] for part in PARTS)
    return Corpus(directory, pool_paths, reference, sound_paths, held, truth, labels, counts)


def _check(samples: int, shards: int, clean_reference: int) -> None:
    if samples < 20 or clean_reference < 1:
        raise UsageError(f"{samples} samples and {clean_reference} for the reference: draw at least 20 and 1")
    if not max(1, samples / SAMPLES_PER_SHARD) <= shards <= samples // 4:
        raise UsageError(f"{shards} shards for {samples} samples: a shard holds between 4 and {SAMPLES_PER_SHARD}")


def _plan(part: int, samples: int, shards: int, seed: int, rates: FaultRates, german: float) -> list[_Plan]:
    """Assign keys, faults, sources of near-duplicates and languages."""
    rng = np.random.default_rng([seed, part])
    per_shard = -(-samples // shards)
    places = [
        i for i in range(samples) if i % per_shard
    ]  # the first of a shard stays sound: its key is the one repeated
    fault_of = _assign_faults(rng, samples, places, rates, broken=max(1, samples // 1000) if part == POOL else 0)
    sound = [i for i, fault in enumerate(fault_of) if fault is None]
    sources = rng.choice(sound, size=samples)
    says_german = rng.random(samples) < german
    keys = [f"{i // per_shard:05d}{i % per_shard:04d}" for i in range(samples)]
    plans = []
    for i, fault in enumerate(fault_of):
        origin = int(sources[i]) if fault == "near-duplicate" else i
        key = keys[i // per_shard * per_shard if fault == "duplicate-key" else i]
        place = (f"{i // per_shard:05d}.tar", i % per_shard)
        language = "de" if says_german[origin] else "en"
        plans.append(_Plan(part, i, key, *place, fault, origin, keys[origin], language))
    return plans


def _assign_faults(
    rng: np.random.Generator, samples: int, places: Sequence[int], rates: FaultRates, *, broken: int
) -> list[str | None]:
    shares = (rates.mismatched, rates.boilerplate, rates.near_duplicate, rates.blurred)
    planted = [fault for fault, share in zip(FAULTS, shares, strict=True) for _ in range(round(share * samples))]
    planted += [fault for fault in BROKEN for _ in range(broken)]
    fault_of: list[str | None] = [None] * samples
    for place, fault in zip(rng.permutation(places).tolist(), planted, strict=False):
        fault_of[place] = fault
    return fault_of


def _write_part(
    directory: Path, plans: Sequence[_Plan], seed: int, side: int, rows: list[dict[str, Any]]
) -> tuple[Path, ...]:
    if not plans:
        return ()
    make_directory(directory)
    by_shard: dict[str, list[_Plan]] = {}
    for plan in plans:
        by_shard.setdefault(plan.shard, []).append(plan)
    for name, members in by_shard.items():
        shard = bytearray()
        for plan in members:
            for member, payload in _sample(plan, seed, side, rows):
                for piece in tar_member(member, payload):
                    shard += piece
        shard += tar_end(len(shard))
        replace_file(directory / name, bytes(shard))
    return tuple(directory / name for name in by_shard)


def _sample(plan: _Plan, seed: int, side: int, rows: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """Draw one sample: its members in order, and its row of truth."""
    rng = np.random.default_rng([seed, plan.part, plan.origin, _SCENE])
    scene = imagine(rng)
    image = draw(scene, rng, side=side)
    fault_rng = np.random.default_rng([seed, plan.part, plan.index, _FAULT])
    true_caption = describe(scene, fault_rng, language=plan.language)
    caption, detail = _caption(plan, scene, true_caption, fault_rng)
    payload = _jpeg(plan, image, fault_rng)
    facts: dict[str, Any] = {
        "key": plan.key,
        "status": "success",
        "width": side,
        "height": side,
        "caption": caption,
        "scene": scene.as_json(),
        "fault": plan.fault,
        "fault_detail": detail,
        "group": f"caption-{plan.language}",
    }
    rows.append(
        {
            "shard": plan.shard,
            "ordinal": plan.ordinal,
            "key": plan.key,
            "part": PARTS[plan.part],
            "fault": plan.fault,
            "origin": plan.origin,
            "group": facts["group"],
            "caption": caption,
            "true_caption": true_caption,
        }
        | looks_of(scene)
    )
    yield f"{plan.key}.jpg", payload
    if caption is None:
        del facts["caption"]
    else:
        yield f"{plan.key}.txt", caption.encode()
    yield f"{plan.key}.json", json.dumps(facts, ensure_ascii=False).encode()


def _caption(plan: _Plan, scene: Scene, truth: str, rng: np.random.Generator) -> tuple[str | None, dict[str, Any]]:
    """The caption that the sample carries, and what its json says about the fault."""
    if plan.fault == "mismatched-caption":
        return describe(_another(scene, rng), rng, language=plan.language), {"true_caption": truth}
    if plan.fault == "boilerplate-caption":
        return boilerplate(rng), {"true_caption": truth}
    if plan.fault == "missing-caption":
        return None, {"true_caption": truth}
    return truth, {"source_key": plan.origin_key} if plan.fault == "near-duplicate" else {}


def _another(scene: Scene, rng: np.random.Generator) -> Scene:
    other = imagine(rng)
    while not scene.tells_apart(other):
        other = imagine(rng)
    return other


def _jpeg(plan: _Plan, image: Image.Image, rng: np.random.Generator) -> bytes:
    """Encode the picture, damaged as planned."""
    if plan.fault == "blurred-image":
        image = image.filter(ImageFilter.GaussianBlur(image.width * rng.uniform(0.06, 0.09)))
    data = _encode(image, QUALITY)
    if plan.fault == "near-duplicate":  # as copies come about: decoded, a little changed, encoded again
        copy = ImageEnhance.Brightness(Image.open(io.BytesIO(data))).enhance(rng.uniform(0.985, 1.015))
        return _encode(copy, int(rng.integers(88, 96)))
    return data[: len(data) // 2] if plan.fault == "truncated-image" else data


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
