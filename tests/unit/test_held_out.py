"""Held-out pairs that are trained on: found by their bytes, said before the run starts, and told in its report."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from curate.errors import CurateWarning
from curate.images.decode import decode_rgb
from curate.learner import held_out
from curate.learner.dataset import open_pairs
from curate.learner.held_out import HeldOut, held_out_pairs
from curate.learner.journal import read_log
from curate.learner.settings import TrainSettings
from curate.learner.start import prepare
from curate.models import configs
from curate.pipelines.training import train
from curate.shards.sources import expand_shards
from tests.conftest import MINI
from tests.making import make_samples, make_tar

QUICK: dict[str, Any] = {"model": "mini", "batch": 8, "steps": 2, "device": "cpu", "precision": "fp32"}
Parts = list[tuple[str, dict[str, bytes]]]


@pytest.fixture(autouse=True)
def mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration small enough for steps of a few milliseconds."""
    monkeypatch.setitem(configs.CONFIGS, "mini", MINI)


@pytest.fixture
def pool(tmp_path: Path) -> list[Path]:
    """Two shards of 20 pairs."""
    return [make_tar(tmp_path / f"{n:05d}.tar", make_samples(20, seed=100 * n, start=20 * n)) for n in range(2)]


def partly(path: Path) -> Path:
    """12 pairs under other names: 4 of the pool, 3 of it with another caption, 5 that are new."""
    old, other, new = (
        make_samples(4, seed=100, start=20),
        make_samples(7, seed=0)[4:],
        make_samples(5, seed=900, start=90),
    )
    other = [(key, parts | {"txt": b"another caption"}) for key, parts in other]
    return make_tar(path, [(f"x{key}", parts) for key, parts in [*new, *old, *other]])


def found(pool: list[Path], **held: Any) -> tuple[HeldOut, ...]:
    settings = TrainSettings(**QUICK, **{name: tuple(map(str, paths)) for name, paths in held.items()})
    start = prepare(settings)
    with open_pairs(expand_shards(pool), start.tokenizer, start.rule) as opened:
        return held_out_pairs(settings, opened.contents)


def brute_force(pool: list[Path], path: Path) -> tuple[int, int, int]:
    """Every image and caption of both sides read and compared."""
    tokens, rule = prepare(TrainSettings(**QUICK)).tokenizer, prepare(TrainSettings(**QUICK)).rule
    sides = []
    for shards in (pool, [path]):
        with open_pairs(expand_shards(shards), tokens, rule) as opened:
            contents = opened.contents
            sides.append([(bytes(contents.image(row)), text) for row, text in enumerate(contents.caption_N)])
    trained = [any(image == theirs for theirs, _ in sides[0]) for image, _ in sides[1]]
    return len(sides[1]), sum(trained), sum(pair in sides[0] for pair in sides[1])


def test_held_out_pairs_are_told_by_content(pool: list[Path], tmp_path: Path) -> None:
    """Pairs in a shard of another name and other keys are found, with and without their caption."""
    path = partly(tmp_path / "held.tar")
    assert found(pool, eval_shards=[path]) == (HeldOut("--eval", 12, 7, 4),)
    assert brute_force(pool, path) == (12, 7, 4)


def test_a_shard_of_the_pool_is_wholly_trained_on(pool: list[Path], tmp_path: Path) -> None:
    """A copy of a shard, and the shard itself, count in full, each option by itself; what is new counts nothing."""
    copy = Path(shutil.copy(pool[1], tmp_path / "copy.tar"))
    new = make_tar(tmp_path / "new.tar", make_samples(6, seed=500))
    assert found(pool, trusted=[new], eval_shards=[copy, pool[0]], zeroshot=[pool[0]]) == (
        HeldOut("--trusted", 6, 0, 0), HeldOut("--eval", 40, 40, 40), HeldOut("--zeroshot", 20, 20, 20),
    )  # fmt: skip
    assert found(pool) == ()


def test_labelled_images_need_no_caption(pool: list[Path], tmp_path: Path) -> None:
    """Of a zero-shot shard images alone are compared; pairs to retrieve from have captions, or are not measured on."""
    labelled = [(key, {"jpg": parts["jpg"], "cls": b"1"}) for key, parts in make_samples(5, seed=0)]
    path = make_tar(tmp_path / "labelled.tar", [*labelled, ("bad", {"jpg": b"", "cls": b"1"}), ("none", {"cls": b"1"})])
    assert found(pool, zeroshot=[path]) == (HeldOut("--zeroshot", 5, 5, 0),)
    assert found(pool, eval_shards=[path]) == (HeldOut("--eval", 0, 0, 0),)


def test_images_that_training_skips_are_not_trained_on(tmp_path: Path) -> None:
    """A pair of the pool that cannot be decoded is not in it: the rows stay those of the pairs that are."""
    good, bad = make_samples(9, seed=0), make_samples(1, seed=700, start=50)[0]
    broken = (bad[0], bad[1] | {"jpg": bad[1]["jpg"][:300]})
    pool = make_tar(tmp_path / "pool.tar", [*good[:4], broken, *good[4:]])
    held = make_tar(tmp_path / "held.tar", [broken, *good[3:6]])
    assert found([pool], eval_shards=[held]) == (HeldOut("--eval", 4, 3, 3),)


def test_only_images_of_a_length_on_both_sides_are_hashed(
    pool: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is decoded again, and what differs in length already is not even hashed."""
    new = make_tar(tmp_path / "new.tar", [("a", {"jpg": b"\xff\xd8" + bytes(200_000), "txt": b"long"})])
    settings = TrainSettings(**QUICK, eval_shards=(str(new),))
    start = prepare(settings)
    with open_pairs(expand_shards(pool), start.tokenizer, start.rule) as opened:
        monkeypatch.setattr(held_out.hashlib, "sha256", lambda _: pytest.fail("hashed"))
        monkeypatch.setattr(decode_rgb.__module__ + ".decode_rgb", lambda *_, **__: pytest.fail("decoded"))
        assert held_out_pairs(settings, opened.contents) == (HeldOut("--eval", 1, 0, 0),)
    assert hashlib is held_out.hashlib


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (
            HeldOut("--eval", 12, 7, 4),
            "--eval: 7 of 12 held-out pairs are trained on, too: their images are in the pool, byte for byte, 4 with "
            "the same caption",
        ),
        (
            HeldOut("--zeroshot", 1200, 1, 0),
            "--zeroshot: 1 of 1,200 held-out pairs is trained on, too: its image is in the pool, byte for byte",
        ),
        (HeldOut("--trusted", 9, 0, 0), "--trusted: none of 9 held-out pairs has its image in the pool, byte for byte"),
    ],
)
def test_the_sentence(one: HeldOut, text: str) -> None:
    """Singular, plural and none."""
    assert one.text == text


@pytest.mark.parametrize("memory_gb", [1.0, 1e-6])
def test_it_is_said_before_the_run_and_in_its_report(pool: list[Path], tmp_path: Path, memory_gb: float) -> None:
    """A warning before the first step, whether images are kept in memory or not; a line in journal and report."""
    path = partly(tmp_path / "held.tar")
    told: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CurateWarning)
        result = train(
            pool, tmp_path / "run", **QUICK, eval_shards=(str(path),), memory_gb=memory_gb,
            progress=lambda _: told.append(len(caught)),
        )  # fmt: skip
    text = HeldOut("--eval", 12, 7, 4).text
    assert [str(one.message) for one in caught if "held-out" in str(one.message)] == [text]
    assert told[0] == 1
    start = next(line for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "start")
    assert start["held_out"] == [{"option": "--eval", "pairs": 12, "trained": 7, "captions": 4}]
    assert result.report is not None
    page = result.report.read_text()
    assert f"{text}; what is measured on these is memory as well." in page
    assert "Not held out" in page


def test_what_is_held_out_is_said_to_be(pool: list[Path], tmp_path: Path) -> None:
    """Without an overlap there is no warning, and the report says that it was looked for."""
    new = make_tar(tmp_path / "new.tar", make_samples(6, seed=500))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurateWarning)
        result = train(pool, tmp_path / "run", **QUICK, eval_shards=(str(new),))
    assert result.report is not None
    assert "none of 6 held-out pairs has its image in the pool, byte for byte." in result.report.read_text()
