"""`curate score` under a policy on json fields: a slip is told before any model runs, and leaves the place free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

import curate
from curate.errors import UsageError
from curate.pipelines import passes, policing, traits
from tests.e2e.policies import certificate_of, score, write_policy
from tests.e2e.pools import published
from tests.making import make_samples, make_tar

Give = Callable[[str], Path]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with a json; `late` is a field of the last ten samples of the last shard alone."""
    folder = tmp_path_factory.mktemp("pool")
    for shard in range(3):
        pairs = []
        for key, parts in make_samples(40, seed=100 * shard, start=40 * shard):
            record = {"genre": "ab"[int(key) % 2], "license": "cc"} | ({"late": "yes"} if int(key) >= 110 else {})
            pairs.append((key, {**parts, "json": json.dumps(record).encode()}))
        make_tar(folder / f"{shard:05d}.tar", pairs)
    return folder


@pytest.fixture
def give(tmp_path: Path) -> Give:
    """A policy on one column."""

    def write(column: str) -> Path:
        group = "yes" if column == "late" else "a"
        return write_policy(tmp_path / "p.yaml", {column: {group: {"min_share": 0.3}}})

    return write


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored"))


@pytest.mark.usefixtures("unscored")
def test_a_slip_in_a_field_is_told_before_any_model_runs(
    pool: Path, tiny_checkpoint: Path, give: Give, tmp_path: Path
) -> None:
    """Line, nearest field and all fields are named; nothing stays behind, whatever else lies in the directory."""
    message = r"p\.yaml:6: .*no column is called 'genere'; did you mean 'genre'\? \(the samples' json has genre, "
    with pytest.raises(UsageError, match=message + r"license, late\)"):
        score(pool, tmp_path / "out", tiny_checkpoint, policy=give("genere"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept/_curate/audit").mkdir(parents=True)
    with pytest.raises(UsageError, match=message):
        score(pool, tmp_path / "kept", tiny_checkpoint, policy=give("genere"))
    assert [path.name for path in (tmp_path / "kept/_curate").iterdir()] == ["audit"]


def test_the_mended_command_follows_in_its_place(pool: Path, tiny_checkpoint: Path, give: Give, tmp_path: Path) -> None:
    """After a refusal the run is that of a directory that nothing was in."""
    with pytest.raises(UsageError, match="genere"):
        score(pool, tmp_path / "out", tiny_checkpoint, policy=give("genere"))
    for name in ("out", "fresh"):
        score(pool, tmp_path / name, tiny_checkpoint, policy=give("genre"))
    assert published(tmp_path / "out") == published(tmp_path / "fresh")


def test_a_field_of_the_last_samples_alone_is_none_that_is_missing(
    pool: Path, tiny_checkpoint: Path, give: Give, tmp_path: Path
) -> None:
    """Ten of the last shard's samples have it: the run goes through, and captions were read in one pass, before."""
    order = Mock()
    with (
        patch.object(policing, "traits_pass", Mock(wraps=policing.traits_pass)) as read,
        patch.object(passes, "score_pass", Mock(wraps=passes.score_pass)) as scored,
        patch.object(traits, "_row", Mock(wraps=traits._row)) as rows,
    ):
        order.attach_mock(read, "read")
        order.attach_mock(scored, "scored")
        score(pool, tmp_path / "out", tiny_checkpoint, policy=give("late"))
    assert [name for name, *_ in order.mock_calls] == ["read", "scored", "read"]
    assert rows.call_count == 120  # found by the second call, not read again
    [row] = certificate_of(tmp_path / "out")["groups"]
    assert (row["n"], row["C"]) == (10, 8)  # 0.3 of 24, rounded up


def test_an_earlier_run_is_as_it_was(
    pool: Path, tiny_checkpoint: Path, give: Give, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --overwrite nothing of the refused run stays beside it; scores that an earlier refusal left there do."""
    score(pool, tmp_path / "out", tiny_checkpoint)
    before = _everything(tmp_path / "out")
    options: dict[str, Any] = {"overwrite": True, "seed": 3}
    with monkeypatch.context() as patched:
        patched.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored"))
        with pytest.raises(UsageError, match=r"'genere'.*\. The earlier run in .* is as it was$"):
            score(pool, tmp_path / "out", tiny_checkpoint, policy=give("genere"), **options)
    assert _everything(tmp_path / "out") == before
    impossible = write_policy(tmp_path / "p.yaml", {"genre": {"a": {"min_count": 61}}})
    with pytest.raises(UsageError, match=r"no selection can keep it.*what was scored is kept in"):
        score(pool, tmp_path / "out", tiny_checkpoint, policy=impossible, keep=0.9, batch_size=32, **options)
    staged = _everything(tmp_path / "out")
    assert staged.keys() > before.keys()
    with pytest.raises(UsageError, match=r"'genere'.*what was scored is kept in"):
        score(pool, tmp_path / "out", tiny_checkpoint, policy=give("genere"), keep=0.9, batch_size=32, **options)
    tables = {name for name in staged if "/next/_curate/score/" in name}
    assert tables
    assert tables <= _everything(tmp_path / "out").keys()
    assert curate.verify(tmp_path / "out", load=False).ok


def _everything(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
