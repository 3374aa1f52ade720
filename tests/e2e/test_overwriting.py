"""`--overwrite`: an earlier run is there, whole, until the run in its place can be drawn."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

import curate
from curate.errors import RunMismatch, UsageError
from curate.pipelines import overwriting
from tests.e2e.policies import make_captioned_pool, score, write_labels, write_policy
from tests.e2e.pools import check_run, published

NOBODY_KEEPS_IT = "no selection can keep it: half=b at least 31 of 30"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    make_captioned_pool(folder / "pool", lambda n: f"a thing with number {n}")
    write_labels(folder / "labels.csv", {"half": lambda n: "ab"[n % 4 == 1]})
    return folder / "pool"


@pytest.fixture(scope="module")
def plain(pool: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "out"
    score(pool, output, tiny_checkpoint)
    return output


@pytest.fixture
def earlier(plain: Path, tmp_path: Path) -> Path:
    """A finished run that may be harmed."""
    return shutil.copytree(plain, tmp_path / "out")


def asking(pool: Path, folder: Path, bounds: dict[str, float]) -> dict[str, Path]:
    return {
        "policy": write_policy(folder / "p.yaml", {"half": {"b": bounds}}),
        "labels": pool.parent / "labels.csv",
    }


def everything(output: Path) -> dict[str, str]:
    """sha256 of every file but those of a run that was to take its place."""
    files = [path for path in output.rglob("*") if path.is_file() and "next" not in path.relative_to(output).parts]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_policy_that_turns_out_impossible_costs_nothing(
    pool: Path, earlier: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused after scoring, the earlier run has all its bytes; the next policy is drawn from the scores made then."""
    before = everything(earlier)
    given = asking(pool, tmp_path, {"min_count": 31})
    with pytest.raises(UsageError, match=rf"min_count: {NOBODY_KEEPS_IT}.*The earlier run in .* is as it was"):
        score(pool, earlier, tiny_checkpoint, overwrite=True, keep=0.5, batch_size=32, **given)
    assert everything(earlier) == before
    assert curate.verify(earlier, load=False).ok
    monkeypatch.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored again"))
    given = asking(pool, tmp_path, {"min_count": 20})
    result = score(pool, earlier, tiny_checkpoint, overwrite=True, keep=0.5, batch_size=32, **given)
    monkeypatch.undo()
    assert result.certificate["groups"][0]["C"] >= 20
    score(pool, tmp_path / "fresh", tiny_checkpoint, keep=0.5, batch_size=32, **given)
    assert published(earlier) == published(tmp_path / "fresh")
    assert sorted(path.name for path in (earlier / "_curate").iterdir()) == sorted(
        path.name for path in (tmp_path / "fresh/_curate").iterdir()
    )
    check_run(earlier)


def test_what_can_be_known_is_refused_before_anything_is_scored(
    pool: Path, earlier: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field, a group and a column of the labels that are not there: nothing is scored, and no file appears."""
    before = everything(earlier)
    monkeypatch.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored"))
    labels = pool.parent / "labels.csv"
    for groups, message in (
        ({"b": {"min_cuont": 1}}, "did you mean 'min_count'"),
        ({"c": {"min_count": 1}}, "no group of half is called 'c'"),
    ):
        path = write_policy(tmp_path / "p.yaml", {"half": groups})
        with pytest.raises(UsageError, match=message):
            score(pool, earlier, tiny_checkpoint, overwrite=True, policy=path, labels=labels)
    path = write_policy(tmp_path / "p.yaml", {"half": {"b": {"min_count": 1}}})
    for lines, message in (
        ("id,half\n", "no column 'key'"),
        ("key,half\n0,a\n0,b\n", "repeat a key with other labels"),
    ):
        (tmp_path / "l.csv").write_text(lines)
        with pytest.raises(UsageError, match=message):
            score(pool, earlier, tiny_checkpoint, overwrite=True, policy=path, labels=tmp_path / "l.csv")
    assert everything(earlier) == before
    assert not (earlier / "_curate/next").exists()


@pytest.mark.parametrize("moment", ["reopen", "repin_run", "_take_scores"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_killed_while_it_takes_the_place(
    pool: Path, earlier: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str,
    overwrite: bool,
) -> None:  # fmt: skip
    """Between the runs there is no SUCCESS; the same command makes what a fresh run makes, without a second scoring."""
    where: Any = overwriting.finishing if moment == "reopen" else overwriting
    options: dict[str, Any] = {"keep": 0.5, "seed": 3}
    with monkeypatch.context() as killed:
        if moment == "repin_run":
            killed.setattr(where, moment, _second_time(getattr(where, moment)))
        else:
            killed.setattr(where, moment, _die)
        with pytest.raises(_Killed):
            score(pool, earlier, tiny_checkpoint, overwrite=True, **options)
    assert (earlier / "_curate/SUCCESS.json").exists() == (moment == "reopen")
    if not overwrite and moment != "_take_scores":
        with pytest.raises(RunMismatch, match="--overwrite"):
            score(pool, earlier, tiny_checkpoint, **options)
        return
    monkeypatch.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored again"))
    score(pool, earlier, tiny_checkpoint, overwrite=overwrite, **options)
    monkeypatch.undo()
    score(pool, tmp_path / "fresh", tiny_checkpoint, **options)
    assert published(earlier) == published(tmp_path / "fresh")
    assert not (earlier / "_curate/next").exists()


@pytest.mark.parametrize("name", ["out", "link"])
def test_its_own_shards_are_not_replaced(earlier: Path, tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    """What the earlier run wrote cannot make way for a run that reads it, by whichever name: nothing is touched."""
    (tmp_path / "link").symlink_to(earlier)
    before = everything(earlier)
    with pytest.raises(UsageError, match=r"--overwrite would remove .*out/00000\.tar, which this run needs"):
        score(tmp_path / name, earlier, tiny_checkpoint, overwrite=True, keep=0.5)
    assert everything(earlier) == before


def test_scores_of_other_shards_are_not_gone_on_with(
    pool: Path, earlier: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """What a refused call left of the whole pool is removed by a call over a part of it."""
    given = asking(pool, tmp_path, {"min_count": 31})
    with pytest.raises(UsageError, match=NOBODY_KEEPS_IT):
        score(pool, earlier, tiny_checkpoint, overwrite=True, **given)
    shards = sorted(pool.glob("*.tar"))[:2]
    settings: dict[str, Any] = {"engine": "inline", "super_batch": 50, "chunks": 4, "samples_per_shard": 10}
    curate.score(shards, earlier, reference=str(tiny_checkpoint), overwrite=True, **settings)
    curate.score(shards, tmp_path / "fresh", reference=str(tiny_checkpoint), **settings)
    assert published(earlier) == published(tmp_path / "fresh")


def test_select_leaves_the_earlier_selection_too(pool: Path, earlier: Path, tmp_path: Path) -> None:
    """A policy that `select` refuses, in place or into another run's directory, takes no published byte back."""
    other = shutil.copytree(earlier, tmp_path / "other")
    before = published(earlier)
    for to in (None, other):
        with pytest.raises(UsageError, match=NOBODY_KEEPS_IT):
            curate.select(earlier, to=to, engine="inline", **asking(pool, tmp_path, {"min_count": 31}))
        for output in (earlier, other):
            assert published(output) == before
            assert curate.verify(output, load=False).ok


class _Killed(BaseException):
    """Nothing catches it, as nothing catches a signal."""


def _die(*_: Any, **__: Any) -> None:
    raise _Killed


def _second_time(function: Any) -> Any:
    """The function, and the second time death instead."""
    calls: list[int] = []

    def called(*given: Any) -> Any:
        calls.append(1)
        return function(*given) if len(calls) == 1 else _die()

    return called
