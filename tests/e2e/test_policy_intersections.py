"""A policy that bounds an intersection: drawn, certified, verified, audited and trained under it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import curate
from curate.cli import main
from curate.errors import UsageError
from curate.ledger import read_ledger
from tests.conftest import make_checkpoint
from tests.e2e.policies import HEAD, certificate_of, make_captioned_pool, score, write_labels
from tests.e2e.pools import check_run

INTERSECTION = """  - intersect: {names}
    source: captions and labels
    groups: [{{name: "{group}", {bounds}}}]
    overlapping: true
"""


def written(path: Path, group: str = "female & b", bounds: str = "min_share: 0.35", names: str = "gender,half") -> Path:
    path.write_text(HEAD + INTERSECTION.format(names=names, group=group, bounds=bounds))
    return path


def is_member(key: str) -> bool:
    """Captions of every third sample mention a woman; of all samples every second is labelled b."""
    return int(key) % 3 == 0 and int(key) % 2 == 1


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    make_captioned_pool(folder / "pool", lambda n: f"{('a woman', 'a man', 'a dog')[n % 3]} with number {n}")
    write_labels(folder / "labels.csv", {"half": lambda n: "ab"[n % 2]})
    written(folder / "p.yaml")
    return folder / "pool"


@pytest.fixture(scope="module")
def files(pool: Path) -> dict[str, Path]:
    return {"policy": pool.parent / "p.yaml", "labels": pool.parent / "labels.csv"}


@pytest.fixture(scope="module")
def ruled(pool: Path, files: dict[str, Path], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ruled")
    learner = make_checkpoint(folder / "learner", "sigmoid", seed=5)
    score(pool, folder / "out", tiny_checkpoint, learner=str(learner), **files)
    return folder / "out"


def counted(output: Path) -> Counter[str]:
    rows = read_ledger(output, ["key", "status"]).to_pylist()
    return Counter(row["status"] for row in rows if is_member(row["key"]))


def test_a_crossing_of_captions_and_labels_is_drawn_within_its_floor(ruled: Path) -> None:
    """A sixth of the pool is owed 35 % of what is drawn: counted from keys alone, and so says the certificate."""
    found = counted(ruled)
    [row] = certificate_of(ruled)["groups"]
    assert (row["group"], row["n"], row["C"], row["L"]) == ("gender & half=female & b", 20, found["kept"], 9)
    assert found["kept"] == 9
    assert certificate_of(ruled)["policy"]["columns"][0]["intersect"] == ["gender", "half"]
    [column] = certificate_of(ruled)["columns"]
    assert column["column"] == "gender & half"
    assert column["coverage"] == 1
    assert "; labels of labels.csv" in column["provenance"]
    check_run(ruled)
    assert curate.verify(ruled, load=False).ok
    assert "gender &amp; half" in (ruled / "README.md").read_text()


def test_an_audit_counts_the_same_crossing(
    ruled: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--policy` alone crosses the columns: the verdict, the table of groups and the sampler's certificate agree."""
    arguments = ["audit", str(ruled), "-o", str(tmp_path / "audit"), "--engine", "inline", "--json"]
    given = ["--policy", str(files["policy"]), "--labels", str(files["labels"])]
    for more in ([], ["--columns", "half"], ["--intersect", "half,gender"]):
        assert main([*arguments, *given, *more]) == 0
        said = json.loads(capsys.readouterr().out)
        [row] = said["verdict"]["groups"]
        assert (row["column"], row["group"], row["n"], row["chosen"]) == ("gender & half", "female & b", 20, 9)
        crossed = [column for column in said["audit"]["columns"] if column["kind"] == "intersection"]
        [name] = [column["name"] for column in crossed]
        assert name == ("half & gender" if "half,gender" in more else "gender & half")
        audited = {row["group"]: (row["pool"], row["selected"]) for row in crossed[0]["groups"]}
        assert audited[" & ".join(reversed(row["group"].split(" & "))) if "half,gender" in more else row["group"]] == (
            20,
            9,
        )
        [mine] = json.loads((tmp_path / "audit/certificate.json").read_text())["groups"]
        assert (mine["n"], mine["C"]) == (20, 9)


def test_stored_memberships_are_those_of_the_crossing(ruled: Path, tmp_path: Path) -> None:
    """`select` draws on without labels; a column of that very name in a label file is another thing."""
    copy = shutil.copytree(ruled, tmp_path / "out")
    curate.select(copy, keep=0.4, engine="inline")
    assert counted(copy)["kept"] == certificate_of(copy)["groups"][0]["C"] == 17
    labels = write_labels(tmp_path / "l.csv", {"half": lambda n: "ab"[n % 2], "gender & half": lambda _: "female & b"})
    result = curate.select(copy, engine="inline", policy=written(tmp_path / "p.yaml"), labels=labels, keep=0.2)
    assert [(row["n"], row["C"]) for row in result.certificate["groups"]] == [(20, 9)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"group": "female & c"}, "p.yaml:8: columns.0.groups.0: no group of gender & half is called 'female & c'"),
        ({"group": "b & female"}, "p.yaml:8: columns.0.groups.0: no group of gender & half is called 'b & female'"),
        ({"names": "gendre,half"}, "p.yaml:6: columns.0.intersect: no column is called 'gendre'; did you mean"),
        ({"bounds": "min_count: 25"}, "p.yaml:8: columns.0.groups.0.min_count: no selection can keep it: gender &"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(
    ruled: Path, files: dict[str, Path], tmp_path: Path, given: dict[str, str], said: str
) -> None:
    """A crossing that no sample is in, a column that is none, a count that is not there."""
    path = written(tmp_path / "p.yaml", **given)
    with pytest.raises(UsageError) as caught:
        curate.select(ruled, to=tmp_path / "out", engine="inline", policy=path, labels=files["labels"])
    assert said in str(caught.value)


def test_a_training_keeps_to_it(pool: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Every draw has its share of the crossing, and so say certificate and verdict."""
    from curate.pipelines.training import train

    settings: dict[str, Any] = {"model": "curate-tiny", "criterion": "uniform", "steps": 3, "batch": 20}
    result = train([pool], tmp_path / "run", engine="inline", filter_ratio=0.8, **settings, **files)
    assert result.certificate is not None
    [row] = result.certificate["groups"]
    assert (row["group"], row["C"], row["L"]) == ("gender & half=female & b", 21, 21)
    audit = curate.audit(tmp_path / "run", engine="inline", to=tmp_path / "audit", **files)
    assert [(one.draws, one.result) for one in audit.verdict.groups] == [(21, "passed")]
