"""A policy over a training: quotas at every step, in every phase; and nothing changed where nothing binds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate
from curate.errors import RunMismatch, UsageError
from curate.learner.journal import read_log
from curate.learner.report import write_report
from curate.models import configs
from curate.pipelines import training_policy
from curate.pipelines.training import train
from tests.conftest import MINI, make_checkpoint
from tests.making import make_tar
from tests.unit.test_online_training import FEW, after, chosen_by, interrupt, same
from tests.unit.test_training import samples

TRIM = {"handover": "0:learnability@10,2:trim@0.6,4:uniform"}
OVERLAP = pytest.mark.filterwarnings("ignore:.*held-out pairs are trained on")  # trusted pairs of the pool itself
WAYS = [
    pytest.param({"criterion": "uniform"}, id="uniform"),
    pytest.param(TRIM | {"lag": 2}, id="all phases with lag"),
    pytest.param({}, id="learnability", marks=pytest.mark.slow),
    pytest.param(TRIM, id="all phases", marks=pytest.mark.slow),
    pytest.param({"criterion": "alignment", "gain": 2.0}, id="alignment", marks=[pytest.mark.slow, OVERLAP]),
    pytest.param(
        {"criterion": "hard-learner", "loss": "softmax", "lag": 2, "watch_every": 1}, id="lag", marks=pytest.mark.slow
    ),
]
QUICK = FEW | {"engine": "inline"}  # no pool of workers to start and stop
POLICY = """\
schema: 1
author: A. Expert
date: 2026-11-20
rationale: the small group teaches what the large one cannot
columns:
  - column: side
    source: labels by hand
    groups:
      - name: few
        {bounds}
"""


@pytest.fixture(autouse=True)
def mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration small enough for steps of a few milliseconds."""
    monkeypatch.setitem(configs.CONFIGS, "mini", MINI)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [make_tar(tmp_path / f"{n:05d}.tar", samples(20, start=20 * n)) for n in range(2)]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "reference", "sigmoid")


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A tenth of the pool is `few`: four samples of forty."""
    path = tmp_path / "labels.csv"
    path.write_text("key,side\n" + "".join(f"{n:09d},{'few' if n % 10 == 3 else 'many'}\n" for n in range(40)))
    return path


Write = Callable[[str], Path]


@pytest.fixture
def policy(tmp_path: Path) -> Write:
    """A policy file with these bounds for the group `few`."""

    def write(bounds: str) -> Path:
        path = tmp_path / "policy.yaml"
        path.write_text(POLICY.format(bounds=bounds))
        return path

    return write


def settings_of(way: dict[str, Any], reference: Path, shards: list[Path]) -> dict[str, Any]:
    trusted = {"trusted": shards[:1]} if way.get("criterion") == "alignment" else {}
    own = {} if way.get("loss") == "softmax" else {"reference": str(reference)}
    return {**QUICK, **own, **trusted, **way}


def few_in(table: pa.Table) -> list[int]:
    """How many of each step's pairs are of the group `few`."""
    counts = np.zeros(max(table["step"].to_pylist()), int)
    for step, key in zip(table["step"].to_pylist(), table["key"].to_pylist(), strict=True):
        counts[step - 1] += int(key) % 10 == 3
    return [int(n) for n in counts]


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_log(run / "log.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_binds_nothing_changes(
    way: dict[str, Any], shards: list[Path], reference: Path, labels: Path, policy: Write, tmp_path: Path
) -> None:
    """A floor of none and a ceiling of all: weights and sub-batches are those of a run without a policy."""
    settings = settings_of(way, reference, shards)
    train(shards, tmp_path / "plain", **settings)
    loose = policy("min_ratio: 0\n        max_ratio: 40")
    train(shards, tmp_path / "policed", policy=loose, labels=labels, **settings)
    assert chosen_by(tmp_path / "plain").equals(chosen_by(tmp_path / "policed"))
    assert same(tmp_path / "plain", tmp_path / "policed")
    found = json.loads((tmp_path / "policed/certificate.json").read_text())
    assert (found["draws_bound"], found["draws_with_conflict"], found["substitutes"]) == (0, 0, 0)
    assert all(price["given_up_per_member"] == 0 for price in found["prices"].values())


@pytest.mark.parametrize("way", WAYS)
def test_a_floor_is_kept_in_every_phase_and_over_a_resume(
    way: dict[str, Any], shards: list[Path], reference: Path, labels: Path, policy: Write, tmp_path: Path
) -> None:
    """A quarter of each sub-batch of four where the pool has a tenth; a run that is taken up again draws the same."""
    settings = settings_of(way, reference, shards) | {"policy": policy("min_share: 0.25"), "labels": labels}
    settings["filter_ratio"] = 0.8
    train(shards, tmp_path / "whole", **settings)
    log = chosen_by(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(shards, tmp_path / "parted", progress=after(3, interrupt), **settings)
    train(shards, tmp_path / "parted", **settings)
    assert chosen_by(tmp_path / "parted").equals(log)
    assert same(tmp_path / "whole", tmp_path / "parted")
    both = [json.loads((tmp_path / run / "certificate.json").read_text()) for run in ("whole", "parted")]
    assert both[0] == both[1]
    [row] = both[0]["groups"]
    assert (row["group"], row["C"], row["L"]) == ("side=few", sum(few_in(log)), 6)
    owed = [line["short"]["side=few"] for line in lines_of(tmp_path / "parted", "short") if line["step"] == 6]
    assert row["C"] == 6 - sum(owed)  # owed only where the last candidates had too few
    assert both[0]["chosen"] == len(log) == 24


def test_the_last_draw_rounds_up(shards: list[Path], labels: Path, policy: Write, tmp_path: Path) -> None:
    """Of 24 pairs 5.52 are owed, of the first 20 4.6: 4 before the last draw, and 6 with it."""
    settings = {**QUICK, "criterion": "uniform", "filter_ratio": 0.9, "policy": policy("min_share: 0.23")}
    train(shards, tmp_path / "run", labels=labels, **settings)
    few = few_in(chosen_by(tmp_path / "run"))
    assert (sum(few[:5]), sum(few)) == (4, 6)
    found = json.loads((tmp_path / "run/certificate.json").read_text())
    assert found["groups"][0]["slack"] == 0
    assert found["draws_bound"] > 0


def test_memberships_and_certificate_agree_with_the_log(
    shards: list[Path], reference: Path, labels: Path, policy: Write, tmp_path: Path
) -> None:
    """What the certificate counts can be counted again from the stored memberships and the log of chosen pairs."""
    settings = {**QUICK, "reference": str(reference), "policy": policy("min_ratio: 2"), "labels": labels}
    train(shards, tmp_path / "run", **settings)
    found = json.loads((tmp_path / "run/certificate.json").read_text())
    members = pq.read_table(tmp_path / "run" / found["memberships"]["file"])
    few = {i for i, inside in zip(members["sample_id"].to_pylist(), members["0"].to_pylist(), strict=True) if inside}
    assert len(members), len(few) == (40, 4)
    chosen = chosen_by(tmp_path / "run")["sample_id"].to_pylist()
    assert found["groups"][0]["C"] == sum(one in few for one in chosen)
    assert found["candidates"] == 48
    assert found["prices"]["learnability"]["members"] == 24
    assert "labels.csv" in found["columns"][0]["provenance"]


def test_the_shards_that_a_training_writes_carry_its_certificate(
    shards: list[Path], reference: Path, labels: Path, policy: Write, tmp_path: Path
) -> None:
    """The certificate lies beside the shards, its digest in the manifest and its memberships with it."""
    settings = {**QUICK, "reference": str(reference), "policy": policy("min_ratio: 2"), "labels": labels}
    train(shards, tmp_path / "run", write_shards=tmp_path / "teed", **settings)
    ours, theirs = ((tmp_path / name / "certificate.json").read_bytes() for name in ("run", "teed"))
    assert ours == theirs
    assert "certificate.json" in json.loads((tmp_path / "teed/_curate/manifest.json").read_text())["digests"]
    assert (tmp_path / "teed" / json.loads(theirs)["memberships"]["file"]).is_file()
    assert curate.verify(tmp_path / "teed").ok
    other = json.loads(theirs)
    other["groups"][0]["C"] += 1
    (tmp_path / "teed/certificate.json").write_text(json.dumps(other))
    checks = {check.name: check for check in curate.verify(tmp_path / "teed", load=False).checks}
    assert "side=few: it says" in checks["certificate"].detail
    other = json.loads(theirs)
    other["groups"][0]["L"] -= 1
    (tmp_path / "teed/certificate.json").write_text(json.dumps(other))
    checks = {check.name: check for check in curate.verify(tmp_path / "teed", load=False).checks}
    assert "groups: it says" in checks["certificate"].detail


def test_bad_substitutes_are_passed_over(labels: Path, policy: Write, tmp_path: Path) -> None:
    """Images decoded step by step, half of the small group torn: the others stand in, and nobody else is lost."""
    torn = [(key, {**parts, "jpg": parts["jpg"][:300]} if int(key) % 20 == 3 else parts) for key, parts in samples(40)]
    shard = make_tar(tmp_path / "00000.tar", torn)
    settings = {**QUICK, "criterion": "uniform", "filter_ratio": 0.9, "memory_gb": 1e-9, "steps": 8}
    train([shard], tmp_path / "run", policy=policy("min_share: 0.5"), labels=labels, **settings)
    log = chosen_by(tmp_path / "run")
    assert {int(key) for key in log["key"].to_pylist() if int(key) % 10 == 3} <= {13, 33}
    assert min(few_in(log)) >= 1
    found = json.loads((tmp_path / "run/certificate.json").read_text())
    assert found["groups"][0]["C"] == sum(few_in(log))
    assert found["substitutes"] > 0
    assert found["price"] is None


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ("min_share: 0.9", r"policy\.yaml:10: columns\.0\.groups\.0\.min_share: no selection can keep it: side=few"),
        ("min_ratio: 30", r"policy\.yaml:10: .*min_ratio"),
        ("min_cnt: 3", r"policy\.yaml:10: columns\.0\.groups\.0\.min_cnt: unknown; did you mean 'min_count'"),
    ],
)
def test_a_policy_that_cannot_be_met_is_refused_and_forgotten(
    bounds: str, message: str, shards: list[Path], labels: Path, policy: Write, tmp_path: Path
) -> None:
    """Line, field and conflict are named before a step is made; another policy can be tried in the same place."""
    settings = {**QUICK, "criterion": "hard-learner", "labels": labels}
    with pytest.raises(UsageError, match=message):
        train(shards, tmp_path / "run", policy=policy(bounds), **settings)
    train(shards, tmp_path / "run", policy=policy("min_ratio: 1"), **settings)


def test_an_earlier_run_survives_a_policy_that_cannot_be_met(
    shards: list[Path], labels: Path, policy: Write, tmp_path: Path
) -> None:
    """Refused with --overwrite, the earlier run has all its bytes; one that is not refused is as a fresh one."""
    settings = {**QUICK, "criterion": "hard-learner"}
    run = train(shards, tmp_path / "run", **settings).path
    before = _bytes_of(run)
    with pytest.raises(UsageError, match="no selection can keep it: side=few"):
        train(shards, run, overwrite=True, policy=policy("min_share: 0.9"), labels=labels, **settings)
    assert _bytes_of(run) == before
    given = {"policy": policy("min_share: 0.2"), "labels": labels}
    read = Mock(wraps=training_policy.traits_pass)
    with patch.object(training_policy, "traits_pass", read):
        train(shards, run, overwrite=True, **given, **settings)
    assert read.call_count == 1
    train(shards, tmp_path / "fresh", **given, **settings)
    assert same(run, tmp_path / "fresh")
    assert (run / "certificate.json").read_bytes() == (tmp_path / "fresh/certificate.json").read_bytes()
    assert not (run / "_curate/next").exists()


def _bytes_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_conflict_of_a_draw_is_logged_and_certified(shards: list[Path], labels: Path, tmp_path: Path) -> None:
    """A tenth of the rate for the large group, with too few others there: each draw serves what it can and says so."""
    text = "min_share: 0.1\n      - name: many\n        max_ratio: 0.1\n    severity: warning"
    more = POLICY.format(bounds=text) + "  - column: caption script\n    source: captions\n    groups: [Latin]\n"
    path = tmp_path / "both.yaml"
    path.write_text(more + "    min_ratio: 0.5\n")
    train(shards, tmp_path / "run", policy=path, labels=labels, **{**QUICK, "criterion": "hard-learner"})
    found = json.loads((tmp_path / "run/certificate.json").read_text())
    lines = lines_of(tmp_path / "run", "short")
    assert found["draws_with_conflict"] == sum(bool(line["conflict"]) for line in lines) > 0
    assert "side=many at most" in lines[0]["conflict"]
    page = (tmp_path / "run/report.html").read_text()
    assert "Conflicts, the most frequent first" in page
    assert "Not kept: side=many" in page


def test_the_policy_is_pinned(shards: list[Path], labels: Path, policy: Write, tmp_path: Path) -> None:
    """TRAIN.json has its text and the digest of the labels: a run is gone on with under the same one alone."""
    settings = {**QUICK, "criterion": "hard-learner", "labels": labels}
    given = policy("min_ratio: 1")
    text = given.read_text()
    train(shards, tmp_path / "run", policy=given, **settings)
    record = json.loads((tmp_path / "run/_curate/TRAIN.json").read_text())
    assert (record["policy"]["text"], record["policy"]["on"]) == (text, "key")
    with pytest.raises(RunMismatch, match=r"policy\.text"):
        train(shards, tmp_path / "run", policy=policy("min_ratio: 1.1"), **settings)
    with pytest.raises(RunMismatch, match="policy"):
        train(shards, tmp_path / "run", **{**QUICK, "criterion": "hard-learner"})
    with pytest.raises(UsageError, match="labels give groups to a policy"):
        train(shards, tmp_path / "other", **settings)


def test_groups_of_captions_need_no_labels(tmp_path: Path) -> None:
    """A policy on what captions mention; the report shows it, its author and every group."""
    mixed = [
        (key, {**parts, "txt": f"a {'woman' if int(key) % 4 == 0 else 'man'} in the street {key}".encode()})
        for key, parts in samples(40)
    ]
    shard = make_tar(tmp_path / "people.tar", mixed)
    path = tmp_path / "gender.yaml"
    path.write_text(
        POLICY.replace("side", "gender").split("      - name")[0]
        + "      - {name: female, min_ratio: 0.9}\n      - {name: male, min_ratio: 0.5}\n    overlapping: true\n"
    )
    train([shard], tmp_path / "run", policy=path, **{**QUICK, "criterion": "hard-learner", "watch_every": 2})
    found = json.loads((tmp_path / "run/certificate.json").read_text())
    assert [row["group"] for row in found["groups"]] == ["gender=female", "gender=male"]
    assert found["prices"]["hard-learner"]["members"] == 24
    page = (tmp_path / "run/report.html").read_text()
    assert all(text in page for text in ("A. Expert", "gender=female", "Groups under the policy", "min ratio 0.9"))
    assert [line["step"] for line in lines_of(tmp_path / "run", "quota")] == [2, 4, 6]


def test_the_report_forgives_what_a_log_says_of_a_policy(tmp_path: Path) -> None:
    """Markup stays text; counts that are none, groups that are no list and a missing certificate leave gaps."""
    hostile = "<script>alert(1)</script>"
    group = {"name": hostile, "min_ratio": "x", "max_ratio": None, "min_count": [hostile]}
    policy = {"author": hostile, "rationale": 3, "columns": [{"column": hostile, "groups": [group, 7]}, None]}
    lines: list[dict[str, Any]] = [
        {"kind": "start", "settings": {}},
        {"kind": "policy", "policy": policy, "columns": [{"column": hostile, "coverage": "most"}, 1]},
        {"kind": "step", "step": 1, "loss": 1.0},
        {"kind": "short", "step": 1, "conflict": hostile, "short": None},
        {"kind": "short", "step": 1, "conflict": "", "short": {hostile: 2}},
        *({"kind": "quota", "step": n, "candidates": n, "chosen": 1, "groups": groups} for n, groups in enumerate(
            ([], {f"{hostile}={hostile}": [1, "x"]}, {f"{hostile}={hostile}": [4, 1]}, None), 1
        )),
    ]  # fmt: skip
    for more in ([], [{"kind": "certificate", "groups": [{"group": hostile, "C": 1, "F": 5, "V": "x"}, 4]}]):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
        page = write_report(tmp_path, tmp_path / "report.html").read_text()
        assert "<script" not in page
        assert ("Not kept: " if more else "its certificate is not written yet") in page
        assert "1 of 1 draws could not meet every bound; 1 had too few candidates" in page


def test_substitutes_are_drawn_evenly(shards: list[Path], labels: Path, policy: Write, tmp_path: Path) -> None:
    """Of 60 pairs of the small group nobody is a favourite: four samples, each some fifteen times."""
    settings = {**QUICK, "criterion": "uniform", "filter_ratio": 0.9, "steps": 30, "labels": labels}
    train(shards, tmp_path / "run", policy=policy("min_share: 0.5"), **settings)
    times = Counter(key for key in chosen_by(tmp_path / "run")["key"].to_pylist() if int(key) % 10 == 3)
    assert sum(times.values()) == 60
    assert len(times) == 4
    assert max(times.values()) <= 20
