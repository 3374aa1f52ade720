"""Zero-shot accuracy and retrieval of a small trained model, against open_clip's own code and against loops."""

from __future__ import annotations

import io
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

import curate
from curate.errors import CurateWarning, UsageError
from curate.evaluation import streaming
from curate.evaluation.streaming import workers
from curate.evaluation.zeroshot import class_embeddings
from curate.models import configs
from curate.models.load import load_model
from curate.pipelines.training import train
from tests.conftest import MINI
from tests.making import Sample, data_root, make_image, make_tar
from tests.unit.test_training import COLOURS, samples

NAMES = [*COLOURS, "violet"]  # a class that no image has
TEMPLATES = ["a {c} square", "a photo of a {c} thing", "{c}"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a few steps of colours: right often, not always."""
    folder = tmp_path_factory.mktemp("colours")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.CONFIGS, "mini", MINI)
        shard = make_tar(folder / "0.tar", samples(32))
        settings = {"model": "mini", "batch": 16, "steps": 30, "lr": 4e-3, "device": "cpu", "precision": "fp32"}
        return train([shard], folder / "model", **settings).path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP_benchmark's layout: 72 squares in two shards, classes of unequal size."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "test").mkdir()
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    pairs = [pair for pair in samples(80, start=500) if not pair[1]["txt"].endswith(b"white square")]
    rows = [(key, {"png" if n % 2 else "jpg": p["jpg"], "cls": label(p)}) for n, (key, p) in enumerate(pairs)]
    make_tar(folder / "test" / "0.tar", rows[:40])
    make_tar(folder / "test" / "1.tar", rows[40:])
    return folder


def label(parts: object) -> bytes:
    word = dict(parts)["txt"].decode().split()[1]  # type: ignore[call-overload]
    return str(NAMES.index(word)).encode()


def members(folder: Path) -> list[dict[str, bytes]]:
    """Every sample of a folder of shards, read with webdataset."""
    import webdataset

    shards = [str(path) for path in sorted(folder.rglob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def test_accuracy_is_that_of_open_clip(checkpoint: Path, labelled: Path) -> None:
    """The same images through open_clip's preprocessing, classifier and top-k give the same top-1, top-5 and means."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{checkpoint}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{checkpoint}")
    prompts = [template.replace("{c}", "{}") for template in TEMPLATES]
    classifier = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, NAMES, prompts)
    rows = members(labelled / "test")
    image = torch.stack([preprocess(Image.open(io.BytesIO(row.get("jpg") or row["png"]))) for row in rows])
    target = torch.tensor([int(row["cls"]) for row in rows])
    with torch.inference_mode():
        guess = (model.encode_image(image, normalize=True) @ classifier).topk(5, dim=1).indices
    right = guess == target[:, None]
    per_class = [right[target == c, 0].float().mean() for c in target.unique()]

    found = curate.evaluate(checkpoint, zeroshot=labelled, precision="fp32", batch_size=16).zeroshot
    assert found is not None
    assert 0.2 < found.top1.value < 1  # neither chance nor perfect, or the comparison would show little
    assert found.images == len(rows) == 70
    assert found.top1.value == pytest.approx(float(right[:, 0].float().mean()))
    assert found.top5.value == pytest.approx(float(right.any(1).float().mean()))
    assert found.mean_per_class.value == pytest.approx(float(torch.stack(per_class).mean()))
    assert [one.images for one in found.classes] == torch.bincount(target, minlength=9).tolist()
    assert found.classes[NAMES.index("violet")].top1 is None
    encoder = load_model(str(checkpoint), precision="fp32")
    with workers() as threads:
        ours = class_embeddings(encoder, NAMES, TEMPLATES, threads)
    torch.testing.assert_close(ours, classifier.T, atol=1e-5, rtol=0)


def test_json_labels_give_the_same_as_numbers(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    """The same images labelled by a field of their json have the same accuracy, but for the class nobody has."""
    rows = []
    for row in members(labelled / "test"):
        record = {"colour": NAMES[int(row["cls"])]}
        rows.append((row["__key__"], {"jpg": row.get("jpg") or row["png"], "json": json.dumps(record).encode()}))
    make_tar(tmp_path / "0.tar", rows)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    prompts = labelled / "zeroshot_classification_templates.txt"
    one = curate.evaluate(checkpoint, zeroshot=labelled, precision="fp32").zeroshot
    other = curate.evaluate(
        checkpoint,
        zeroshot=tmp_path,
        classes=tmp_path / "names.txt",
        label="colour",
        templates=prompts,
        precision="fp32",
    ).zeroshot
    alone = curate.evaluate(checkpoint, zeroshot=tmp_path, label="colour", templates=prompts, precision="fp32").zeroshot
    assert one == other
    assert alone is not None
    assert [c.name for c in alone.classes] == sorted(set(NAMES) - {"violet", "white"})


def captioned(count: int) -> list[Sample]:
    """Squares with one to three captions each, a line per caption, and blank lines between."""
    made = []
    for n, (key, parts) in enumerate(samples(count, start=900)):
        text = parts["txt"].decode()  # with a number, since equal captions would tie
        lines = [f"{text} {n}", f"number {n}, {text}", f"it is the {n}th"][: 1 + n % 3]
        made.append((key, {"jpg": parts["jpg"], "txt": "\n \n".join(lines).encode() + b"\n"}))
    return made


@pytest.mark.parametrize("pool", [None, 10])
def test_retrieval_is_a_sort_of_the_similarities(pool: int | None, checkpoint: Path, tmp_path: Path) -> None:
    """Recall at 1, 5 and 10 with several captions per image is what sorting the whole matrix by hand gives."""
    make_tar(tmp_path / "0.tar", captioned(17))
    make_tar(tmp_path / "1.tar", captioned(36)[17:])
    found = curate.evaluate(checkpoint, retrieval=tmp_path, pool=pool, precision="fp32", batch_size=5).retrieval
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{checkpoint}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{checkpoint}")
    rows = members(tmp_path)
    captions = [[line for line in row["txt"].decode().split("\n") if line.strip()] for row in rows]
    owner = torch.tensor([n for n, own in enumerate(captions) for _ in own])
    with torch.inference_mode():
        image = torch.stack([preprocess(Image.open(io.BytesIO(row["jpg"]))) for row in rows])
        image = model.eval().encode_image(image, normalize=True)
        text = model.encode_text(tokenizer([line for own in captions for line in own]), normalize=True)
    size, hits = pool or 36, {k: [0, 0] for k in (1, 5, 10)}
    for first in range(0, 36 - size + 1, size):
        rows_p = (owner >= first) & (owner < first + size)
        sim = image[first : first + size] @ text[rows_p].T
        own = owner[rows_p][None] == torch.arange(first, first + size)[:, None]
        for k in (1, 5, 10):
            hits[k][0] += int(own.gather(1, sim.topk(k, dim=1).indices).any(1).sum())
            hits[k][1] += int(own.T.gather(1, sim.T.topk(k, dim=1).indices).any(1).sum())
    assert found is not None
    images = 36 // size * size
    assert (found.images, found.captions, found.left_over) == (images, int((owner < images).sum()), 36 - images)
    for k, (one, other) in hits.items():
        assert found.image_to_text[k].recall.value == pytest.approx(one / images)
        assert found.text_to_image[k].recall.value == pytest.approx(other / found.captions)
    assert 0 < found.image_to_text[1].recall.value < 1


def test_bad_samples_are_counted_by_reason(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    """What cannot be read is left out under its reason, and the rest is measured as if it had not been there."""
    good = captioned(12)
    bad: list[Sample] = [
        ("b0", {"jpg": b"GIF89a", "txt": b"a caption"}),
        ("b1", {"jpg": make_image()}),
        ("b2", {"txt": b"alone"}),
        ("b3", {"jpg": make_image(), "txt": b"\n \n"}),
        good[0],
    ]
    clean = make_tar(tmp_path / "clean.tar", good)
    mixed = make_tar(tmp_path / "mixed.tar", [*good[:5], *bad, *good[5:]])
    one, other = (curate.evaluate(checkpoint, retrieval=path, precision="fp32").retrieval for path in (clean, mixed))
    assert one is not None
    assert other is not None
    assert other.skipped["caption-missing"] == other.skipped["caption-empty"] == other.skipped["image-missing"] == 1
    assert other.skipped["key-duplicate"] == 1
    assert sum(other.skipped.values()) == 5
    assert (one.image_to_text, one.text_to_image) == (other.image_to_text, other.text_to_image)
    (tmp_path / "classnames.txt").write_text("\n".join(NAMES))
    rows = [(row["__key__"], {"jpg": row.get("jpg") or row["png"], "cls": row["cls"]}) for row in members(labelled)]
    path = make_tar(tmp_path / "labels.tar", [("x", {"jpg": make_image()}), ("y", {"jpg": b"", "cls": b"1"}), *rows])
    found = curate.evaluate(checkpoint, zeroshot=path, precision="fp32").zeroshot
    assert found is not None
    assert found.skipped == {"image-empty": 1, "label-missing": 1}
    assert found.images == 70


def test_the_number_of_threads_changes_nothing(
    checkpoint: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread or three, one batch waiting or many: every bit of both results is the same."""
    make_tar(tmp_path / "0.tar", captioned(40))
    results = []
    for threads, window in ((1, 64), (3, 2)):
        monkeypatch.setattr(streaming, "WINDOW", window)
        monkeypatch.setattr(streaming, "cores", lambda n=threads: type("Cores", (), {"usable": n}))
        done = curate.evaluate(checkpoint, zeroshot=labelled, retrieval=tmp_path, precision="fp32", batch_size=7)
        results.append((done.zeroshot, done.retrieval))
    assert results[0] == results[1]


def test_twin_names_are_said(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    """Two classes of one name tie, so neither is ever hit; a warning names them."""
    (tmp_path / "names.txt").write_text("\n".join(["red", *NAMES[1:-1], "red"]))
    with pytest.warns(CurateWarning, match="1 class names occur twice \\('red'\\)"):
        found = curate.evaluate(
            checkpoint, zeroshot=labelled, classes=tmp_path / "names.txt", precision="fp32"
        ).zeroshot
    assert found is not None
    assert found.classes[0].top1 is not None
    assert found.classes[0].top1.value == 0


def test_what_cannot_be_measured_is_refused(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    """Nothing to measure, idle options, empty shards and shards without a label each say what to give."""
    empty = make_tar(tmp_path / "empty.tar", [])
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    none = make_tar(tmp_path / "none.tar", [("a", {"jpg": make_image(), "txt": b"a"})])
    for named, message in (
        ({}, "nothing to measure: give --zeroshot SHARDS, --retrieval SHARDS, or both"),
        ({"retrieval": none, "label": "g"}, "--label would do nothing without --zeroshot"),
        ({"zeroshot": labelled, "pool": 9}, "--pool would do nothing without --retrieval"),
        ({"retrieval": none, "pool": 0}, "--pool 0 must be at least 1"),
        ({"retrieval": none, "batch_size": 0}, "--batch-size 0"),
        ({"retrieval": empty}, "no readable pair in 1 shards \\(the shards are empty\\)"),
        ({"zeroshot": empty}, "no labelled image in 1 shards \\(the shards are empty\\)"),
        ({"zeroshot": none}, "no labelled image in 1 shards \\(1 x label-missing\\)"),
    ):
        with pytest.raises(UsageError, match=message):
            curate.evaluate(checkpoint, **named)  # type: ignore[arg-type]


@pytest.mark.data
def test_real_shards_with_labels_and_captions(checkpoint: Path) -> None:
    """The validation emoji: ten groups from the json as classes, 178 names to find; every sample is accounted for."""
    shards = data_root() / "emoji-openmoji" / "val"
    done = curate.evaluate(checkpoint, zeroshot=shards, label="group", retrieval=shards, pool=50, precision="fp32")
    assert done.zeroshot is not None
    assert done.retrieval is not None
    assert done.zeroshot.images + sum(done.zeroshot.skipped.values()) == 178
    assert {"symbols", "flags", "people-body"} <= {one.name for one in done.zeroshot.classes}
    assert (done.retrieval.images, done.retrieval.left_over, done.retrieval.skipped) == (150, 28, {})
    assert done.retrieval.image_to_text[1].recall.low <= done.retrieval.image_to_text[1].recall.value
