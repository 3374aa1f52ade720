"""`verify`, `explain` and `replay` over what a training chose."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import curate
from curate.loaders.replay import replay
from tests.conftest import MINI
from tests.e2e.training_runs import TrainingRun, explained, failed, finish, make_training


def test_verify_proves_it_and_the_readers_load_it(teed: Path) -> None:
    """Every check passes, webdataset's and open_clip's loaders included."""
    assert failed(teed, load=True) == []
    assert len(curate.verify(teed).checks) == 9


def flip(path: Path, needle: bytes) -> None:
    content = path.read_bytes()
    at = content.index(needle)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def swap_captions(path: Path) -> None:
    """Exchange the captions of the first two samples: lengths, and with them all headers, stay as they are."""
    import tarfile

    with tarfile.open(path) as archive:
        texts = [info for info in archive if info.name.endswith(".txt")]
    content = bytearray(path.read_bytes())
    one = next(info for info in texts[1:] if info.size == texts[0].size)
    first, second = (slice(info.offset_data, info.offset_data + info.size) for info in (texts[0], one))
    content[first], content[second] = content[second], content[first]
    path.write_bytes(bytes(content))


def exchange_rows(path: Path) -> None:
    """Let the sidecar give the ranks of two samples to each other."""
    rows = pq.read_table(path).to_pylist()
    rows[0]["rank"], rows[1]["rank"] = rows[1]["rank"], rows[0]["rank"]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda out: flip(out / "00001.tar", b"JFIF"), ["digests", "pairs"]),
        (lambda out: swap_captions(out / "00000.tar"), ["digests", "pairs"]),
        (lambda out: exchange_rows(out / "00000.parquet"), ["digests", "sub-batches"]),
        (lambda out: (out / "00002.tar").unlink(), ["digests", "pairs"]),
    ],
)
def test_verify_finds_damage(teed: Path, tmp_path: Path, damage: Callable[[Path], Any], found: list[str]) -> None:
    """A flipped byte, swapped captions, exchanged ranks and a lost shard each fail in the checks that look at them."""
    output = Path(shutil.copytree(teed, tmp_path / "out"))
    damage(output)
    assert failed(output) == found


def test_verify_finds_a_copy_too_many(teed: Path, tmp_path: Path) -> None:
    """A ledger that counts another number of choices than was written contradicts the shards."""
    output = Path(shutil.copytree(teed, tmp_path / "out"))
    path = output / "_curate" / "ledger" / "00001.parquet"
    rows = pq.read_table(path).to_pylist()
    kept = next(row for row in rows if row["times_selected"] > 1)
    kept["times_selected"] -= 1
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)
    assert failed(output) == ["digests", "pairs"]


def test_verify_compares_with_the_log_of_the_training(pool: Path, tmp_path: Path) -> None:
    """A log that says something else by now is found; one that is gone is no failure."""
    made = make_training(tmp_path / "run", pool, [5, 5])
    made.write_log(2)
    finish(made, tmp_path / "out")
    made.steps[1].reverse()
    for rank, row in enumerate(made.steps[1]):
        row["rank"] = rank
    made.write_log(2)
    assert failed(tmp_path / "out") == ["sub-batches"]
    shutil.rmtree(made.run)
    assert failed(tmp_path / "out") == []


def test_explain_names_the_steps(training: TrainingRun, teed: Path) -> None:
    """A sample is explained by its original key and by the key of any copy: when it was chosen, and where that is."""
    times = Counter(key for step in training.keys for key in step)
    key = max(times, key=lambda key: times[key])
    steps = [number + 1 for number, step in enumerate(training.keys) if key in step]
    found = explained(teed, key)
    assert f"The training chose it {len(steps)} times" in found.sentences[-1]
    assert all(f"step {step} at rank" in found.sentences[-1] for step in steps)
    copies = [
        row["key"] for path in sorted(teed.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
        if row["original_key"] == key
    ]  # fmt: skip
    assert len(copies) == len(steps) > 2
    assert all(key in [found.row["key"] for found in curate.explain(teed, copy)] for copy in copies)


def test_explain_says_that_none_chose_it(training: TrainingRun, teed: Path) -> None:
    """A sample of no step says so, in a row and in the summary."""
    chosen = {key for step in training.keys for key in step}
    key = next(f"{n:09d}" for n in range(60) if f"{n:09d}" not in chosen)
    assert "was dropped: never-chosen" in explained(teed, key).sentences[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_replay_gives_what_the_trainer_saw(training: TrainingRun, teed: Path, pool: Path, workers: int) -> None:
    """Pixels and tokens of every step are bit for bit those of the trainer's own reading of the input shards."""
    from curate.learner.dataset import open_pairs
    from curate.models.build import build_untrained
    from curate.models.configs import PREPROCESS, with_loss
    from curate.models.preprocess import Preprocess
    from curate.shards.sources import expand_shards

    model: Any = build_untrained(with_loss(MINI, "sigmoid"), seed=0, preprocess=PREPROCESS)
    rule = Preprocess.from_config(model.visual.preprocess_cfg)
    batches = list(replay(teed, model, code_points, workers=workers))
    with open_pairs(expand_shards([pool]), code_points, rule) as opened:
        rows = {key: row for row, key in enumerate(opened.pairs.places.key_N)}
        for batch, keys in zip(batches, training.keys, strict=True):
            image_BCHW, token_BT = opened.pairs.batch([rows[key] for key in keys])
            assert torch.equal(batch.images, image_BCHW)
            assert torch.equal(batch.captions, token_BT)


def test_a_plain_loader_replays_it(training: TrainingRun, teed: Path) -> None:
    """torch's DataLoader over SubBatches yields the steps in order with any number of workers."""
    loader: Any = DataLoader(curate.SubBatches(teed, decode=False), batch_size=None, num_workers=2, collate_fn=as_is)
    assert [list(batch.captions) for batch in loader] == [
        [f"a picture with number {int(key)}" for key in keys] for keys in training.keys
    ]


def as_is(batch: Any) -> Any:
    return batch


def code_points(texts: Any) -> torch.Tensor:
    """A tokenizer of 32 bytes a caption."""
    return torch.tensor([list(text.encode()[:32].ljust(32, b"\0")) for text in texts])
