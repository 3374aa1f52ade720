"""The demonstration's corpus: what is planted is what the truth says, and equal seeds give equal bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from curate.demonstration.corpus import BROKEN, Corpus, FaultRates, draw_corpus
from curate.demonstration.phrases import describe
from curate.demonstration.scenes import COLOURS, Scene, Shapes, draw, imagine
from curate.errors import UsageError
from curate.images.decode import ImageRejected, decode_rgb
from curate.images.signals import signals
from curate.shards.captions import read_caption, read_json
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import expand_shards, open_shard
from curate.shards.tarindex import index_tar


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return draw_corpus(tmp_path_factory.mktemp("demo"), samples=200, shards=2, seed=3, clean_reference=30)


def reason_of(data: memoryview, entry: SampleEntry) -> str | None:
    image = entry.image()
    if entry.reason is not None or image is None:
        return entry.reason
    try:
        decode_rgb(data[image.offset : image.offset + image.size])
    except ImageRejected as rejected:
        return rejected.reason
    return read_caption(data, entry)[1]


def read_back(corpus: Corpus) -> list[dict[str, object]]:
    """Every pool sample as our own readers see it, with its truth."""
    truth = {(r["shard"], r["ordinal"]): r for r in corpus.read_truth().to_pylist() if r["part"] == "pool"}
    rows = []
    for source in expand_shards([str(path) for path in corpus.pool]):
        with open_shard(source) as data:
            for entry in group_samples(index_tar(data), "00" * 32):
                seen = {"key": entry.key, "reason": reason_of(data, entry), "json": read_json(data, entry)}
                rows.append(
                    seen | {"caption": read_caption(data, entry)[0], "truth": truth[source.name, entry.ordinal]}
                )
    return rows


def test_truth_and_shards_agree(corpus: Corpus) -> None:
    """Key, caption, fault and group of every sample in the shards are those of the truth table."""
    rows = read_back(corpus)
    assert len(rows) == 200
    for row in rows:
        truth, facts = row["truth"], row["json"]
        assert (row["key"], row["caption"]) == (truth["key"], truth["caption"])
        assert (facts["fault"], facts["group"]) == (truth["fault"], truth["group"])


def test_faults_are_planted_in_exact_numbers(corpus: Corpus) -> None:
    """Each rate times the size of the pool is the number of samples with that fault."""
    expected = {"mismatched-caption": 50, "boilerplate-caption": 20, "near-duplicate": 20, "blurred-image": 20}
    assert corpus.planted == expected | dict.fromkeys(BROKEN, 1)
    reference = [row for row in corpus.read_truth().to_pylist() if row["part"] == "reference"]
    assert len(reference) == 30
    assert all(row["fault"] is None for row in reference)


def test_broken_samples_are_quarantined_and_no_others(corpus: Corpus) -> None:
    """Our readers refuse the samples broken in structure, each for its own reason, and nothing else."""
    refused = Counter((row["truth"]["fault"], row["reason"]) for row in read_back(corpus) if row["reason"])
    assert refused == {
        ("truncated-image", "image-undecodable"): 1,
        ("missing-caption", "caption-missing"): 1,
        ("duplicate-key", "key-duplicate"): 1,
    }


def test_equal_seeds_give_equal_bytes(tmp_path: Path, corpus: Corpus) -> None:
    """The same arguments draw the same shards byte for byte, another seed draws others."""
    again = draw_corpus(tmp_path / "again", samples=200, shards=2, seed=3, clean_reference=30)
    other = draw_corpus(tmp_path / "other", samples=200, shards=2, seed=4, clean_reference=30)
    assert [path.read_bytes() for path in again.pool] == [path.read_bytes() for path in corpus.pool]
    assert other.pool[0].read_bytes() != corpus.pool[0].read_bytes()


def test_mismatched_captions_are_wrong(corpus: Corpus) -> None:
    """A mismatched caption differs from what the scene shows; a sound sample's caption is the true one."""
    for row in corpus.read_truth().to_pylist():
        if row["fault"] == "mismatched-caption":
            assert row["caption"] != row["true_caption"]
        elif row["fault"] in (None, "near-duplicate", "blurred-image"):
            assert row["caption"] == row["true_caption"]


def test_near_duplicates_share_their_origin(corpus: Corpus) -> None:
    """Each near-duplicate names the number of a sound sample as its origin; all other origins are distinct."""
    rows = [row for row in corpus.read_truth().to_pylist() if row["part"] == "pool"]
    sound = {row["origin"] for row in rows if row["fault"] is None}
    copies = [row["origin"] for row in rows if row["fault"] == "near-duplicate"]
    others = [row["origin"] for row in rows if row["fault"] != "near-duplicate"]
    assert set(copies) <= sound
    assert len(others) == len(set(others))


def test_blurred_pictures_are_less_sharp(corpus: Corpus) -> None:
    """Every blurred picture has less than a third of the sharpness of every sound one."""
    sharpness: dict[str | None, list[float]] = {}
    truth = {
        r["ordinal"]: r for r in corpus.read_truth().to_pylist() if r["part"] == "pool" and r["shard"] == "00000.tar"
    }
    with open_shard(expand_shards([str(corpus.pool[0])])[0]) as data:
        for entry in group_samples(index_tar(data), "00" * 32):
            fault = truth[entry.ordinal]["fault"]
            image = entry.image()
            if fault in (None, "blurred-image") and image is not None:
                rgb_HWC, _ = decode_rgb(data[image.offset : image.offset + image.size])
                sharpness.setdefault(fault, []).append(signals(rgb_HWC).sharpness)
    assert max(sharpness["blurred-image"]) < min(sharpness[None]) / 3


def test_a_scene_shows_what_its_caption_says() -> None:
    """The picture of a red circle in the middle is red in the middle, and its ground is the named one."""
    scene = Scene("navy", (Shapes(1, "circle", "red", "plain", "large"),), None, "in the middle")
    pixels = np.asarray(draw(scene, np.random.default_rng(0), side=64)).astype(int)
    assert np.abs(pixels[32, 32] - COLOURS["red"]).max() < 10
    assert pixels[2, 2, 2] > pixels[2, 2, 0]


def test_captions_name_the_attributes() -> None:
    """An English caption names the colour, shape and count of every group; a German one agrees in its endings."""
    first, second = Shapes(3, "cross", "orange", "dotted", "small"), Shapes(1, "square", "blue", "plain", "large")
    scene = Scene("grey", (first, second), "above", None)
    for seed in range(30):
        text = describe(scene, np.random.default_rng(seed)).lower()
        assert all(word in text for word in ("three", "orange", "dotted", "crosses", "large blue square", "grey"))
    german = describe(scene, np.random.default_rng(1), language="de")
    assert "drei kleine orange gepunktete Kreuze, darunter ein großes blaues Quadrat" in german


def test_shapes_never_drown_in_their_ground() -> None:
    """No group has the colour of its ground."""
    for seed in range(300):
        scene = imagine(np.random.default_rng(seed))
        assert all(group.colour != scene.ground for group in scene.groups)


@pytest.mark.parametrize("wrong", [{"samples": 5}, {"shards": 0}, {"samples": 100, "shards": 60}])
def test_arguments_that_cannot_be_met(tmp_path: Path, wrong: dict[str, int]) -> None:
    """Too few samples or too many shards are refused before anything is written."""
    with pytest.raises(UsageError):
        draw_corpus(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()


def test_rates_that_leave_no_sound_sample() -> None:
    """Fault rates above 95 % in sum are refused."""
    with pytest.raises(UsageError, match="at most"):
        FaultRates(mismatched=0.9, blurred=0.2)
