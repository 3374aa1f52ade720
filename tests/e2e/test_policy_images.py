"""`curate train` under a policy on near-duplicates and embedding clusters, which the reference's pass makes known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate
from curate import scores
from curate.auditing.clusters import default_clusters, embedding_clusters
from curate.errors import UsageError
from curate.models import configs
from curate.pipelines import reference_pass
from curate.pipelines.training import train
from tests.conftest import MINI, make_checkpoint
from tests.e2e.policies import Asked, certificate_of, write_policy
from tests.making import make_samples, make_tar
from tests.unit.test_online_training import FEW, after, chosen_by, interrupt, same

N = 120
QUICK = FEW | {"engine": "inline", "filter_ratio": 0.8}
COPIES: Asked = {"2 copies": {"min_share": 0.75}}  # a fifth of the pool
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration small enough for steps of a few milliseconds."""
    monkeypatch.setitem(configs.CONFIGS, "mini", MINI)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """120 pairs, of which every fifth has the image of the tenth before or after it; one image cannot be read."""
    folder, pairs = tmp_path_factory.mktemp("pool"), make_samples(N)
    twice = [(key, {**parts, "jpg": pairs[n // 10 * 10][1]["jpg"]} if n % 5 == 0 else parts)
             for n, (key, parts) in enumerate(pairs)]  # fmt: skip
    twice[7] = (twice[7][0], {**twice[7][1], "jpg": b"no image"})
    return [make_tar(folder / f"{n:05d}.tar", twice[40 * n : 40 * n + 40]) for n in range(3)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "reference", "sigmoid")


@pytest.fixture(scope="module")
def scored(shards: list[Path], reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `curate score` with the same reference leaves."""
    output = tmp_path_factory.mktemp("scored") / "out"
    curate.score(shards, output, reference=str(reference), precision="fp32", scores_only=True, tolerance=1)
    return output


@pytest.fixture(scope="module")
def clusters(scored: Path) -> dict[str, list[str]]:
    """The keys of each embedding cluster, from the stored embeddings of all pairs."""
    found = (scores.read_table(path) for path in (scored / "_curate/score").glob("*.parquet"))
    table = pa.concat_tables(sorted(found, key=lambda one: one["key"][0].as_py()))
    table = table.filter(table["reason"].is_null())
    column = embedding_clusters(scores.unpack(table["ref_image"])).column
    keys = np.array(table["key"].to_pylist())
    return {name: keys[column.members[:, n]].tolist() for n, name in enumerate(column.names)}


@pytest.fixture
def settings(reference: Path) -> dict[str, Any]:
    return {**QUICK, "reference": str(reference)}


def copied(key: str) -> bool:
    return int(key) % 5 == 0


def keys_of(run: Path) -> list[str]:
    found: list[str] = chosen_by(run)["key"].to_pylist()
    return found


def members_of(run: Path) -> dict[str, list[int]]:
    """Group -> the numbers of its members in the pool, as the run has stored them."""
    certificate = certificate_of(run)
    table = pq.read_table(run / certificate["memberships"]["file"])
    numbers = (table["shard"].to_numpy() * 40 + table["row"].to_numpy()).tolist()
    facts = scores.read_facts(run / certificate["memberships"]["file"])
    return {
        name: [n for n, inside in zip(numbers, table[str(at)].to_pylist(), strict=True) if inside]
        for at, name in enumerate(facts["groups"])
    }


def test_copies_are_drawn_within_their_bounds_and_over_a_resume(
    shards: list[Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    """A fifth of the pool has a copy; with a floor of three quarters so many are drawn, and a resumed run has them."""
    path = write_policy(tmp_path / "p.yaml", {"near-duplicates": COPIES})
    train(shards, tmp_path / "plain", **settings)
    train(shards, tmp_path / "whole", policy=path, **settings)
    assert sum(map(copied, keys_of(tmp_path / "plain"))) < 18 <= sum(map(copied, keys_of(tmp_path / "whole")))
    assert members_of(tmp_path / "whole") == {"near-duplicates=2 copies": list(range(0, N, 5))}
    [row] = certificate_of(tmp_path / "whole")["groups"]
    assert (row["C"], row["L"]) == (sum(map(copied, keys_of(tmp_path / "whole"))), 18)
    [column] = certificate_of(tmp_path / "whole")["columns"]
    assert "256-bit difference hashes" in column["provenance"]
    assert column["coverage"] == 1  # the torn image is no pair
    with pytest.raises(KeyboardInterrupt):
        train(shards, tmp_path / "parted", policy=path, progress=after(3, interrupt), **settings)
    train(shards, tmp_path / "parted", policy=path, **settings)
    assert keys_of(tmp_path / "parted") == keys_of(tmp_path / "whole")
    assert same(tmp_path / "whole", tmp_path / "parted")
    assert certificate_of(tmp_path / "whole") == certificate_of(tmp_path / "parted")


def test_clusters_are_those_of_all_the_pairs(
    shards: list[Path], settings: dict[str, Any], scored: Path, clusters: dict[str, list[str]], tmp_path: Path
) -> None:
    """Groups are those that faiss makes of the stored embeddings; every draw keeps to their bounds; `curate select` has
    the same members; and where the embeddings come from a cache the run is the same."""
    assert len(clusters) == default_clusters(N - 1) == 3
    small = min(clusters, key=lambda name: len(clusters[name]))
    large = max(clusters, key=lambda name: len(clusters[name]))
    asked = {small: {"min_share": 0.3}, large: {"max_ratio": 0.4}}
    path = write_policy(tmp_path / "p.yaml", {"embedding cluster": asked})
    train(shards, tmp_path / "run", policy=path, **settings)
    assert members_of(tmp_path / "run") == {
        f"embedding cluster={name}": [int(key) for key in clusters[name]] for name in (small, large)
    }
    chosen = keys_of(tmp_path / "run")
    low, high = (sum(key in clusters[name] for key in chosen) for name in (small, large))
    rows = certificate_of(tmp_path / "run")["groups"]
    assert [row["C"] for row in rows] == [low, high]
    assert low >= 8 == rows[0]["L"]  # 0.3 of 24, rounded up
    assert high <= rows[1]["V"]
    assert certificate_of(tmp_path / "run")["draws_with_conflict"] == 0
    curate.select(scored, to=tmp_path / "drawn", policy=path, super_batch=60, engine="inline")
    [stored] = (tmp_path / "drawn/_curate/policy").glob("*.parquet")
    table = pq.read_table(stored).sort_by([("shard", "ascending"), ("row", "ascending")])
    ours = pq.read_table(tmp_path / "run" / certificate_of(tmp_path / "run")["memberships"]["file"])
    assert [table[name].to_pylist() for name in "01"] == [ours[name].to_pylist() for name in "01"]
    train(shards, tmp_path / "cached", policy=path, reference_cache=scored, **settings)
    assert keys_of(tmp_path / "cached") == chosen
    assert not (tmp_path / "cached/_curate/reference").exists()


def test_what_the_reference_could_not_read_is_not_known(
    shards: list[Path], settings: dict[str, Any], clusters: dict[str, list[str]], tmp_path: Path
) -> None:
    """Where images are decoded step by step a torn one is a pair until it is read: no group has it."""
    asked = {name: {"min_share": 0} for name in clusters}
    path = write_policy(tmp_path / "p.yaml", {"near-duplicates": COPIES, "embedding cluster": asked})
    train(shards, tmp_path / "run", policy=path, **settings | {"memory_gb": 1e-9})
    assert members_of(tmp_path / "run") == {"near-duplicates=2 copies": list(range(0, N, 5))} | {
        f"embedding cluster={name}": [int(key) for key in keys] for name, keys in clusters.items()
    }
    coverage = [column["coverage"] for column in certificate_of(tmp_path / "run")["columns"]]
    assert coverage == pytest.approx([(N - 1) / N] * 2)
    assert sum(map(copied, keys_of(tmp_path / "run"))) >= 18


def test_a_reference_may_group_without_being_weighed(
    shards: list[Path], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Uniform draws keep the floor, too, and so do the shards; the reference's pass is on the bill."""
    path = write_policy(tmp_path / "p.yaml", {"near-duplicates": COPIES})
    train(shards, tmp_path / "run", policy=path, write_shards=tmp_path / "teed", **settings | {"criterion": "uniform"})
    assert curate.verify(tmp_path / "teed").ok
    assert sum(map(copied, keys_of(tmp_path / "run"))) >= 18
    ledger = json.loads((tmp_path / "run/training.json").read_text())["ledger"]
    assert ledger["reference"]["samples"] == N - 1
    train(shards, tmp_path / "plain", **settings | {"criterion": "uniform"})
    record = json.loads((tmp_path / "plain/_curate/TRAIN.json").read_text())
    assert record["models"] == {}  # without such a policy nobody asks it


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"near-duplicates": {"2 copie": {"min_ratio": 1}}}, r"p\.yaml:8: .*called '2 copie'; did you mean '2 copies'"),
        ({"embedding cluster": {"cluster 3": {"min_ratio": 1}}}, r"p\.yaml:8: .*is called 'cluster 3'; did you mean"),
        ({"near-duplicates": COPIES, "genre": {"x": {"min_ratio": 1}}},
         r"p\.yaml:9: columns\.1\.column: no column is called 'genre'"),
        ({"near-duplicates": COPIES, "caption script": {"Lattin": {"min_ratio": 1}}},
         r"p\.yaml:11: .*called 'Lattin'; did you mean 'Latin'"),
    ],
)  # fmt: skip
def test_what_needs_no_scores_is_refused_before_any(
    columns: dict[str, Asked], message: str, shards: list[Path], settings: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Names of groups and of columns are held against captions, json and the number of pairs; no run stays behind."""
    monkeypatch.setattr(reference_pass, "score", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(UsageError, match=message):
        train(shards, tmp_path / "run", policy=write_policy(tmp_path / "p.yaml", columns), **settings)
    assert not (tmp_path / "run/_curate").exists()


def test_without_a_reference_it_is_refused_before_a_shard_is_opened(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The column is named, and what can be done instead: with an audit's groups as labels the draws keep to them."""
    monkeypatch.setattr("curate.pipelines.training.open_pairs", lambda *_, **__: pytest.fail("opened"))
    path = write_policy(tmp_path / "p.yaml", {"near-duplicates": COPIES})
    plain = {**QUICK, "criterion": "hard-learner"}
    with pytest.raises(UsageError, match=r"p\.yaml:6: columns\.0\.column: 'near-duplicates' is made of hashes.*labels"):
        train(shards, tmp_path / "run", policy=path, **plain)
    assert not (tmp_path / "run").exists()


def test_an_audit_s_groups_are_labels_where_there_is_no_reference(
    shards: list[Path], scored: Path, tmp_path: Path
) -> None:
    """assignments.parquet of an audit of the same shards, joined on sample_id."""
    out = shutil.copytree(scored, tmp_path / "scored")
    curate.select(out, keep=0.2, super_batch=60, engine="inline")
    curate.audit(out, to=tmp_path / "audit", engine="inline")
    [labels] = (tmp_path / "audit").rglob("assignments.parquet")
    path = write_policy(tmp_path / "p.yaml", {"near-duplicates": COPIES})
    given = {"policy": path, "labels": labels, "on": "sample_id"}
    train(shards, tmp_path / "run", **given, **{**QUICK, "criterion": "hard-learner"})
    assert sum(map(copied, keys_of(tmp_path / "run"))) >= 18


def test_scores_outlive_a_policy_that_they_refuse(
    shards: list[Path], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else of the run stays; a policy that can be met goes on with them, and another reference without them."""
    impossible = write_policy(tmp_path / "p.yaml", {"near-duplicates": {"2 copies": {"min_ratio": 6}}})
    with pytest.raises(UsageError, match=r"no selection can keep it: .*2 copies.*scores are kept in .*reference for"):
        train(shards, tmp_path / "run", policy=impossible, **settings)
    assert [path.name for path in (tmp_path / "run/_curate").iterdir()] == ["reference"]
    other = make_checkpoint(tmp_path / "other", "sigmoid", seed=3)
    shutil.copytree(tmp_path / "run", tmp_path / "stale")
    path = write_policy(tmp_path / "p.yaml", {"near-duplicates": COPIES})
    with monkeypatch.context() as patched:
        patched.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored again"))
        train(shards, tmp_path / "run", policy=path, **settings)
    train(shards, tmp_path / "fresh", policy=path, **settings)
    assert same(tmp_path / "run", tmp_path / "fresh")
    train(shards, tmp_path / "stale", policy=path, **settings | {"reference": str(other)})
    assert sum(map(copied, keys_of(tmp_path / "stale"))) >= 18


def test_an_earlier_run_outlives_a_policy_that_scores_refuse(
    shards: list[Path], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new run is scored beside it; one that can begin takes the scores along, and is as a fresh one."""
    run = train(shards, tmp_path / "run", **settings).path
    before = _bytes_of(run)
    impossible = write_policy(tmp_path / "p.yaml", {"near-duplicates": {"2 copies": {"min_ratio": 6}}})
    with pytest.raises(UsageError, match="no selection can keep it"):
        train(shards, run, policy=impossible, overwrite=True, **settings)
    assert _bytes_of(run) == before
    path = write_policy(tmp_path / "p.yaml", {"near-duplicates": COPIES})
    with monkeypatch.context() as patched:
        patched.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored again"))
        train(shards, run, policy=path, overwrite=True, **settings)
    train(shards, tmp_path / "fresh", policy=path, **settings)
    assert same(run, tmp_path / "fresh")
    assert certificate_of(run) == certificate_of(tmp_path / "fresh")
    assert not (run / "_curate/next").exists()
    assert (run / "_curate/reference/_curate/RUN.json").is_file()


def _bytes_of(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file() and "next" not in path.relative_to(run).parts]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}
