"""What a training chose, teed into shards: complete, in order, resumable, and proved by `verify`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate
from curate.errors import RunMismatch, ShardError, UsageError, VerificationError
from curate.ledger import read_ledger
from curate.pipelines.engine import open_engine
from curate.pipelines.teeing import pin_tee, tee
from curate.storage import file_digest
from tests.e2e.pools import make_bad_pool, published
from tests.e2e.training_runs import INLINE, SIZES, TrainingRun, explained, failed, finish, make_training
from tests.fault.crash_disk import LOSSES, CrashDisk, PowerCut, installed


def sub_batches(output: Path, **options: Any) -> list[list[str]]:
    """The original keys of each sub-batch that `curate.SubBatches` yields: the pools' captions number their samples."""
    batches = list(curate.SubBatches(output, decode=False, **options))
    assert [batch.sub_batch for batch in batches] == list(range(len(batches)))
    return [[f"{int(text.rpartition(' ')[2]):09d}" for text in batch.captions] for batch in batches]


def proved(output: Path) -> dict[str, Any]:
    """All files of an output that have to be the same whoever wrote them, and however often it was stopped."""
    manifest = (output / "_curate" / "manifest.json").read_bytes()
    return {**published(output), "manifest": manifest, "success": (output / "_curate" / "SUCCESS.json").read_bytes()}


def test_the_sub_batches_are_those_of_the_log(training: TrainingRun, teed: Path) -> None:
    """SubBatches yields every step's samples in their order, with the logits they were drawn with."""
    assert sub_batches(teed) == training.keys
    scores = [score for batch in curate.SubBatches(teed, decode=False) for score in batch.scores.tolist()]
    assert scores == [row["score"] for step in training.steps for row in step]


def test_shards_hold_whole_sub_batches(teed: Path) -> None:
    """A sub-batch goes into one shard unless it is larger than a shard; shards are filled in order of the steps."""
    tables = [pq.read_table(path, columns=["sub_batch"]) for path in sorted(teed.glob("*.parquet"))]
    found = [Counter(table["sub_batch"].to_pylist()) for table in tables]
    assert [dict(one) for one in found] == [
        {0: 7, 1: 7}, {2: 7, 3: 12}, {4: 3, 5: 7, 6: 7}, {7: 20}, {7: 5, 8: 7, 9: 1, 10: 7}, {11: 6},
    ]  # fmt: skip


def test_the_ledger_counts_how_often_each_sample_was_chosen(training: TrainingRun, teed: Path) -> None:
    """Every input sample has a status; the chosen ones how often, and where their first copy is."""
    times = Counter(row["sample_id"] for step in training.steps for row in step)
    ledger = read_ledger(teed).to_pylist()
    assert {row["sample_id"]: row["times_selected"] for row in ledger if row["times_selected"]} == times
    assert max(times.values()) > 1
    assert Counter(row["reason"] for row in ledger) == {"selected": len(times), "never-chosen": 60 - len(times)}
    written = {row["key"]: row for path in teed.glob("*.parquet") for row in pq.read_table(path).to_pylist()}
    for row in (row for row in ledger if row["status"] == "kept"):
        first = written[row["out_key"]]
        assert (first["sample_id"], first["sub_batch"], first["rank"], first["score"]) == (
            row["sample_id"], row["sub_batch"], row["rank"], row["score"],
        )  # fmt: skip
        assert first["sub_batch"] == min(w["sub_batch"] for w in written.values() if w["sample_id"] == row["sample_id"])


def test_webdataset_reads_every_copy(training: TrainingRun, teed: Path) -> None:
    """webdataset yields as many samples as were chosen, each with its own caption and a key of its own."""
    import webdataset

    urls = [str(path) for path in sorted(teed.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    keys = [f"{int(sample['txt'].decode().rpartition(' ')[2]):09d}" for sample in samples]
    assert keys == [key for step in training.keys for key in step]
    assert len({sample["__key__"] for sample in samples}) == len(samples) == sum(SIZES)


def test_bytes_are_copied_as_they_were(training: TrainingRun, teed: Path, pool: Path) -> None:
    """The images of a replayed step are those of the input shards, byte for byte."""
    import tarfile

    originals: dict[str, bytes] = {}
    for path in pool.glob("*.tar"):
        with tarfile.open(path) as archive:
            for info in archive:
                member = archive.extractfile(info)
                assert member is not None
                originals[info.name] = member.read()
    for batch, keys in zip(curate.SubBatches(teed, decode=False), training.keys, strict=True):
        assert batch.images == [originals[f"{key}.jpg"] for key in keys]


def test_calls_while_the_training_goes_on_end_in_the_same_bytes(
    training: TrainingRun, teed: Path, tmp_path: Path
) -> None:
    """A call after each segment writes the complete shards only; the last one gives what one call gives."""
    copy, output = TrainingRun(tmp_path / "run", training.steps), tmp_path / "out"
    shutil.copytree(training.run, copy.run)
    seen = []
    for lengths in ([1], [1, 2], [1, 2, 5], [1, 2, 5, 4]):
        copy.write_log(*lengths)
        result = tee(copy.run, output, INLINE, samples_per_shard=20)
        seen.append((len(result.shards), result.steps, result.samples))
        assert sub_batches(output, allow_unfinished=True)[: result.steps] == training.keys[: result.steps]
        assert not (output / "_curate" / "SUCCESS.json").exists()
    assert seen == [(0, 0, 0), (1, 2, 14), (4, 7, 70), (5, 11, 90)]
    result = finish(copy, output)
    assert (result.steps, result.samples, result.finished) == (12, 96, True)
    assert proved(output) == proved(teed)
    assert failed(output) == []


def test_calling_again_changes_nothing(training: TrainingRun, teed: Path, tmp_path: Path) -> None:
    """A finished tee answers from its receipts, whether the call is the last one or not."""
    output = tmp_path / "out"
    finish(training, output)
    before = proved(output)
    stats = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert tee(training.run, output, INLINE, samples_per_shard=20).samples == 90
    assert finish(training, output).samples == 96
    assert proved(output) == before == proved(teed)
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.tar")} == stats


def test_a_training_that_goes_on_extends_a_finished_tee(training: TrainingRun, teed: Path, tmp_path: Path) -> None:
    """More steps after the last call replace the last shard; a log taken back and grown otherwise leaves no trace."""
    copy, output = TrainingRun(tmp_path / "run", training.steps), tmp_path / "out"
    shutil.copytree(training.run, copy.run)
    copy.write_log(6)
    finish(copy, output)
    copy.write_log(6, 6)
    finish(copy, output)
    assert proved(output) == proved(teed)
    copy.write_log(4)
    finish(copy, output)
    assert sub_batches(output) == training.keys[:4]
    assert failed(output) == []
    assert sorted(path.name for path in output.glob("*.tar")) == ["00000.tar", "00001.tar"]


def test_the_segments_of_the_log_do_not_matter(training: TrainingRun, teed: Path, tmp_path: Path) -> None:
    """A log cut elsewhere, as after an interrupt, gives the same units: nothing is written anew."""
    output = Path(shutil.copytree(teed, tmp_path / "out"))
    training.write_log(1, 1, 10)
    try:
        before = proved(output)
        finish(training, output)
        assert proved(output) == before
    finally:
        training.write_log(5, 7)


@pytest.mark.slow
@pytest.mark.parametrize("grown", [False, True])
def test_a_call_that_loses_power_is_repeated(training: TrainingRun, teed: Path, tmp_path: Path, *, grown: bool) -> None:
    """Power lost before one operation in 67: SUCCESS is true or absent, and the next call ends in the same bytes.

    Once from nothing, once from a finished tee of half as many steps, whose shards are replaced under their names.
    """
    (tmp_path / "root").mkdir()
    start, stop = tmp_path / "root", 0
    if grown:
        training.write_log(6)
        finish(training, start / "out")
        training.write_log(5, 7)
    while True:
        root = Path(shutil.copytree(start, tmp_path / f"{stop}"))
        disk = CrashDisk(root, stop)
        try:
            with installed(disk):
                finish(training, root / "out")
            break
        except PowerCut:
            after = disk.surviving(tmp_path / f"{stop}-after", **LOSSES[stop // 67 % len(LOSSES)])
        check_success(after / "out")
        finish(training, after / "out")
        assert proved(after / "out") == proved(teed)
        stop += 67
    assert stop > 200
    assert proved(root / "out") == proved(teed)


def check_success(output: Path) -> None:
    """If SUCCESS is there, so is every byte that the manifest lists."""
    if (output / "_curate" / "SUCCESS.json").exists():
        manifest = json.loads((output / "_curate" / "manifest.json").read_bytes())
        assert all(file_digest(output / name) == sha256 for name, sha256 in manifest["digests"].items())


def test_two_drivers_end_in_the_same_bytes(training: TrainingRun, teed: Path, tmp_path: Path) -> None:
    """Drivers that run at once, one of them not for the last time, disturb nothing."""
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(finish, training, tmp_path / "out") for _ in range(2)]
        calls.append(threads.submit(tee, training.run, tmp_path / "out", INLINE, samples_per_shard=20))
        for call in calls:
            call.result()
    assert proved(tmp_path / "out") == proved(teed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_the_engine_does_not_change_a_byte(training: TrainingRun, teed: Path, tmp_path: Path, mode: Any) -> None:
    """Dask with threads or processes publishes what the inline engine does."""
    with open_engine(workers=2, mode=mode) as engine:
        tee(training.run, tmp_path / "out", engine, samples_per_shard=20, final=True)
    assert proved(tmp_path / "out") == proved(teed)


def test_a_changed_input_shard_is_refused(pool: Path, tmp_path: Path) -> None:
    """A shard whose bytes are not those that were trained on is a ShardError, before and after it was first read."""
    copy = Path(shutil.copytree(pool, tmp_path / "pool"))
    made = make_training(tmp_path / "run", copy, [10] * 6)
    made.write_log(4)
    tee(made.run, tmp_path / "out", INLINE, samples_per_shard=20)
    for shard in copy.glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"a picture with number", b"a picture WITH number"))
    with pytest.raises(ShardError, match=r"00000\.tar changed since the training began: sha256"):
        tee(made.run, tmp_path / "new", INLINE, samples_per_shard=20)
    made.write_log(4, 2)
    with pytest.raises(ShardError, match="the shard changed during the run"):
        finish(made, tmp_path / "out")
    assert not (tmp_path / "out" / "_curate" / "SUCCESS.json").exists()


def test_a_bad_pool_is_accounted_for(tmp_path: Path) -> None:
    """Samples that cannot be read are quarantined with their reasons, and a cut shard is flagged."""
    pool = make_bad_pool(tmp_path / "pool")
    made = make_training(tmp_path / "run", pool, [8] * 5)
    made.write_log(5)
    result = finish(made, tmp_path / "out")
    assert result.reasons is not None
    assert result.counts is not None
    assert {"image-undecodable", "caption-missing", "key-duplicate", "tar-truncated"} <= set(result.reasons)
    assert result.counts["in"] == sum(result.reasons.values())
    assert failed(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (lambda rows: rows[1:], "does not hold steps 1 to 6"),
        (lambda rows: [*rows[:3], {**rows[3], "rank": 9}, *rows[4:]], "does not hold steps 1 to 6"),
        (lambda rows: [{**rows[0], "row": rows[0]["row"] ^ 1}, *rows[1:]], "is another one"),
        (lambda rows: [{**rows[0], "row": 99}, *rows[1:]], "row 99 was drawn, but it has 20 rows"),
        (lambda rows: [{**rows[0], "shard": 7}, *rows[1:]], "names input shard 7, TRAIN.json has 3"),
    ],
)
def test_a_log_that_contradicts_the_shards_is_refused(
    pool: Path, tmp_path: Path, damage: Callable[[list[Any]], list[Any]], check: str
) -> None:
    """A damaged log is a VerificationError that says where, and nothing is finished."""
    made = make_training(tmp_path / "run", pool, [10] * 6)
    made.write_log(6)
    (segment,) = (made.run / "_curate" / "chosen").iterdir()
    table = pq.read_table(segment)
    pq.write_table(pa.Table.from_pylist(damage(table.to_pylist()), schema=table.schema), segment)
    with pytest.raises(VerificationError, match=check):
        finish(made, tmp_path / "out")
    assert not (tmp_path / "out" / "_curate" / "SUCCESS.json").exists()


def test_a_gap_in_the_log_is_refused(pool: Path, tmp_path: Path) -> None:
    """A segment that is gone is named by the step that should come next."""
    made = make_training(tmp_path / "run", pool, [10] * 6)
    made.write_log(2, 2, 2)
    (made.run / "_curate" / "chosen" / "00000003-00000004.parquet").unlink()
    with pytest.raises(VerificationError, match="should go on with step 3"):
        finish(made, tmp_path / "out")


def test_another_training_is_refused(training: TrainingRun, teed: Path, pool: Path, tmp_path: Path) -> None:
    """A directory that another training's tee, or another size, is in is refused by name; overwrite takes it."""
    output = Path(shutil.copytree(teed, tmp_path / "out"))
    with pytest.raises(RunMismatch, match=r"samples_per_shard: 20 there, 30 now"):
        tee(training.run, output, INLINE, samples_per_shard=30)
    other = make_training(tmp_path / "run", pool, [4, 4], seed=3)
    with pytest.raises(RunMismatch, match=r"settings\.train\.seed: 0 there, 3 now"):
        pin_tee(other.run, output, samples_per_shard=20)
    other.write_log(2)
    pin_tee(other.run, output, samples_per_shard=20, overwrite=True)
    finish(other, output)
    assert sub_batches(output) == other.keys
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds no run"):
        pin_tee(other.run, tmp_path / "foreign", overwrite=True)


def test_verbs_that_draw_from_scores_refuse_a_tee(teed: Path, tmp_path: Path) -> None:
    """`select` and `write` say that a tee has no scores to draw from."""
    with pytest.raises(UsageError, match="holds the sub-batches that a training chose"):
        curate.select(teed, to=tmp_path / "out")
    with pytest.raises(UsageError, match="holds the sub-batches that a training chose"):
        curate.write(teed)


def test_scores_of_the_reference_are_used(
    training: TrainingRun, pool: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stored scores no shard is read for its index, and ledger and sidecars carry the reference's similarity."""
    curate.score(pool, tmp_path / "scores", reference=str(tiny_checkpoint), engine="inline", scores_only=True)
    monkeypatch.setattr("curate.pipelines.originals._describe", lambda *_: pytest.fail("read again"))
    finish(training, tmp_path / "out", scores=tmp_path / "scores")
    assert sub_batches(tmp_path / "out") == training.keys
    assert pq.read_table(tmp_path / "out" / "00000.parquet")["reference_similarity"].null_count == 0
    assert "Scores: reference similarity" in " ".join(curate.explain(tmp_path / "out", "000000000")[0].sentences)
    assert failed(tmp_path / "out") == []


def test_uniform_draws_have_no_logit(pool: Path, tmp_path: Path) -> None:
    """Rows without a score go through: empty in ledger and sidecar, NaN for a reader."""
    made = make_training(tmp_path / "run", pool, [5, 5])
    for step in made.steps:
        for row in step:
            row["score"] = None
    made.write_log(2)
    finish(made, tmp_path / "out")
    assert all(bool(batch.scores.isnan().all()) for batch in curate.SubBatches(tmp_path / "out", decode=False))
    assert failed(tmp_path / "out") == []
    assert "with a logit" not in explained(tmp_path / "out", made.keys[0][0]).sentences[-1]


def test_shards_are_sized_by_what_will_be_drawn(pool: Path, tmp_path: Path) -> None:
    """Without a size, shards hold an eighth of the pairs that the training will draw, in whole sub-batches."""
    made = make_training(tmp_path / "run", pool, [30] * 31)
    made.write_log(31)
    result = tee(made.run, tmp_path / "out", INLINE, samples=930, final=True)
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {
        f"{number:05d}.tar": 120 if number < 7 else 90 for number in range(8)
    }
    assert "--model ViT-B-32 --siglip" in str(result.train_command)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("ViT-B-32:laion2b_s34b_b79k", "ViT-B-32"),
        ("curate-tiny", "local-dir:{run}"),
        ("/models/mine", "local-dir:{run}"),
        ("hf-hub:org/name", "local-dir:{run}"),
    ],
)
def test_the_command_names_a_model_that_open_clip_knows(pool: Path, tmp_path: Path, model: str, named: str) -> None:
    """An architecture of open_clip's is trained anew, any other model is the one that was trained here."""
    made = make_training(tmp_path / "run", pool, [5], settings={"model": model, "loss": "softmax"})
    made.write_log(1)
    command = str(finish(made, tmp_path / "out").train_command)
    assert f"--model {named.format(run=made.run)}" in command
    assert "--siglip" not in command


def test_nothing_chosen_is_an_empty_success(pool: Path, tmp_path: Path) -> None:
    """A log without a step gives no shard, and a ledger in which no sample was ever chosen."""
    made = make_training(tmp_path / "run", pool, [])
    result = finish(made, tmp_path / "out")
    assert (result.shards, result.reasons) == ((), {"never-chosen": 60})
    assert failed(tmp_path / "out") == []
