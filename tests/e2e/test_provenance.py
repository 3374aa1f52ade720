"""README.md and croissant.json of finished runs: other tools read them, `verify` proves them, an audit enters them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import curate
from curate.auditing.audit import audit_columns
from curate.provenance import CARDS, Findings, add_findings
from curate.verification import Check
from tests.conftest import make_checkpoint
from tests.e2e.pools import make_pool, published

HOSTILE = "a b`c|d<script>x{1..2}"  # every file system takes it
REPORT = "audit/report.html"


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "learner", "sigmoid", seed=5)


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, learner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over shards in a directory with a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    score(make_pool(folder / HOSTILE), folder / "out", tiny_checkpoint, learner)
    return folder / "out"


def score(pool: Path, output: Path, reference: Path, learner: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"engine": "inline", "super_batch": 50, "chunks": 4, "samples_per_shard": 10}
    return curate.score(pool, output, reference=str(reference), learner=str(learner), **settings | options)


def resume(output: Path, reference: Path, learner: Path, pool: Path) -> None:
    score(pool / HOSTILE, output, reference, learner)


def findings(note: str = "a note") -> Findings:
    random = np.random.default_rng(0)
    tone_N = random.integers(0, 2, 1000)
    audit = audit_columns({"tone": tone_N}, random.random(1000) < np.where(tone_N, 0.1, 0.3), placebos=1)
    return Findings.of(audit, notes=(note,), report=REPORT)


def checks(output: Path) -> dict[str, Check]:
    return {check.name: check for check in curate.verify(output, load=False).checks}


def failed(output: Path) -> list[str]:
    return [name for name, check in checks(output).items() if check.ok is False]


def validate(output: Path) -> list[str]:
    """The complaints of `mlcroissant validate`, which has to end well."""
    pytest.importorskip("mlcroissant")
    program = Path(sys.executable).with_name("mlcroissant")
    command = [str(program), "validate", "--jsonld", str(output / "croissant.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    assert "Done." in done.stderr
    return re.findall(r"^  -  .*?\] (.*)", done.stderr, re.MULTILINE) + re.findall(r"WARNING: .*|^E.*", done.stderr)


def test_mlcroissant_accepts_it_but_for_the_date(finished: Path) -> None:
    """`mlcroissant validate` misses the date of publication, which no clock may write, and nothing else."""
    (complaint,) = validate(finished)
    assert "datePublished" in complaint


def test_mlcroissant_loads_every_record(finished: Path) -> None:
    """The record set yields the sidecars' rows in order, from the files alone."""
    croissant = pytest.importorskip("mlcroissant")
    records = list(croissant.Dataset(finished / "croissant.json").records("samples"))
    rows = [row for path in sorted(finished.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(records) == len(rows) == 24
    for record, row in zip(records, rows, strict=True):
        for name, value in row.items():
            value = value.encode() if isinstance(value, str) else value
            assert record[f"samples/{name}"] == (pytest.approx(value) if isinstance(value, float) else value)


def test_croissant_has_the_digest_of_every_shard_and_sidecar(finished: Path) -> None:
    """Each FileObject lies where it says and has its sha256; inputs and checkpoints have theirs."""
    document = json.loads((finished / "croissant.json").read_text())
    files = {one["contentUrl"]: one["sha256"] for one in document["distribution"] if one["@type"] == "cr:FileObject"}
    assert sorted(files) == sorted(p.name for p in finished.iterdir() if re.fullmatch(r"\d+\.(tar|parquet)", p.name))
    assert all(hashlib.sha256((finished / name).read_bytes()).hexdigest() == digest for name, digest in files.items())
    sources = {one["name"]: one["sha256"] for one in document["prov:wasDerivedFrom"]}
    for path in (finished.parent / HOSTILE).glob("*.tar"):
        assert sources[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
    used = [one["name"].split()[0] for one in document["prov:wasGeneratedBy"]["prov:used"]]
    assert used == ["learner", "reference", "settings"]


@pytest.mark.parametrize("streaming", [True, False])
def test_hf_datasets_loads_the_directory(
    finished: Path, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset(OUT)` finds the shards by the front matter of README.md, and takes nothing else for data."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    rows = datasets.load_dataset(str(finished), split="train", streaming=streaming, cache_dir=str(tmp_path))
    captions = [row["txt"] for row in rows]
    written = [row["caption"] for path in sorted(finished.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert captions == written


def forge(output: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file and put its new digest into the manifest."""
    content = change((output / name).read_bytes())
    (output / name).write_bytes(content)
    path = output / "_curate" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["digests"][name] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", CARDS)
def test_verify_proves_the_papers(finished: Path, tmp_path: Path, name: str) -> None:
    """A changed card is found by its digest, and with a forged digest by making it anew."""
    copy = shutil.copytree(finished, tmp_path / "out")
    assert failed(copy) == []
    (copy / name).write_bytes((copy / name).read_bytes().replace(b"unknown", b"CC-BY-4"))
    assert failed(copy) == ["digests", "data card"]
    forge(copy, name, lambda content: content)
    assert failed(copy) == ["data card"]
    (copy / name).unlink()
    assert failed(copy) == ["digests", "data card"]


def test_a_readme_of_ones_own_is_left_alone(
    finished: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """Without the mark the file is its author's: not proven, not replaced by a repeated run, an audit or a new draw."""
    copy = shutil.copytree(finished, tmp_path / "out")
    (copy / "README.md").write_text("my own words")
    assert failed(copy) == []
    assert checks(copy)["data card"].detail.startswith("croissant.json made anew")
    assert add_findings(copy, findings())
    resume(copy, tiny_checkpoint, learner, finished.parent)
    curate.select(copy, keep=0.5, engine="inline")
    curate.write(copy, engine="inline")
    assert failed(copy) == []
    assert (copy / "README.md").read_text() == "my own words"


def test_an_audit_enters_both_files_and_stays(
    finished: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """Findings are written and verified, survive a repeated run, give way to later ones, and go with another draw."""
    copy = shutil.copytree(finished, tmp_path / "out")
    assert add_findings(copy, findings("labels matched | 99 %"))
    for name in CARDS:
        assert b"as often as the rest" in (copy / name).read_bytes()
    assert checks(copy)["data card"].detail.endswith("with the findings of an audit")
    assert failed(copy) == []
    assert len(validate(copy)) == 1
    before = published(copy)
    resume(copy, tiny_checkpoint, learner, finished.parent)
    assert published(copy) == before
    assert add_findings(copy, findings("a later audit"))
    assert b"labels matched" not in (copy / "README.md").read_bytes()
    assert add_findings(copy, findings("labels matched | 99 %"))
    assert published(copy) == before
    curate.select(copy, keep=0.5, engine="inline")
    curate.write(copy, engine="inline")
    assert b"Not audited" in (copy / "README.md").read_bytes()
    assert failed(copy) == []


@pytest.mark.parametrize("calls", range(4))
def test_an_audit_that_is_killed_leaves_an_output_that_verifies(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """After any number of its writes nothing fails, and the next audit completes it to the bytes of a whole one."""
    copy, whole = (shutil.copytree(finished, tmp_path / name) for name in ("out", "whole"))
    add_findings(whole, findings("new"))
    add_findings(copy, findings("old"))
    from curate.provenance import keeping

    left, write = [calls], keeping.replace_file

    def killed(path: Path, content: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(keeping, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        add_findings(copy, findings("new"))
    monkeypatch.undo()
    assert failed(copy) == []
    assert (checks(copy)["data card"].ok is None) == (calls > 0)
    assert add_findings(copy, findings("new"))
    assert published(copy) == published(whole)
    assert (copy / "_curate/manifest.json").read_bytes() == (whole / "_curate/manifest.json").read_bytes()


def test_findings_need_a_finished_output(finished: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path) -> None:
    """Without papers nothing is written: scores only, no run, or an output of a version that wrote none."""
    assert not add_findings(tmp_path, findings())
    score(finished.parent / HOSTILE, tmp_path / "scores", tiny_checkpoint, learner, scores_only=True)
    assert not add_findings(tmp_path / "scores", findings())
    copy = shutil.copytree(finished, tmp_path / "old")
    path = copy / "_curate" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in CARDS:
        del manifest["digests"][name]
        os.unlink(copy / name)
    path.write_text(json.dumps(manifest))
    before = published(copy)
    assert not add_findings(copy, findings())
    assert published(copy) == before
    assert (failed(copy), checks(copy)["data card"].ok) == ([], None)


def test_nothing_selected_and_a_training_have_papers_too(
    teed: Path, tiny_checkpoint: Path, learner: Path, tmp_path: Path
) -> None:
    """What a training chose and an empty selection validate, and take findings."""
    copy = shutil.copytree(teed, tmp_path / "teed")
    assert len(validate(copy)) == 1
    assert b"96 choices that a training made in 12 steps" in (copy / "README.md").read_bytes()
    assert add_findings(copy, findings())
    assert failed(copy) == []
    pool = make_pool(tmp_path / "pool", shards=1, samples=2)
    score(pool, tmp_path / "empty", tiny_checkpoint, learner, keep=0.01)
    assert "nothing to load" in (tmp_path / "empty" / "README.md").read_text()
    assert len(validate(tmp_path / "empty")) == 1
    assert failed(tmp_path / "empty") == []


def test_the_directory_of_the_output_is_in_neither_file(finished: Path) -> None:
    """A run that is made again or moved elsewhere has the same papers."""
    for name in CARDS:
        assert str(finished) not in (finished / name).read_text()
