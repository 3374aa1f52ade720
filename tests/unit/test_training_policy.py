"""A policy over a training: quotas at every step, in every phase; and nothing changed where nothing binds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import RunMismatch, UsageError
from curate.learner.journal import read_log
from curate.models import configs
from curate.pipelines.training import train
from tests.conftest import MINI, make_checkpoint
from tests.making import make_tar
from tests.unit.test_online_training import FEW, after, chosen_by, interrupt, same
from tests.unit.test_training import samples

TRIM = {"handover": "0:learnability@10,2:trim@0.6,4:uniform"}
WAYS: list[dict[str, Any]] = [
    {},
    {"criterion": "uniform"},
    {"criterion": "hard-learner", "loss": "softmax", "lag": 2, "watch_every": 1},
    {"criterion": "alignment", "gain": 2.0},
    TRIM,
    TRIM | {"lag": 2},
]
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
    return {**FEW, **own, **trusted, **way}


def few_in(table: pa.Table) -> list[int]:
    """How many of each step's pairs are of the group `few`."""
    counts = np.zeros(max(table["step"].to_pylist()), int)
    for step, key in zip(table["step"].to_pylist(), table["key"].to_pylist(), strict=True):
        counts[step - 1] += int(key) % 10 == 3
    return [int(n) for n in counts]


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_log(run / "log.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())) or "plain")
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


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())) or "plain")
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


def test_memberships_and_certificate_agree_with_the_log(
    shards: list[Path], reference: Path, labels: Path, policy: Write, tmp_path: Path
) -> None:
    """What the certificate counts can be counted again from the stored memberships and the log of chosen pairs."""
    settings = {**FEW, "reference": str(reference), "policy": policy("min_ratio: 2"), "labels": labels}
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
