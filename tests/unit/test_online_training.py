"""Online selection: what is drawn, what is kept, and that a run taken up again ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from curate import chosen
from curate.errors import CacheMismatch, CurateError, RunMismatch, StorageError, UsageError
from curate.learner.engine import Progress
from curate.learner.journal import read_log
from curate.learner.settings import TrainSettings
from curate.learner.state import states
from curate.loaders.subbatches import SubBatches
from curate.models import configs
from curate.models.load import load_model
from curate.pipelines.runner import score
from curate.pipelines.training import train
from curate.scores import read_table
from curate.selection.joint import Pairs, draw_joint
from tests.conftest import MINI, make_checkpoint
from tests.making import make_tar
from tests.unit.test_training import samples

FEW: dict[str, Any] = {
    "model": "mini", "criterion": "learnability", "batch": 4, "filter_ratio": 0.5, "steps": 6, "lr": 3e-3,
    "device": "cpu", "precision": "fp32", "handover": "off", "checkpoint_every": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations small enough for steps of a few milliseconds: a ResNet and a vision transformer."""
    patches = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    monkeypatch.setitem(configs.CONFIGS, "mini", MINI)
    monkeypatch.setitem(configs.CONFIGS, "mini-vit", {**MINI, "vision_cfg": patches})


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [make_tar(tmp_path / f"{n:05d}.tar", samples(20, start=20 * n)) for n in range(2)]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "reference", "sigmoid")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "open_clip_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def chosen_by(run: Path) -> pa.Table:
    """All rows of a run's log of chosen samples."""
    return pa.concat_tables([segment.table for segment in chosen.read_log(run)])


def after(step: int, action: Callable[[], None]) -> Callable[[Progress], None]:
    """A progress callback that acts once a step is done."""
    return lambda state: action() if state.step == step else None


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lag": 2},
        {"criterion": "easy-reference"},
        {"criterion": "uniform"},
        {"augment": True, "loss": "softmax", "criterion": "hard-learner"},
        {"estimator": "forward", "tangents": 2},
        {"estimator": "forward", "model": "mini-vit", "precision": "bf16"},
        {"estimator": "local-backprop", "model": "mini-vit"},
        {"estimator": "forward-activity", "model": "mini-vit"},
        {"estimator": "forward-activity", "model": "mini-vit", "ffn": "fff", "ffn_depth": 2},
        {"ffn": "fff", "ffn_depth": 2},
        {"model": "mini-vit"},
        {"model": "mini-vit", "scoring": "flexi"},
        {"handover": "0:learnability@10,2:trim@0.6,4:uniform"},
        {"handover": "auto", "watch_every": 1},
    ],
    ids=lambda more: "-".join(map(str, more.values())) or "plain",
)
@pytest.mark.filterwarnings("ignore::curate.errors.CurateWarning")
def test_a_resumed_run_ends_with_the_same_bits(
    more: dict[str, Any], shards: list[Path], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after an odd step, and again by nothing: weights, chosen samples and journal are those of one go."""
    monkeypatch.setattr("curate.learner.reuse.INTENSITY", 0.0)  # also where the scoring pass is kept
    settings = {**FEW, "reference": str(reference), **more}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(shards, whole, **settings)
    with pytest.raises(KeyboardInterrupt):
        train(shards, parted, progress=after(3, interrupt), **settings)
    assert not (parted / "open_clip_config.json").exists()
    train(shards, parted, **settings)
    assert same(whole, parted)
    assert chosen_by(whole).equals(chosen_by(parted))
    logs = [
        [(line["step"], line["loss"], line["flops"]) for line in read_log(run / "log.jsonl") if line["kind"] == "step"]
        for run in (whole, parted)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6


def test_a_signal_leaves_a_state(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """SIGINT lets the step end, keeps its state and says interrupted; the same call goes on from there."""
    run, settings = tmp_path / "run", {**FEW, "reference": str(reference), "checkpoint_every": 100}
    with pytest.raises(KeyboardInterrupt):
        train(shards, run, progress=after(3, lambda: os.kill(os.getpid(), signal.SIGINT)), **settings)
    assert [step for step, _ in states(run / "_curate/state")][-1] in (3, 4)
    assert "Training report" in (run / "report.html").read_text()  # of what there is so far
    train(shards, run, **settings)
    train(shards, tmp_path / "whole", **settings)
    assert same(run, tmp_path / "whole")


def test_the_draw_is_the_joint_sampler_s(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """The first sub-batch is what draw_joint gives for the untrained learner and the reference's stored scores."""
    settings = {**FEW, "reference": str(reference), "steps": 1}
    result = train(shards, tmp_path / "run", **settings)
    first = chosen_by(result.path)
    assert len(first) == 4
    untrained = load_untrained()
    stored = score(shards, tmp_path / "scores", reference=str(reference), precision="fp32", scores_only=True)
    tables = [read_table(path) for path in sorted((stored.output / "_curate/score").glob("*.parquet"))]
    rows = {row["sample_id"]: row for table in tables for row in table.to_pylist()}
    candidates = candidates_of(shards)
    ids = np.stack([np.frombuffer(sample_id, np.uint8) for sample_id, _, _ in candidates])
    image, text = (
        torch.from_numpy(np.stack([np.frombuffer(rows[i][f"ref_{side}"], "<f2") for i, _, _ in candidates])).float()
        for side in ("image", "text")
    )
    known = load_model(str(reference), precision="fp32")
    theirs = Pairs(image, text, known.scale, known.bias)
    ours = Pairs(
        untrained.embed_images(torch.stack([image for _, image, _ in candidates])),
        untrained.embed_texts(torch.stack([token for _, _, token in candidates])),
        untrained.scale,
        untrained.bias,
    )
    draw = draw_joint(theirs, ours, ids, size=4, chunks=16, criterion="learnability", loss="sigmoid", gain=100.0)
    assert first["sample_id"].to_pylist() == [ids[at].tobytes() for at in draw.index_b]
    assert first["score"].to_numpy() == pytest.approx(draw.logit_b, abs=2e-2)


def load_untrained() -> Any:
    from curate.learner.start import prepare
    from curate.models.load import encoder_of

    start = prepare(TrainSettings(model="mini"))
    return encoder_of(start.module, "mini", start.tokenizer, architecture=start.architecture)


def candidates_of(shards: list[Path]) -> list[tuple[bytes, torch.Tensor, torch.Tensor]]:
    """The first super-batch of seed 0: sample id, uint8 image, token ids."""
    from curate.learner.dataset import open_pairs
    from curate.learner.order import Order
    from curate.learner.start import prepare
    from curate.shards.sources import expand_shards

    start = prepare(TrainSettings(model="mini"))
    with open_pairs(expand_shards(shards), start.tokenizer, start.rule) as opened:
        rows, images, tokens = opened.pairs.read(Order(40, 0).take(0, 8)[0])
        ids = opened.pairs.places.id_N16[rows]
    return [(i.tobytes(), image, token) for i, image, token in zip(ids, images, tokens, strict=True)]


def test_replaying_the_shards_gives_the_same_training(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """The teed sub-batches are those of the log, in order, and a uniform run over them would see the same pairs."""
    settings = {**FEW, "reference": str(reference)}
    result = train(shards, tmp_path / "run", write_shards=tmp_path / "teed", **settings)
    log = chosen_by(result.path).to_pylist()
    batches = list(SubBatches(tmp_path / "teed", decode=False))
    assert [len(batch) for batch in batches] == [4] * 6
    captions = [caption for batch in batches for caption in batch.captions]
    names = ("red", "green", "blue", "yellow", "black", "white", "pink", "brown")
    assert captions == [f"a {names[row['row'] % 20 % 8]} square" for row in log]
    assert [score for batch in batches for score in batch.scores.tolist()] == [row["score"] for row in log]


def test_reusing_the_scoring_pass_changes_the_bill_and_not_the_training(
    shards: list[Path], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vision transformer trains on kept products: the same losses to rounding, for an eighth of the FLOPs less."""
    settings = {**FEW, "model": "mini-vit", "reference": str(reference), "filter_ratio": 0.8}
    again = train(shards, tmp_path / "again", **settings)
    monkeypatch.setattr("curate.learner.reuse.INTENSITY", 0.0)  # so small a transformer would not be worth it
    kept = train(shards, tmp_path / "kept", **settings)
    lines = [[line for line in read_log(run.path / "log.jsonl") if line["kind"] == "step"] for run in (kept, again)]
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-4)
    assert kept.factor < again.factor - 0.2


@pytest.mark.filterwarnings("ignore:.*held-out pairs are trained on")
def test_a_handover_is_logged_with_its_reason(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """An untrained reference knows nothing: the first look hands over to uniform draws, and says why."""
    told: list[str] = []
    settings = {**FEW, "reference": str(reference), "handover": "auto", "watch_every": 2, "trusted": shards}
    result = train(shards, tmp_path / "run", progress=lambda state: told.append(state.note), **settings)
    lines = list(read_log(result.path / "log.jsonl"))
    assert [(line["step"], line["from"], line["to"]) for line in lines if line["kind"] == "handover"] == [
        (2, "selecting", "uniform")
    ]
    assert "no more than chance would" in next(line["why"] for line in lines if line["kind"] == "handover")
    assert [line["phase"] for line in lines if line["kind"] == "step"] == ["selecting"] * 2 + ["uniform"] * 4
    assert told[-1] == "" or "uniform" in told[-1]
    scored = [line["samples"] for line in [lines[-1]["ledger"]["scoring"]]]
    assert scored == [16]


def test_costs_are_kept_apart(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """Reference, scoring and training have their own figures; a cache leaves the reference's at nothing."""
    settings = {**FEW, "reference": str(reference)}
    result = train(shards, tmp_path / "run", **settings)
    ledger = list(read_log(result.path / "log.jsonl"))[-1]["ledger"]
    assert (ledger["reference"]["samples"], ledger["scoring"]["samples"], ledger["training"]["samples"]) == (40, 48, 24)
    assert all(ledger[phase]["flops"] > 0 for phase in ("reference", "scoring", "training"))
    again = train(shards, tmp_path / "again", reference_cache=result.path / "_curate/reference", **settings)
    ledger = list(read_log(again.path / "log.jsonl"))[-1]["ledger"]
    assert ledger["reference"]["flops"] == 0
    assert same(result.path, again.path)


@pytest.mark.filterwarnings("ignore:.*held-out pairs are trained on")
def test_the_report_and_the_events_stand_beside_the_checkpoint(
    shards: list[Path], reference: Path, tmp_path: Path
) -> None:
    """A finished run holds report and events; against a baseline the report says who won."""
    plain = train(shards, tmp_path / "iid", eval_shards=shards, eval_every=2, **{**FEW, "criterion": "uniform"})
    settings = {**FEW, "reference": str(reference), "eval_shards": shards, "eval_every": 2}
    result = train(shards, tmp_path / "run", baselines=[plain.path], **settings)
    assert result.report is not None
    page = result.report.read_text()
    assert "<script" not in page
    assert "reached" in page
    assert list((result.path / "tensorboard").iterdir())


def test_the_same_command_on_a_finished_run_does_nothing(shards: list[Path], tmp_path: Path) -> None:
    """A finished run is left as it is; with other settings it is refused, naming them."""
    settings = {**FEW, "criterion": "uniform"}
    result = train(shards, tmp_path / "run", **settings)
    before = (result.path / "open_clip_model.safetensors").read_bytes()
    again = train(shards, tmp_path / "run", progress=lambda _: pytest.fail("it trains again"), **settings)
    assert (again.steps, again.loss) == (result.steps, pytest.approx(result.loss))
    assert (result.path / "open_clip_model.safetensors").read_bytes() == before
    with pytest.raises(RunMismatch, match=r"settings\.lr"):
        train(shards, tmp_path / "run", **{**settings, "lr": 1e-4})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss": "softmax"}, "was trained with the sigmoid loss"),
        ({"batch": 30}, "40 candidates are fewer than a super-batch of 60"),
        ({"criterion": "random"}, "criterion 'random' is unknown; choose uniform, learnability"),
        ({"estimator": "magic"}, "estimator 'magic' is none of"),
        ({"scoring": "flexi", "criterion": "uniform"}, "do not go together"),
        ({"lag": 2, "criterion": "easy-reference", "handover": "off"}, "the learner is not asked"),
        ({"reference": None}, "needs a reference model"),
        ({"criterion": "alignment"}, "--trusted"),
    ],
)
def test_what_does_not_fit_is_refused(
    more: dict[str, Any], message: str, shards: list[Path], reference: Path, tmp_path: Path
) -> None:
    """Models, sizes and names that do not go together are refused before a step is made."""
    with pytest.raises(UsageError, match=message):
        train(shards, tmp_path / "run", **{**FEW, "reference": str(reference), **more})


def test_a_cache_of_another_reference_is_refused(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """Embeddings of another checkpoint are not used."""
    other = make_checkpoint(tmp_path / "other", "sigmoid", seed=5)
    score(shards, tmp_path / "cache", reference=str(other), precision="fp32", scores_only=True)
    with pytest.raises(CacheMismatch, match="not by this reference"):
        train(shards, tmp_path / "run", reference_cache=tmp_path / "cache", **{**FEW, "reference": str(reference)})


def test_a_full_disk_keeps_the_last_state(
    shards: list[Path], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a state cannot be written the run ends with the error; the one before it is whole, and is gone on from."""
    from curate.storage import LOCAL

    run, settings = tmp_path / "run", {**FEW, "reference": str(reference)}
    sync = type(LOCAL).sync

    def full(disk: Any, file: Any) -> None:
        if "step-00000004" in str(file.name):
            raise OSError(28, "No space left on device", file.name)
        sync(disk, file)

    with monkeypatch.context() as patch:
        patch.setattr(type(LOCAL), "sync", full)
        with pytest.raises((StorageError, CurateError), match="the disk is full"):
            train(shards, run, **settings)
    assert [step for step, _ in states(run / "_curate/state")] == [2]
    train(shards, run, **settings)
    train(shards, tmp_path / "whole", **settings)
    assert same(run, tmp_path / "whole")


def test_the_pinned_record_names_its_inputs(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """TRAIN.json has the settings, the shards with their digests, and the reference's identity."""
    result = train(shards, tmp_path / "run", **{**FEW, "reference": str(reference)})
    record = json.loads((result.path / "_curate/TRAIN.json").read_text())
    assert [Path(entry["url"]).name for entry in record["inputs"]] == ["00000.tar", "00001.tar"]
    assert all(len(entry["digest"]) >= 32 for entry in record["inputs"])
    assert record["settings"]["criterion"] == "learnability"
    assert "reference" in record["models"]


@pytest.mark.filterwarnings("ignore::curate.errors.CurateWarning")
def test_a_forward_gradient_can_be_shared(shards: list[Path], tmp_path: Path) -> None:
    """Two workers give the losses of one; what cannot be shared is refused.

    Equal to rounding at first; Adam then divides by slopes near zero, whose rounding grows (the team itself is held to
    1e-10 in test_data_parallel).
    """
    settings = {**FEW, "model": "mini-vit", "criterion": "uniform", "estimator": "forward"}
    alone = train(shards, tmp_path / "alone", **settings)
    shared = train(shards, tmp_path / "shared", estimator_workers=2, engine="inline", **settings)
    losses = [
        [line["loss"] for line in read_log(run.path / "log.jsonl") if line["kind"] == "step"] for run in (alone, shared)
    ]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)
    with pytest.raises(UsageError, match="is not shared among workers"):
        train(shards, tmp_path / "local", estimator_workers=2, **{**settings, "estimator": "forward-local"})


def test_fast_layers_survive_the_checkpoint(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """A learner with fast feedforward layers is loaded with them, embeds as it did, and is gone on from."""
    settings = {**FEW, "reference": str(reference), "ffn": "fff", "ffn_depth": 2}
    result = train(shards, tmp_path / "run", **settings)
    loaded = load_model(str(result.path), precision="fp32")
    assert any(type(part).__name__ == "FastFeedforward" for part in loaded.module.modules())
    assert all(torch.equal(value, weights(result.path)[name]) for name, value in loaded.module.state_dict().items())
    onward = train(shards, tmp_path / "onward", **{**settings, "ffn": "dense", "model": str(result.path)})
    assert (onward.path / "curate_feedforward.json").is_file()
    assert load_model(str(onward.path), precision="fp32").width == loaded.width


def test_overwriting_takes_the_run_and_nothing_else(shards: list[Path], tmp_path: Path) -> None:
    """What lies beside the run stays; what the new run needs is not removed, nor an old run for one that cannot be."""
    settings = {**FEW, "criterion": "uniform", "steps": 1}
    run = train(shards, tmp_path / "run", **settings).path
    (run / "notes.txt").write_text("mine")
    (run / "plots").mkdir()
    blank = [str(make_tar(tmp_path / "blank.tar", [("0", {"jpg": b"no image", "txt": b"a red square"})]))]
    for more, message in (
        ({"model": str(run)}, "--overwrite would remove"),
        ({"criterion": "learnability", "reference": str(run)}, "--overwrite would remove"),
        ({"criterion": "hard-learner", "batch": 30}, "fewer than a super-batch"),
        ({"baselines": [tmp_path / "none"]}, "is it the directory of a training run"),
        ({"grams_per_kwh": -1.0}, "an intensity is a finite number"),
        ({"write_shards": run}, "is the run's own directory"),
        ({"eval_shards": blank}, "no readable pair in 1 shards"),
        ({"zeroshot": blank}, "no class"),
        ({"criterion": "alignment", "trusted": blank}, "no readable pair in 1 shards"),
    ):
        with pytest.raises(UsageError, match=message):
            train(shards, run, overwrite=True, **{**settings, **more})
    assert (run / "open_clip_config.json").is_file()
    train(shards, run, overwrite=True, **{**settings, "seed": 1})
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "plots").is_dir()
    assert json.loads((run / "training.json").read_text())["settings"]["seed"] == 1


def test_two_processes_do_not_train_in_one_run(shards: list[Path], tmp_path: Path) -> None:
    """While a run is going on, another one in the same directory is refused, and harms nothing."""
    settings = {**FEW, "criterion": "uniform"}
    refused = []

    def again() -> None:
        for overwrite in (False, True):
            with pytest.raises(UsageError, match="another process trains in") as error:
                train(shards, tmp_path / "run", overwrite=overwrite, **settings)
            refused.append(error)

    train(shards, tmp_path / "run", progress=after(3, again), **settings)
    train(shards, tmp_path / "alone", **settings)
    assert len(refused) == 2
    assert same(tmp_path / "run", tmp_path / "alone")


def test_a_plan_makes_do_with_the_pool(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """Trimming for more noise than the pool has pairs for reads what there is; a run does not end for it."""
    settings = {**FEW, "reference": str(reference), "batch": 16, "handover": "2:trim@0.1"}
    result = train(shards, tmp_path / "run", **settings)
    steps = [line for line in read_log(result.path / "log.jsonl") if line["kind"] == "step"]
    assert [line["candidates"] for line in steps] == [32, 64, 104, 144, 184, 224]


def test_nothing_is_scored_for_after_the_end(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """With a lag as many super-batches are scored as steps are made."""
    result = train(shards, tmp_path / "run", **{**FEW, "reference": str(reference), "lag": 3})
    ledger = list(read_log(result.path / "log.jsonl"))[-1]["ledger"]
    assert ledger["scoring"]["samples"] == 48


@pytest.mark.filterwarnings("ignore:.*held-out pairs are trained on")
@pytest.mark.parametrize("model", ["mini", "mini-vit"])
def test_measuring_changes_no_weight(model: str, shards: list[Path], tmp_path: Path) -> None:
    """With an evaluation after each step, and an interrupt between two, the weights are those of a run without any."""
    settings = {**FEW, "criterion": "uniform", "model": model}
    train(shards, tmp_path / "without", **settings)
    measured = {**settings, "eval_shards": shards, "eval_every": 1}
    with pytest.raises(KeyboardInterrupt):
        train(shards, tmp_path / "with", progress=after(3, interrupt), **measured)
    train(shards, tmp_path / "with", **measured)
    assert same(tmp_path / "without", tmp_path / "with")


def test_energy_is_of_the_whole_run(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joules of before an interrupt are in the state: three stretches of two steps, one of them cut in two."""
    from contextlib import contextmanager
    from types import SimpleNamespace

    from curate.costs.energy import Energy, Joules

    @contextmanager
    def ten_joules() -> Any:
        yield SimpleNamespace(energy=Energy(processor=Joules(measured=10.0, measured_seconds=1.0)))

    monkeypatch.setattr("curate.learner.fitting.meter", ten_joules)
    settings = {**FEW, "criterion": "uniform"}
    with pytest.raises(KeyboardInterrupt):
        train(shards, tmp_path / "run", progress=after(3, interrupt), **settings)
    result = train(shards, tmp_path / "run", grams_per_kwh=360.0, **settings)
    ledger = list(read_log(result.path / "log.jsonl"))[-1]["ledger"]
    assert ledger["training"]["energy"]["processor"]["measured"] == 40.0
    assert result.report is not None
    assert "0.004 g at the stated 360 g/kWh" in result.report.read_text()


def test_shards_can_be_asked_for_afterwards(shards: list[Path], tmp_path: Path) -> None:
    """A finished run is not trained again, and its chosen batches are written all the same."""
    settings = {**FEW, "criterion": "uniform"}
    train(shards, tmp_path / "run", **settings)
    train(shards, tmp_path / "run", write_shards=tmp_path / "teed", **settings)
    assert [len(batch) for batch in SubBatches(tmp_path / "teed", decode=False)] == [4] * 6


def test_a_shard_that_is_there_twice_is_refused(shards: list[Path], reference: Path, tmp_path: Path) -> None:
    """Joint draws would meet the same pair twice; the message names the shard before a step is made."""
    copy = tmp_path / "copy.tar"
    copy.write_bytes(shards[0].read_bytes())
    with pytest.raises(UsageError, match=r"00000\.tar is there twice"):
        train([*shards, copy], tmp_path / "run", **{**FEW, "reference": str(reference)})
