"""Whole runs of `score` and its later passes on small pools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import curate
from curate.errors import CacheMismatch, LossAboveTolerance, RunMismatch, ShardError, UsageError
from curate.ledger import read_ledger
from tests.conftest import make_checkpoint
from tests.e2e.pools import check_run, make_bad_pool, make_pool, published


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "learner", "sigmoid", seed=5)


@pytest.fixture(scope="module")
def finished(pool: Path, tiny_checkpoint: Path, learner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished inline run with a learner."""
    output = tmp_path_factory.mktemp("runs") / "out"
    run(pool, output, tiny_checkpoint, learner=str(learner))
    return output


def run(pool: Path, output: Path, reference: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"engine": "inline", "super_batch": 50, "chunks": 4, "samples_per_shard": 10}
    return curate.score(pool, output, reference=str(reference), **settings | options)


def test_a_run_accounts_for_every_sample(finished: Path) -> None:
    """In = kept + dropped + quarantined, a fifth is kept, and what is written is what the ledger says."""
    manifest = check_run(finished)
    assert manifest["counts"] == {"in": 120, "kept": 24, "dropped": 96, "quarantined": 0}
    assert [shard["samples"] for shard in manifest["shards"]] == [10, 10, 4]
    assert json.loads((finished / "sizes.json").read_text()) == {"00000.tar": 10, "00001.tar": 10, "00002.tar": 4}
    assert len(np.load(finished / "sample_ids.npy")) == 24


def test_verify_accepts_the_run_and_both_readers_load_it(finished: Path) -> None:
    """Every check of `verify` passes, the readers' included."""
    verification = curate.verify(finished)
    assert [check.name for check in verification.checks if check.ok is not True] == []
    assert len(verification.checks) == 9


@pytest.mark.parametrize("options", [{"engine": "threads", "workers": 3}, {"engine": "processes", "workers": 2}])
@pytest.mark.slow
def test_the_engine_does_not_change_a_byte(
    finished: Path, pool: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Threads and processes of any number publish the same bytes as the inline engine."""
    run(pool, tmp_path / "out", tiny_checkpoint, learner=str(learner), **options)
    assert published(tmp_path / "out") == published(finished)


def test_the_order_of_the_shards_does_not_change_what_is_selected(
    finished: Path, pool: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """Naming the shards in another order selects the same samples at the same ranks."""
    shards = sorted(pool.glob("*.tar"), reverse=True)
    settings: dict[str, Any] = {"engine": "inline", "super_batch": 50, "chunks": 4, "samples_per_shard": 10}
    curate.score(shards, tmp_path / "out", reference=str(tiny_checkpoint), learner=str(learner), **settings)
    columns = ["sample_id", "status", "rank", "sub_batch", "out_key"]
    ours, theirs = (read_ledger(out, columns).sort_by("sample_id") for out in (tmp_path / "out", finished))
    assert ours.equals(theirs)


def test_a_second_call_resumes_without_scoring(
    finished: Path, pool: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run answers from its receipts: no model runs, no byte changes."""
    copy = shutil.copytree(finished, tmp_path / "out")
    before = published(copy)
    monkeypatch.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored again"))
    result = run(pool, copy, tiny_checkpoint, learner=str(learner))
    assert result.counts["kept"] == 24
    assert published(copy) == before


def test_another_setting_is_refused_by_name(finished: Path, pool: Path, tiny_checkpoint: Path, learner: Path) -> None:
    """An output that belongs to another run is refused, and the difference is named."""
    with pytest.raises(RunMismatch, match=r"settings\.select\.gain: 100\.0 there, 5\.0 now"):
        run(pool, finished, tiny_checkpoint, learner=str(learner), gain=5.0)


def test_overwrite_replaces_the_run_and_nothing_else(
    finished: Path, pool: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """--overwrite starts anew; a directory that holds something else is refused with it and without."""
    copy = shutil.copytree(finished, tmp_path / "out")
    assert run(pool, copy, tiny_checkpoint, keep=0.5, overwrite=True).counts["kept"] == 60
    check_run(copy)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds no run"):
        run(pool, foreign, tiny_checkpoint, overwrite=True)
    assert (foreign / "thesis.tex").read_text() == "precious"


def test_a_cached_reference_is_not_run_again(
    finished: Path, pool: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --reference-cache only the learner embeds, and the selection is that of a run without the cache."""
    from curate.models.embed import DualEncoder

    used: list[str] = []
    embed = DualEncoder.embed_images
    monkeypatch.setattr(DualEncoder, "embed_images", lambda self, x: used.append(self.identity.name) or embed(self, x))
    run(pool, tmp_path / "out", tiny_checkpoint, learner=str(learner), reference_cache=finished)
    assert set(used) == {str(learner)}
    assert published(tmp_path / "out") == published(finished)


def test_a_cache_of_another_checkpoint_is_refused(finished: Path, pool: Path, learner: Path, tmp_path: Path) -> None:
    """A cache that another model made is refused before anything is written, naming the difference."""
    with pytest.raises(CacheMismatch, match=r"checkpoint: sha256:\w+ here, sha256:\w+ in the cache"):
        run(pool, tmp_path / "out", learner, reference_cache=finished)
    assert not (tmp_path / "out").exists()


def test_select_and_write_repeat_the_passes_without_a_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`select` to another directory and `write` give a finished run; selecting back gives the first bytes again."""
    monkeypatch.setattr("curate.models.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    result = curate.select(finished, to=tmp_path / "half", keep=0.5, engine="inline")
    assert result.counts == {"in": 120, "kept": 60, "dropped": 60, "quarantined": 0}
    assert not list((tmp_path / "half").glob("*.tar"))
    written = curate.write(tmp_path / "half", engine="inline", samples_per_shard=30)
    assert written.shards == ("00000.tar", "00001.tar")
    check_run(tmp_path / "half")
    assert curate.verify(tmp_path / "half", load=False).ok
    curate.select(tmp_path / "half", keep=0.2, engine="inline")
    curate.write(tmp_path / "half", engine="inline", samples_per_shard=10)
    assert (
        published(tmp_path / "half").items()
        >= {
            name: digest for name, digest in published(finished).items() if name.endswith((".tar", ".npy", ".idx"))
        }.items()
    )


def test_select_in_place_takes_the_old_shards_back(finished: Path, tmp_path: Path) -> None:
    """After `select` in the same directory no shard of the earlier selection is left to be trained on by mistake."""
    copy = shutil.copytree(finished, tmp_path / "out")
    curate.select(copy, seed=1, engine="inline")
    assert not list(copy.glob("*.tar"))
    assert not (copy / "_curate" / "SUCCESS.json").exists()
    with pytest.raises(UsageError, match="has not finished"):
        curate.verify(copy)


def test_select_does_not_take_over_another_run(finished: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A directory that holds a run over other shards is refused as the target, and keeps its shards."""
    other = tmp_path / "other"
    run(make_pool(tmp_path / "pool", shards=1, seed=3), other, tiny_checkpoint)
    before = published(other)
    with pytest.raises(RunMismatch, match="other shards or models"):
        curate.select(finished, to=other, keep=0.5, engine="inline")
    with pytest.raises(RunMismatch, match="other shards or models"):
        curate.write(finished, to=other, engine="inline")
    assert published(other) == before


def test_select_on_partial_scores_keeps_what_is_there(finished: Path, tmp_path: Path) -> None:
    """Where a shard's scores are missing, `select` refuses before it takes back the shards of the earlier selection."""
    copy = shutil.copytree(finished, tmp_path / "out")
    next((copy / "_curate" / "commits").glob("score-*.json")).unlink()
    with pytest.raises(UsageError, match="1 of 3 shards are not scored yet"):
        curate.select(copy, keep=0.5, engine="inline")
    assert list(copy.glob("*.tar"))


def test_scores_only_then_select(pool: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """--scores-only stores scores; `select` and `write` make the dataset that `score` alone would have made."""
    result = run(pool, tmp_path / "out", tiny_checkpoint, scores_only=True)
    assert result.counts == {"in": 120, "candidates": 120, "quarantined": 0}
    curate.select(tmp_path / "out", super_batch=50, chunks=4, engine="inline")
    curate.write(tmp_path / "out", engine="inline")
    run(pool, tmp_path / "whole", tiny_checkpoint)
    tars = [{k: v for k, v in published(tmp_path / o).items() if k.endswith(".tar")} for o in ("out", "whole")]
    assert tars[0] == tars[1]


def test_bad_input_becomes_rows_with_reasons(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Cut tars, undecodable images, missing captions, repeated keys and copies are rows; the run ends with code 3."""
    pool = make_bad_pool(tmp_path / "pool")
    with pytest.raises(LossAboveTolerance, match=r"2 shards lost more than --tolerance 0\.05") as caught:
        run(pool, tmp_path / "out", tiny_checkpoint)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out" / "_curate" / "SUCCESS.json").exists()
    reasons = check_run(tmp_path / "out")["reasons"]
    for reason in ("image-undecodable", "caption-missing", "key-duplicate", "duplicate-exact", "tar-truncated"):
        assert (reason, reasons.get(reason)) == (reason, 1)
    accepted = run(pool, tmp_path / "out", tiny_checkpoint, tolerance=1)
    assert accepted.counts["quarantined"] == 4
    assert curate.verify(tmp_path / "out").ok
    with pytest.raises(LossAboveTolerance):
        run(pool, tmp_path / "out", tiny_checkpoint)
    assert not (tmp_path / "out" / "_curate" / "SUCCESS.json").exists()


def test_explain_says_why(finished: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """`explain` answers for kept, dropped and rejected samples, by original key, new key and uid."""
    kept = pq.read_table(finished / "00000.parquet").to_pylist()[0]
    for name in (kept["key"], kept["original_key"], kept["uid"]):
        sentences = " ".join(s for found in curate.explain(finished, name) for s in found.sentences)
        assert "was kept: selected" in sentences
    assert "drawn at rank 0" in " ".join(curate.explain(finished, kept["uid"])[0].sentences)
    dropped = next(row for row in read_ledger(finished).to_pylist() if row["status"] == "dropped")
    assert "was dropped: not-selected" in curate.explain(finished, dropped["uid"])[0].sentences[0]
    pool = make_bad_pool(tmp_path / "pool")
    with pytest.raises(LossAboveTolerance):
        run(pool, tmp_path / "out", tiny_checkpoint)
    assert "quarantined: caption-missing" in curate.explain(tmp_path / "out", "000000105")[0].sentences[0]
    with pytest.raises(UsageError, match="no sample with key"):
        curate.explain(finished, "nobody")


@pytest.mark.parametrize("name", ["00001.tar", "00001.parquet", "sizes.json", "_curate/ledger/00000.parquet"])
def test_verify_notices_a_changed_file(finished: Path, tmp_path: Path, name: str) -> None:
    """A byte changed in any published file fails the verification."""
    copy = shutil.copytree(finished, tmp_path / "out")
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not curate.verify(copy, load=False).ok


def test_verify_notices_swapped_captions(finished: Path, tmp_path: Path) -> None:
    """Two captions swapped inside a shard are found even where the manifest's digest was forged to match."""
    import hashlib

    copy = shutil.copytree(finished, tmp_path / "out")
    tar = copy / "00000.tar"
    rows = pq.read_table(copy / "00000.parquet").to_pylist()
    first, *others = (row["caption"].encode() for row in rows)
    second = next(caption for caption in others if len(caption) == len(first))
    hole = b"\0" * len(first)
    data = tar.read_bytes().replace(first, hole).replace(second, first).replace(hole, second, 2)
    tar.write_bytes(tar.read_bytes().replace(first, second, 1) if len(data) != tar.stat().st_size else data)
    manifest_path = copy / "_curate" / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["digests"]["00000.tar"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    manifest_path.write_text(json.dumps(manifest))
    failed = [check.name for check in curate.verify(copy, load=False).checks if check.ok is False]
    assert failed == ["pairs"]


def test_a_shard_that_changes_during_the_run_is_not_mixed(pool: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """If a shard's bytes change between scoring and writing, writing stops and names the shard."""
    mine = shutil.copytree(pool, tmp_path / "pool")
    run(mine, tmp_path / "out", tiny_checkpoint, scores_only=True)
    for shard in mine.glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"a picture with", b"a painting wit"))
    curate.select(tmp_path / "out", engine="inline")
    with pytest.raises(ShardError, match="not those that were scored"):
        curate.write(tmp_path / "out", engine="inline")


def test_plan_writes_nothing_and_counts_right(pool: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path) -> None:
    """The dry run counts samples, super-batches and the paper's cost factors, and leaves no file."""
    plan = curate.plan(pool, tmp_path / "out", reference=str(tiny_checkpoint), learner=str(learner), super_batch=50)
    assert (plan.samples, plan.super_batches, plan.super_batch, plan.sub_batch, plan.selected) == (120, 3, 40, 8, 24)
    # two models of one size, nothing cached, f = 0.8: 4.33 in selection.md, plus the small cost of the draw
    assert plan.factor == pytest.approx(4.33, abs=0.1)
    assert not (tmp_path / "out").exists()


def test_a_relative_model_path_is_pinned_as_absolute(
    pool: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers may run elsewhere, so what they are told does not depend on the directory the command was given in."""
    monkeypatch.chdir(tiny_checkpoint.parent)
    run(pool, tmp_path / "out", Path(tiny_checkpoint.name))
    pinned = json.loads((tmp_path / "out" / "_curate" / "RUN.json").read_text())["settings"]["score"]["reference"]
    assert pinned == str(tiny_checkpoint)


def test_learnability_without_a_learner_is_refused(pool: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Learnability needs a named learner; without one the message says what to do."""
    with pytest.raises(UsageError, match="needs a learner"):
        run(pool, tmp_path / "out", tiny_checkpoint, criterion="learnability")


def test_different_losses_must_be_settled(
    pool: Path, tiny_checkpoint: Path, tiny_softmax_checkpoint: Path, tmp_path: Path
) -> None:
    """A sigmoid reference and a softmax learner need an explicit --loss."""
    with pytest.raises(UsageError, match="different losses"):
        run(pool, tmp_path / "out", tiny_checkpoint, learner=str(tiny_softmax_checkpoint))


def test_an_explicit_sub_batch_is_met_exactly(pool: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """--sub-batch 7 draws exactly seven from every super-batch; more than there are is refused."""
    run(pool, tmp_path / "out", tiny_checkpoint, sub_batch=7)
    ledger = read_ledger(tmp_path / "out", ["sub_batch", "rank"]).drop_null().to_pylist()
    assert sorted(row["rank"] for row in ledger if row["sub_batch"] == 1) == list(range(7))
    assert len(ledger) == 21
    with pytest.raises(UsageError, match="more than the 40 candidates"):
        run(pool, tmp_path / "other", tiny_checkpoint, sub_batch=45)


def test_empty_shards_and_empty_selections_are_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """An empty shard is a receipt with zero rows, and an empty selection finishes with zero shards."""
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    result = curate.score(tmp_path / "empty.tar", tmp_path / "out", reference=str(tiny_checkpoint), engine="inline")
    assert result.counts == {"in": 0, "kept": 0, "dropped": 0, "quarantined": 0}
    assert result.train_command is None
    assert curate.verify(tmp_path / "out").ok


def test_executable_members_are_left_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Pickles, which webdataset's default decoder would run, are not copied into the new shards."""
    from tests.making import make_samples, make_tar

    samples = [(key, {**parts, "pkl": b"cos\nsystem\n(S'true'\ntR."}) for key, parts in make_samples(6)]
    make_tar(tmp_path / "in.tar", samples)
    curate.score(tmp_path / "in.tar", tmp_path / "out", reference=str(tiny_checkpoint), keep=0.5, engine="inline")
    assert b".pkl" not in (tmp_path / "out" / "00000.tar").read_bytes()


@pytest.mark.slow
def test_a_given_scheduler_publishes_the_same_bytes(
    finished: Path, pool: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """A scheduler and workers started elsewhere, reached by address, give the bytes of the inline engine."""
    from distributed import LocalCluster

    quiet = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **quiet) as cluster:
        run(
            pool,
            tmp_path / "out",
            tiny_checkpoint,
            learner=str(learner),
            engine=None,
            scheduler=cluster.scheduler_address,
        )
    assert published(tmp_path / "out") == published(finished)


def test_shards_by_url_are_scored_and_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Shards behind an fsspec URL are streamed, scored, and copied from there."""
    import fsspec

    files = fsspec.filesystem("memory")
    for shard in sorted(make_pool(tmp_path / "pool", shards=2, samples=10).glob("*.tar")):
        files.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    result = curate.score(
        "memory://bucket/{00000..00001}.tar", tmp_path / "out", reference=str(tiny_checkpoint), engine="inline"
    )
    assert result.counts == {"in": 20, "kept": 4, "dropped": 16, "quarantined": 0}
    assert curate.verify(tmp_path / "out").ok
