"""A tiny but faithful output directory, made with the same format functions as a run, for the tests of what reads it.

Each image is one flat colour and its caption names that colour, so a pair that was mixed up shows at once.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.formats import dali, datacomp, img2dataset, openclip, wids
from curate.shards.samples import group_samples
from curate.shards.tarindex import index_tar
from curate.shards.tarwriter import tar_end, tar_member
from tests.e2e.pools import make_pool
from tests.e2e.training_runs import SIZES, TrainingRun, finish, make_training

LEVELS = (0, 51, 102, 153, 204, 255)
COLOURS = list(itertools.product(LEVELS, repeat=3))[1:]


@dataclass(frozen=True, slots=True)
class Sample:
    """An input sample: its colour, bytes and names."""

    key: str
    caption: str
    image: bytes
    extension: str
    uid: str


@dataclass(frozen=True, slots=True)
class Selected:
    """Where an input sample came from and where the run put it."""

    sample: Sample
    shard: Path
    ordinal: int
    sample_id: bytes
    sub_batch: int
    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Output:
    """A finished run: `out`, its input shards, and what it selected, in selection order."""

    out: Path
    inputs: list[Path]
    selected: list[Selected]
    shards: list[str]

    @property
    def captions(self) -> list[str]:
        return [row.sample.caption for row in self.selected]

    @property
    def pattern(self) -> str:
        return str(self.out / openclip.shard_pattern(self.shards))


MakeOutput = Callable[..., Output]


@pytest.fixture(scope="session")
def make_output() -> MakeOutput:
    """`make_output(folder, ...)`: write input shards and a finished run over them."""
    return _make_output


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """One run that tests share, read-only: 48 of 80 samples in 8 sub-batches of 6, in 4 shards of 12."""
    return _make_output(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def names_its_colour() -> Callable[[Any, str], bool]:
    """Whether an image [H, W, 3] shows the colour that its caption names."""
    return lambda image, caption: _caption(_nearest(np.asarray(image))) == caption


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"), samples=20)


@pytest.fixture(scope="module")
def training(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """Twelve steps over 60 samples, 96 choices; the log in two segments."""
    made = make_training(tmp_path_factory.mktemp("training") / "run", pool, SIZES)
    made.write_log(5, 7)
    return made


@pytest.fixture(scope="module")
def teed(training: TrainingRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished tee of it in one call."""
    output = tmp_path_factory.mktemp("teed") / "out"
    finish(training, output)
    return output


def _make_output(
    folder: Path, *, samples: int = 80, kept: int = 48, sub_batch: int = 6, per_shard: int = 12, extension: str = "jpg"
) -> Output:
    inputs = [_write_input(folder / "in" / f"{shard:05d}.tar", shard, samples // 2, extension) for shard in (0, 1)]
    candidates = [row for path in inputs for row in _candidates(path, extension)]
    order = np.random.default_rng(0).permutation(samples)[:kept].tolist()
    selected = [
        Selected(*candidates[row], sub_batch=at // sub_batch, rank=at % sub_batch, score=round(10 - at / 10, 3))
        for at, row in enumerate(order)
    ]
    out = folder / "out"
    (out / "_curate" / "ledger").mkdir(parents=True)
    parts = [selected[start : start + per_shard] for start in range(0, kept, per_shard)]
    sizes = [_write_shard(out, shard, part) for shard, part in enumerate(parts)]
    _write_ledger(out, candidates, selected, per_shard)
    _write_side_files(out, sizes, selected)
    (out / "_curate" / "SUCCESS.json").write_text("{}")
    return Output(out, inputs, selected, [name for name, _ in sizes])


def _caption(colour: Sequence[int]) -> str:
    return "a plain sheet of colour " + " ".join(map(str, colour))


def _nearest(rgb_HWC: np.ndarray[Any, Any]) -> tuple[int, ...]:
    mean = rgb_HWC.reshape(-1, 3).mean(axis=0)
    return tuple(min(LEVELS, key=lambda level: abs(level - value)) for value in mean)


def _sample(number: int, extension: str) -> Sample:
    colour = COLOURS[number * 37 % len(COLOURS)]
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    Image.new("RGB", (40, 32), colour).save(buffer, kind, **({} if kind == "PNG" else {"quality": 95}))
    return Sample(f"{number:09d}", _caption(colour), buffer.getvalue(), extension, f"{number * 7919:032x}")


def _members(sample: Sample, key: str) -> Iterator[tuple[str, bytes]]:
    yield f"{key}.{sample.extension}", sample.image
    yield f"{key}.json", json.dumps({"caption": sample.caption, "uid": sample.uid}).encode()
    yield f"{key}.txt", sample.caption.encode()


def _tar(members: Iterator[tuple[str, bytes]]) -> bytes:
    body = b"".join(bytes(part) for name, payload in members for part in tar_member(name, payload))
    return body + tar_end(len(body))


def _write_input(path: Path, shard: int, count: int, extension: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = (_sample(shard * count + at, extension) for at in range(count))
    path.write_bytes(_tar(pair for sample in samples for pair in _members(sample, sample.key)))
    return path


def _candidates(path: Path, extension: str) -> Iterator[tuple[Sample, Path, int, bytes]]:
    content = path.read_bytes()
    for entry in group_samples(index_tar(memoryview(content)), hashlib.sha256(content).hexdigest()):
        yield _sample(int(entry.key), extension), path, entry.ordinal, entry.sample_id


def _write_shard(out: Path, shard: int, rows: Sequence[Selected]) -> tuple[str, int]:
    stem = img2dataset.shard_stem(shard)
    keys = [img2dataset.output_key(shard, index) for index in range(len(rows))]
    content = _tar(pair for key, row in zip(keys, rows, strict=True) for pair in _members(row.sample, key))
    (out / f"{stem}.tar").write_bytes(content)
    (out / f"{stem}.idx").write_text(dali.dali_index(index_tar(memoryview(content)).members))
    (out / f"{stem}_stats.json").write_text(json.dumps(img2dataset.stats(len(rows)), indent=4))
    table = pa.Table.from_pylist(list(map(_sidecar_row, keys, rows)), schema=img2dataset.SIDECAR_SCHEMA)
    pq.write_table(table, out / f"{stem}.parquet")
    return f"{stem}.tar", len(rows)


def _sidecar_row(key: str, row: Selected) -> dict[str, Any]:
    return {
        "key": key, "caption": row.sample.caption, "status": "success",
        "width": 40, "height": 32, "original_width": 40, "original_height": 32,
        "sha256": hashlib.sha256(row.sample.image).hexdigest(),
        "original_key": row.sample.key, "original_shard": str(row.shard), "sample_id": row.sample_id,
        "uid": row.sample.uid, "sub_batch": row.sub_batch, "rank": row.rank, "score": row.score,
        "reference_similarity": 0.3, "learner_similarity": 0.2,
    }  # fmt: skip


def _write_ledger(out: Path, candidates: Sequence[Any], selected: Sequence[Selected], per_shard: int) -> None:
    placed = {row.sample_id: (at, row) for at, row in enumerate(selected)}
    for shard, path in enumerate(sorted({path for _, path, _, _ in candidates})):
        rows = [_ledger_row(each, placed, per_shard) for each in candidates if each[1] == path]
        pq.write_table(pa.Table.from_pylist(rows), out / "_curate" / "ledger" / f"{shard:05d}.parquet")


def _ledger_row(candidate: Any, placed: dict[bytes, tuple[int, Selected]], per_shard: int) -> dict[str, Any]:
    sample, path, ordinal, sample_id = candidate
    at, row = placed.get(sample_id, (-1, None))
    shard, index = divmod(at, per_shard)
    return {
        "sample_id": sample_id, "shard": str(path), "ordinal": ordinal, "key": sample.key, "uid": sample.uid,
        "status": "kept" if row else "dropped", "reason": "selected" if row else "not-selected", "detail": "",
        "score": row.score if row else None, "sub_batch": row.sub_batch if row else None,
        "rank": row.rank if row else None, "times_selected": int(row is not None),
        "out_shard": f"{shard:05d}.tar" if row else None,
        "out_key": img2dataset.output_key(shard, index) if row else None,
    }  # fmt: skip


def _write_side_files(out: Path, sizes: Sequence[tuple[str, int]], selected: Sequence[Selected]) -> None:
    (out / "sizes.json").write_text(json.dumps(openclip.sizes(sizes)))
    uid_n = datacomp.uid_array(row.sample.uid for row in selected)
    (out / "sample_ids.npy").write_bytes(datacomp.to_npy(uid_n))
    shards = [(name, (out / name).read_bytes(), samples) for name, samples in sizes]
    listed = [wids.WidsShard(name, hashlib.md5(data).hexdigest(), count, len(data)) for name, data, count in shards]
    (out / "shardindex.json").write_text(json.dumps(wids.wids_index(listed, name="selected")))
