"""Whole runs with the criterion `alignment`: score along a trusted gradient, select, write, verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

import curate
from curate.errors import RunMismatch, ShardError, UsageError
from curate.ledger import read_ledger
from curate.models.load import load_model
from curate.pipelines.scoring import ScoreSpec
from curate.reading import ReadLimits, read_sample
from curate.settings import ScoreSettings
from curate.shards.samples import group_samples
from curate.shards.sources import expand_shards, open_shard, shard_digest
from curate.shards.tarindex import index_tar
from tests.conftest import make_checkpoint
from tests.e2e.pools import check_run, make_bad_pool, make_pool, published
from tests.making import data_root, make_samples, make_tar

SETTINGS: dict[str, Any] = {
    "engine": "inline", "criterion": "alignment", "trusted_size": 12, "super_batch": 50, "samples_per_shard": 10,
    "batch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bad_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("trusted"), shards=2, samples=15, seed=9)


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "learner", "softmax", seed=5)


@pytest.fixture(scope="module")
def finished(
    pool: Path, trusted: Path, tiny_checkpoint: Path, learner: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished inline run over shards of which two are damaged."""
    output = tmp_path_factory.mktemp("runs") / "out"
    run(pool, output, tiny_checkpoint, learner=str(learner), trusted=trusted)
    return output


def run(pool: Path, output: Path, reference: Path, **options: Any) -> Any:
    return curate.score(pool, output, reference=str(reference), tolerance=1.0, **SETTINGS | options)


def slow_scores(checkpoint: str, trusted: list[Path], size: int, shard: Path, rows: int) -> list[float | None]:
    """The column by a backward pass per candidate through open_clip's own forward, in groups of `rows` rows."""
    model = load_model(checkpoint, precision="fp32")
    clean = [sample for path in trusted for sample in samples_of(path, model.min_side)]
    clean = sorted((s for s in clean if s.reason is None), key=lambda s: s.entry.sample_id)[:size]
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    logit = logits(model, clean)
    label = torch.arange(len(clean))
    loss = (functional.cross_entropy(logit, label) + functional.cross_entropy(logit.T, label)) / 2
    direction = torch.autograd.grad(loss, parameters, allow_unused=True)
    samples = samples_of(shard, model.min_side)
    scores: list[float | None] = []
    for start in range(0, len(samples), rows):
        group = samples[start : start + rows]
        readable = [sample for sample in group if sample.reason is None]
        logit = logits(model, readable)
        own = iter((logit.logsumexp(0) + logit.logsumexp(1)) / 2 - logit.diagonal())
        for sample in group:
            if sample.reason is not None:
                scores.append(None)
                continue
            slope = torch.autograd.grad(next(own), parameters, retain_graph=True, allow_unused=True)
            both = [(g, v) for g, v in zip(slope, direction, strict=True) if g is not None and v is not None]
            scores.append(sum(float((g.double() * v.double()).sum()) for g, v in both))
    return scores


def logits(model: Any, samples: list[Any]) -> torch.Tensor:
    """Scaled similarities [n, n] with a graph."""
    image = torch.from_numpy(np.stack([model.preprocess(sample.rgb_HWC) for sample in samples])).float() / 255
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (model.rule.mean, model.rule.std))
    x = model.module.encode_image((image - mean) / std, normalize=True)
    y = model.module.encode_text(model.tokenize([sample.caption for sample in samples]), normalize=True)
    return torch.as_tensor(model.module.logit_scale.exp() * x @ y.T)


def samples_of(shard: Path, min_side: int) -> list[Any]:
    (source,) = expand_shards(shard)
    with open_shard(source) as data:
        entries = group_samples(index_tar(data), shard_digest(data))
        return [read_sample(data, entry, ReadLimits(min_side=min_side)) for entry in entries]


def stored(output: Path, shard: Path) -> list[float | None]:
    """The column of a shard's score table."""
    files = (output / "_curate" / "commits").glob("score-*.json")
    receipts = [json.loads(file.read_text()) for file in files]
    (path,) = (receipt["outputs"][0]["path"] for receipt in receipts if receipt["facts"]["shard"] == str(shard))
    column: list[float | None] = pq.read_table(output / "_curate" / path)["alignment"].to_pylist()
    return column


def agree(found: list[float | None], expected: list[float | None]) -> bool:
    """The same rows are scored, and the scores differ by at most 1e-4 of their size."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None and e is not None]
    if [f is None for f in found] != [e is None for e in expected]:
        return False
    found_M, expected_M = np.array(pairs).T
    return bool(np.abs(found_M - expected_M).max() <= 1e-4 * np.sqrt((expected_M**2).mean()))


def test_the_column_is_what_a_backward_pass_per_candidate_gives(
    tiny_checkpoint: Path, learner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On real pairs, read in three scoring batches of 8 rows one of which has a bad image, scores agree to 1e-4."""
    train, clean = (sorted((data_root() / "openstax" / part).glob("*.tar"))[0] for part in ("train", "val"))
    (source,) = expand_shards(train)
    with open_shard(source) as data:
        entries = group_samples(index_tar(data), "0" * 64)[:24]
        pairs = [
            (
                f"{entry.ordinal:04d}",
                {m.name.rsplit(".", 1)[1]: bytes(data[m.offset : m.offset + m.size]) for m in entry.members},
            )
            for entry in entries
        ]
    pairs[10][1].update({suffix: b"no image" for suffix in pairs[10][1] if suffix in ("jpg", "png", "webp")})
    shard = make_tar(tmp_path / "real.tar", pairs)
    monkeypatch.setattr("curate.pipelines.scoring.GROUP_ROWS", 8)
    run(shard, tmp_path / "out", tiny_checkpoint, learner=str(learner), trusted=clean, batch_size=4)
    found = stored(tmp_path / "out", shard)
    assert [row for row, score in enumerate(found) if score is None] == [10]
    assert agree(found, slow_scores(str(learner), [clean], 12, shard, rows=8))


def test_a_run_is_complete_and_explains_itself(finished: Path) -> None:
    """Accounting and `verify` hold, every candidate has a score, drawn ones a higher one, and `explain` shows it."""
    assert check_run(finished)["counts"]["quarantined"] > 0
    assert [check.name for check in curate.verify(finished).checks if check.ok is not True] == []
    ledger = read_ledger(finished).to_pylist()
    assert [row["key"] for row in ledger if (row["alignment"] is None) != (row["status"] == "quarantined")] == []
    kept, dropped = (
        [row["alignment"] for row in ledger if row["reason"] == reason] for reason in ("selected", "not-selected")
    )
    assert np.median(kept) > np.median(dropped)
    row = next(row for row in ledger if row["reason"] == "selected")
    sentences = " ".join(curate.explain(finished, row["key"])[0].sentences)
    assert f"alignment with the trusted gradient {row['alignment']:+.4g}" in sentences
    assert "(alignment, gain 2)" in sentences


@pytest.mark.parametrize("options", [{"engine": "threads", "workers": 3}, {"engine": "processes", "workers": 2}])
@pytest.mark.slow
def test_the_engine_does_not_change_a_byte(
    finished: Path, pool: Path, trusted: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path, options: Any
) -> None:
    """Units that score along one gradient at the same time in one process, or in several, publish the inline bytes."""
    run(pool, tmp_path / "out", tiny_checkpoint, learner=str(learner), trusted=trusted, **options)
    assert published(tmp_path / "out") == published(finished)


def test_neither_names_nor_order_of_the_trusted_shards_matter(
    finished: Path, pool: Path, trusted: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """The same trusted bytes under other names and in another order are the same run."""
    first, second = sorted(trusted.glob("*.tar"))
    renamed = [shutil.copy(second, tmp_path / "a.tar"), shutil.copy(first, tmp_path / "b.tar")]
    copy = shutil.copytree(finished, tmp_path / "out")
    run(pool, copy, tiny_checkpoint, learner=str(learner), trusted=renamed)
    assert published(copy) == published(finished)
    with pytest.raises(RunMismatch, match=r"settings\.score\.trusted: "):
        run(pool, copy, tiny_checkpoint, learner=str(learner), trusted=renamed[:1])


def test_a_second_call_makes_neither_gradient_nor_scores(
    finished: Path, pool: Path, trusted: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A finished run answers from its receipts, that of the gradient among them."""
    copy = shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr("curate.pipelines.aligning.trusted_gradient", lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr("curate.pipelines.scoring._read_batch", lambda *_, **__: pytest.fail("scored again"))
    run(pool, copy, tiny_checkpoint, learner=str(learner), trusted=trusted)
    assert published(copy) == published(finished)


def test_select_repeats_the_draw_without_a_model_and_changes_criterion_with_its_gain(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a joint criterion and back gives the first bytes again; each takes its usual gain on the way."""
    monkeypatch.setattr("curate.models.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    copy = shutil.copytree(finished, tmp_path / "out")

    def gain() -> float:
        return float(json.loads((copy / "_curate" / "RUN.json").read_text())["settings"]["select"]["gain"])

    curate.select(copy, criterion="easy-reference", engine="inline")
    assert gain() == 100.0
    curate.select(copy, criterion="alignment", engine="inline")
    assert gain() == 2.0
    curate.write(copy, tolerance=1.0, engine="inline")
    check_run(copy)
    assert published(copy) == published(finished)


def test_a_cached_reference_is_not_run_again(
    finished: Path, pool: Path, trusted: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With --reference-cache only the learner runs, and what is written is the same."""
    from curate.models.embed import DualEncoder

    used: list[str] = []
    embed = DualEncoder.embed_images
    monkeypatch.setattr(DualEncoder, "embed_images", lambda self, x: used.append(self.identity.name) or embed(self, x))
    run(pool, tmp_path / "out", tiny_checkpoint, learner=str(learner), trusted=trusted, reference_cache=finished)
    assert set(used) == {str(learner)}
    assert published(tmp_path / "out") == published(finished)


def test_a_learner_that_embeds_in_half_precision_is_aligned_in_full(
    finished: Path, pool: Path, trusted: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """With --precision bf16 the embeddings round and the alignment scores are those of the fp32 run."""
    run(pool, tmp_path / "out", tiny_checkpoint, learner=str(learner), trusted=trusted, precision="bf16")
    ours, theirs = (read_ledger(out, ["alignment", "learner_loss"]) for out in (tmp_path / "out", finished))
    assert ours["alignment"].equals(theirs["alignment"])
    assert not ours["learner_loss"].equals(theirs["learner_loss"])


def test_scores_of_runs_without_trusted_pairs_keep_their_identity(pool: Path, tmp_path: Path) -> None:
    """Without --trusted the settings of a unit are those of earlier versions, so that their outputs resume."""
    (source, *_) = expand_shards(pool)
    settings = ScoreSettings(reference="r", learner="l")
    unit = ScoreSpec(tmp_path, source, settings, {}, threads=1).unit
    assert set(unit.inputs["settings"]) == {"batch_size", "max_pixels", "max_caption_bytes"}


def test_scores_of_earlier_versions_are_selected_from(finished: Path, tmp_path: Path) -> None:
    """Score tables without the column give a selection by another criterion, a ledger and an explanation."""
    old = shutil.copytree(finished, tmp_path / "old")
    for file in (old / "_curate" / "commits").glob("score-*.json"):
        receipt = json.loads(file.read_text())
        (output,) = receipt["outputs"]
        table = pq.read_table(old / "_curate" / output["path"]).drop_columns("alignment")
        pq.write_table(table, old / "_curate" / output["path"], compression="none", use_dictionary=False)
        output["size"] = (old / "_curate" / output["path"]).stat().st_size
        file.write_text(json.dumps(receipt))
    curate.select(old, criterion="easy-reference", engine="inline")
    row = next(row for row in read_ledger(old).to_pylist() if row["reason"] == "selected")
    assert row["alignment"] is None
    assert "alignment" not in " ".join(curate.explain(old, row["key"])[0].sentences)


def test_what_cannot_be_met_is_refused_before_anything_is_written(
    pool: Path, trusted: Path, finished: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """Each missing or wrong argument is named, and no output directory appears."""
    bad = tmp_path / "bad.tar.gz"
    bad.write_bytes(b"\x1f\x8b not a tar")
    with_learner: dict[str, Any] = {"learner": str(learner)}
    refused: list[tuple[type[Exception], dict[str, Any], str]] = [
        (UsageError, with_learner, "a few clean shards: --trusted"),
        (UsageError, {"trusted": trusted}, "name its checkpoint with --learner"),
        (UsageError, with_learner | {"trusted": tmp_path / "nosuch.tar"}, "nosuch.tar"),
        (ShardError, with_learner | {"trusted": bad}, "bad.tar.gz"),
        (UsageError, with_learner | {"trusted": trusted, "trusted_size": 1}, "--trusted-size 1"),
        (UsageError, with_learner | {"trusted": trusted, "loss": "sigmoid"}, "leave --loss sigmoid out"),
    ]
    for kind, options, message in refused:
        with pytest.raises(kind, match=message):
            run(pool, tmp_path / "out", tiny_checkpoint, **options)
        assert not (tmp_path / "out").exists()
    unscored = shutil.copytree(finished, tmp_path / "unscored")
    record = json.loads((unscored / "_curate" / "RUN.json").read_text())
    record["settings"]["score"] |= {"trusted": None, "trusted_size": None}
    (unscored / "_curate" / "RUN.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="a few clean shards: --trusted"):
        curate.select(unscored, gain=1.0, engine="inline")


def test_trusted_shards_without_two_readable_pairs_are_refused_by_name(
    pool: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """One good pair beside broken images is no trusted set."""
    samples = make_samples(3)
    broken = [(key, {**parts, "jpg": b"no image"}) for key, parts in samples[1:]]
    shard = make_tar(tmp_path / "few.tar", [samples[0], *broken])
    with pytest.raises(UsageError, match=r"--trusted .*few\.tar: 1 readable pairs, at least two"):
        run(pool, tmp_path / "out", tiny_checkpoint, learner=str(learner), trusted=shard)


def test_the_plan_counts_the_passes_with_tangents(
    pool: Path, trusted: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """Three forward passes of the learner a candidate, four a trusted pair, and no comparison of pairs in the draw."""
    options = {name: value for name, value in SETTINGS.items() if name != "engine"} | {"trusted": trusted}
    plan = curate.plan(pool, tmp_path / "out", reference=str(tiny_checkpoint), learner=str(learner), **options)
    candidates = plan.samples - plan.quarantined
    forward = plan.flops["learner"] / candidates
    assert plan.flops["alignment"] == pytest.approx(forward * (3 * candidates + 4 * 12))
    assert plan.flops["selection"] == 0
