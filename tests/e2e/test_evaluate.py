"""`curate evaluate` from the command line: tables, JSON, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from curate.cli import main
from tests.making import make_samples, make_tar

NAMES = ["a [red]class[/red]", "second", "third"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-one pictures in two shards, each with a caption, a class number and the same class in its json."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    rows = []
    for n, (key, parts) in enumerate(make_samples(21)):
        record = json.dumps({"kind": NAMES[n % 3], "width": 32}).encode()
        rows.append((key, {**parts, "cls": str(n % 3).encode(), "json": record}))
    rows[4] = (rows[4][0], {**rows[4][1], "jpg": b"not an image"})
    make_tar(folder / "0.tar", rows[:12])
    make_tar(folder / "1.tar", rows[12:])
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of one call."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_json_is_one_value(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, shards: Path) -> None:
    """With --json standard output is one JSON value with both parts, and progress goes to standard error."""
    code, out, err = printed(capsys, tiny_checkpoint, "--zeroshot", shards, "--retrieval", shards, "--json")
    found: Any = json.loads(out)
    assert code == 0
    assert "zero-shot" in err
    assert "MB" in err
    accuracy, recall = found["zeroshot"], found["retrieval"]
    assert (accuracy["images"], accuracy["skipped"]) == (20, {"image-format": 1})
    assert [(one["name"], one["images"]) for one in accuracy["classes"]] == [*zip(NAMES, (7, 6, 7), strict=True)]
    assert accuracy["top5"] == {"value": 1.0, "low": pytest.approx(0.839, abs=1e-3), "high": 1.0}
    assert accuracy["templates"] == ["a photo of a {c}."]
    assert (recall["images"], recall["captions"], recall["pool"], recall["pools"]) == (20, 20, 20, 1)
    assert set(recall["image_to_text"]) == {"1", "5", "10"}
    assert recall["text_to_image"]["5"]["chance"] == pytest.approx(0.25)
    assert found["model"]["precision"]


def test_tables_show_shares_and_intervals(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, shards: Path, tmp_path: Path
) -> None:
    """Without --json there are tables; a name of a class is shown as it is, whatever markup it holds."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("{c}\na {c}\n")
    arguments = [tiny_checkpoint, "--zeroshot", shards / "0.tar", shards / "1.tar", "--label", "kind"]
    code, out, _ = printed(capsys, *arguments, "--templates", prompts, "--retrieval", shards, "--pool", "8")
    assert code == 0
    assert "20 images, 3 classes, 2 prompts" in out
    assert "a [red]class[/red]" in out
    assert "mean per class" in out
    assert "16 images, 16 captions, in 2 pools of 8, 4 left over" in out
    assert "left out: 1 image-format" in out
    assert re.search(r"image to text at 10 +│ 100\.0 % +│ 80\.6 to 100\.0 % +│ 100\.0 %", out) is not None
    assert max(len(line) for line in out.splitlines() if "│" in line) <= 80


def test_it_repeats_itself(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, shards: Path) -> None:
    """The same call gives the same result, time aside."""
    results = []
    for _ in range(2):
        found = json.loads(printed(capsys, tiny_checkpoint, "--retrieval", shards, "--batch-size", 5, "--json")[1])
        assert found.pop("seconds") >= 0
        results.append(found)
    assert results[0] == results[1]
    assert results[0]["zeroshot"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("{model}", 2, "nothing to measure: give --zeroshot SHARDS, --retrieval SHARDS, or both"),
        ("{model} --retrieval {missing}", 2, "there is no such file"),
        ("{model} --zeroshot {shards} --label nosuch", 2, "the samples have nothing there; their fields are"),
        ("{model} --zeroshot {shards} --classes {short}", 2, "has class 2, but there are 2 class names (0 to 1)"),
        ("{model} --zeroshot {bare}", 2, "no classnames.txt beside"),
        ("{model} --retrieval {empty}", 2, "no readable pair in 1 shards (the shards are empty)"),
        ("{missing} --retrieval {shards}", 1, "model"),
        ("--retrieval {shards}", 2, "CHECKPOINT"),
    ],
)
def test_what_is_refused_is_said(
    arguments: str,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tiny_checkpoint: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    """One line on standard error names what is wrong; nothing is printed on standard output."""
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    places = {
        "model": tiny_checkpoint, "shards": shards, "missing": tmp_path / "nosuch.tar", "short": tmp_path / "short.txt",
        "empty": make_tar(tmp_path / "empty.tar", []), "bare": make_tar(tmp_path / "b.tar", make_samples(1)),
    }  # fmt: skip
    got, out, err = printed(capsys, *(word.format(**places) for word in arguments.split()))
    assert (got, out) == (code, "")
    assert message in " ".join(err.split())
    assert err.startswith("curate: ")
