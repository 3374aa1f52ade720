"""Plain training: it learns, repeats itself, counts what it skips and leaves nothing behind when it fails."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from curate.errors import CurateError, UsageError
from curate.learner import fitting
from curate.learner.augment import shift_and_zoom
from curate.learner.candidates import all_of
from curate.learner.checkpoint import save_checkpoint
from curate.learner.dataset import CachedPairs, StreamedPairs, open_pairs
from curate.learner.engine import Progress
from curate.learner.fitting import fit
from curate.learner.journal import read_log
from curate.learner.settings import TrainSettings
from curate.learner.start import prepare
from curate.learner.vocabulary import AsItIs
from curate.models import configs
from curate.models.load import load_model
from curate.pipelines.training import train
from curate.shards.sources import expand_shards
from tests.conftest import MINI
from tests.making import encode, make_tar

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 60),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "pink": (250, 130, 190),
    "brown": (120, 70, 40),
}
QUICK: dict[str, Any] = {"model": "mini", "batch": 8, "steps": 6, "lr": 3e-3, "device": "cpu", "precision": "fp32"}


@pytest.fixture(autouse=True)
def mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration small enough for steps of a few milliseconds."""
    monkeypatch.setitem(configs.CONFIGS, "mini", MINI)


def samples(count: int, *, start: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    """Plain squares with the name of their colour; each colour in turn."""
    dice = np.random.default_rng(start)
    made = []
    for n in range(count):
        name, colour = list(COLOURS.items())[n % len(COLOURS)]
        image = Image.new("RGB", (40, 40), tuple(int(c + dice.integers(-9, 10)) % 256 for c in colour))
        made.append((f"{start + n:09d}", {"jpg": encode(image, "jpeg"), "txt": f"a {name} square".encode()}))
    return made


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return make_tar(tmp_path / "00000.tar", samples(32))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_it_learns(loss: str, shard: Path, tmp_path: Path) -> None:
    """Eighty steps on eight colours put most images nearest to their own caption, in the saved checkpoint."""
    result = train([shard], tmp_path / "model", loss=loss, **{**QUICK, "steps": 80, "lr": 4e-3, "batch": 16})
    model = load_model(str(result.path))
    assert (result.steps, result.samples, result.skipped, model.loss) == (80, 32, {}, loss)
    with open_pairs(expand_shards([shard]), model.tokenize, model.rule) as opened:
        image, text = opened.pairs.batch(range(8))
    nearest = (model.embed_images(image) @ model.embed_texts(text).T).argmax(dim=1)
    assert (nearest == torch.arange(8)).sum() >= 6, nearest


def test_same_seed_same_weights(shard: Path, tmp_path: Path) -> None:
    """One seed gives one checkpoint, bit by bit; another seed another."""
    paths = [
        train([shard], tmp_path / name, seed=seed, augment=True, **QUICK).path
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    weights = [(path / "open_clip_model.safetensors").read_bytes() for path in paths]
    assert weights[0] == weights[1] != weights[2]


def test_streaming_equals_caching(shard: Path, tmp_path: Path) -> None:
    """A corpus that does not fit in memory is decoded again and gives the same weights."""
    cached, streamed = (
        train([shard], tmp_path / str(gb), memory_gb=gb, **QUICK).path / "open_clip_model.safetensors"
        for gb in (1.0, 1e-6)
    )
    assert cached.read_bytes() == streamed.read_bytes()


@pytest.mark.parametrize(("memory_gb", "kind"), [(1.0, CachedPairs), (1e-6, StreamedPairs)])
def test_bad_samples_are_counted(memory_gb: float, kind: type, tmp_path: Path) -> None:
    """Each bad sample is skipped under its reason, cached or streamed, and the rest is trained on."""
    good = samples(20)
    bad = [
        ("100000000", {"jpg": b"not an image", "txt": b"caption"}),
        ("100000001", {"jpg": good[0][1]["jpg"]}),
        ("100000002", {"txt": b"alone"}),
        ("100000003", {"jpg": good[1][1]["jpg"], "txt": b" \n"}),
    ]
    path = make_tar(tmp_path / "00000.tar", [*good[:10], *bad, *good[10:]])
    result = train([path], tmp_path / "model", memory_gb=memory_gb, **QUICK)
    assert result.skipped == {"caption-empty": 1, "caption-missing": 1, "image-format": 1, "image-missing": 1}
    start = prepare(TrainSettings(**QUICK))
    with open_pairs(expand_shards([path]), start.tokenizer, start.rule, memory_gb=memory_gb) as opened:
        assert type(opened.pairs) is kind


def test_unused_vocabulary_is_untouched(shard: Path) -> None:
    """Training the occurring vocabulary rows only is training them all: the others keep their start."""
    settings = TrainSettings(**QUICK)
    start = prepare(settings)
    before = copy.deepcopy(start.module.token_embedding.weight.detach())
    with open_pairs(expand_shards([shard]), start.tokenizer, start.rule) as opened:
        fit(start, all_of(opened.pairs), settings)
        used = torch.unique(opened.pairs.token_NT)
    after = start.module.token_embedding.weight
    changed = (after != before).any(dim=1).nonzero().flatten()
    assert set(changed.tolist()) <= set(used.tolist())
    assert len(changed) > 5
    assert after.shape == before.shape


def test_small_vocabulary_is_the_same_arithmetic(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the reduced vocabulary the losses agree."""
    settings = TrainSettings(**{**QUICK, "weight_decay": 0.1})
    losses = []
    for whole in (False, True):
        start = prepare(settings)
        if whole:
            monkeypatch.setattr(fitting, "occurring", _whole)
        with open_pairs(expand_shards([shard]), start.tokenizer, start.rule) as opened:
            losses.append(fit(start, all_of(opened.pairs), settings).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class _whole:  # noqa: N801 - stands in for a context manager function
    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> Any:
        return AsItIs()

    def __exit__(self, *_: Any) -> None: ...


def test_infinite_loss_stops(shard: Path, tmp_path: Path) -> None:
    """A loss that is not finite ends the run with the step, its samples and the last good state; no checkpoint."""
    wrong = r"not finite at step \d+; the step's samples: '\d{9}' of input shard 0.*lower lr.*good state is .*step-0"
    with pytest.raises(CurateError, match=wrong):
        train([shard], tmp_path / "model", checkpoint_every=1, **{**QUICK, "lr": 1e30, "steps": 20})
    assert not (tmp_path / "model" / "open_clip_config.json").exists()


@pytest.mark.filterwarnings("ignore:.*held-out pairs are trained on")
def test_progress_and_history(shard: Path, tmp_path: Path) -> None:
    """Every step is reported; the history holds settings, inputs, losses and the evaluation."""
    seen: list[Progress] = []
    result = train([shard], tmp_path / "model", progress=seen.append, eval_shards=(str(shard),), **QUICK)
    record = json.loads((result.path / "training.json").read_text())
    assert [s.step for s in seen] == [1, 2, 3, 4, 5, 6]
    assert all(s.steps == 6 and s.samples_per_second > 0 for s in seen)
    assert record["losses"] == pytest.approx([s.loss for s in seen], abs=1e-4)
    assert record["settings"]["model"] == "mini"
    assert record["inputs"][0]["size"] == shard.stat().st_size
    last = [line for line in read_log(result.path / "log.jsonl") if line["kind"] == "eval"][-1]
    assert 0 <= last["retrieval"]["image_to_text"] <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bacth": 8}, "bacth unknown"),
        ({"batch": 1}, "no negative pair"),
        ({"criterion": "learnability"}, "needs a reference model"),
        ({"criterion": "hardest"}, "hardest.*uniform, learnability"),
        ({"loss": "hinge"}, "hinge"),
        ({"steps": 0}, "steps 0"),
        ({"filter_ratio": 1.0}, "filter ratio 1.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, shard: Path, tmp_path: Path) -> None:
    """A setting that cannot be met is refused before anything is read, with the choices there are."""
    with pytest.raises(UsageError, match=message):
        train([shard], tmp_path / "model", **{**QUICK, **settings})


def test_output_in_use_is_refused_before_the_work(shard: Path, tiny_checkpoint: Path) -> None:
    """A checkpoint that is there is not overwritten unasked, and the refusal comes first."""
    with pytest.raises(UsageError, match="not empty"):
        train([shard], tiny_checkpoint, progress=lambda _: pytest.fail("training had begun"), **QUICK)


def test_no_readable_pair(tmp_path: Path) -> None:
    """Shards without one good pair say what was wrong with them."""
    path = make_tar(tmp_path / "00000.tar", [("1", {"jpg": b"x", "txt": b"a"})])
    with pytest.raises(UsageError, match="1 x image-format"):
        train([path], tmp_path / "model", **QUICK)


def test_augmentation_moves_but_keeps_colours() -> None:
    """Shifted images keep their shape and range; the same dice give the same images."""
    image = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    image[:, :, 8:24, 8:24] = 200
    one, other = (shift_and_zoom(image, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)
    assert one.dtype == torch.uint8
    assert not torch.equal(one, image)
    assert int(one.max()) == 200


def test_saved_model_equals_the_trained_one(shard: Path, tmp_path: Path) -> None:
    """The checkpoint embeds as the module that was trained."""
    settings = TrainSettings(**QUICK)
    start = prepare(settings)
    with open_pairs(expand_shards([shard]), start.tokenizer, start.rule) as opened:
        fit(start, all_of(opened.pairs), settings)
        image, _ = opened.pairs.batch(range(4))
    path = save_checkpoint(start.module, tmp_path / "m", architecture=start.architecture, training={})
    with torch.inference_mode():
        expected = start.module.encode_image((image.float() / 255 - 0.5) / 0.5, normalize=True)
    torch.testing.assert_close(load_model(str(path), precision="fp32").embed_images(image), expected, atol=1e-5, rtol=0)
