"""Labels of a pool joined to what was selected from it: by what the samples were called there, or not at all.

`curate score` and `train --write-shards` give samples new keys of nine digits, which may be those of other samples.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate
from curate.auditing.labels import join_labels
from curate.auditing.renamed import with_originals
from curate.errors import UsageError
from curate.models import configs
from tests.conftest import MINI
from tests.making import make_samples, make_tar

POLICY = """\
schema: 1
author: A. Expert
date: 2026-11-20
rationale: few of them are there
columns:
  - column: side
    source: labels by hand
    groups:
      - name: few
        min_share: 0.2
"""


def side_of(number: int) -> str:
    return "few" if number % 4 == 3 else "many"


def pool_of(folder: Path, name: str, *, uids: bool = False) -> Path:
    """Two shards of 20 pairs; sample 7 has the key that `name` gives it, such as "img-{}"."""
    folder.mkdir()
    for shard in range(2):
        samples = make_samples(20, seed=0, start=20 * shard)
        named = [(name.format(key), dict(parts)) for key, parts in samples]
        if uids:
            for key, parts in named:
                parts["json"] = json.dumps({"uid": uid_of(key)}).encode()
        make_tar(folder / f"{shard}.tar", named)
    return folder


def uid_of(key: str) -> str:
    return hashlib.md5(key.encode()).hexdigest()


def labels_of(path: Path, column: str, names: list[str]) -> Path:
    """A file with the side of each pair of the pool in order, by `column`."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column, "side"])
        writer.writerows([name, side_of(number)] for number, name in enumerate(names))
    return path


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Half of a pool whose keys could be no one else's."""
    root = tmp_path_factory.mktemp("selected")
    return select(pool_of(root / "pool", "img-{}"), root / "out", tiny_checkpoint)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Half of a pool whose keys have nine digits, as those of the output."""
    root = tmp_path_factory.mktemp("digits")
    return select(pool_of(root / "pool", "{}", uids=True), root / "out", tiny_checkpoint)


def select(pool: Path, output: Path, reference: Path, **options: Any) -> Path:
    drawn: dict[str, Any] = {"keep": 0.5, "chunks": 2, "deduplicate": "off", "criterion": "easy-reference"}
    curate.score(pool, output, reference=str(reference), engine="inline", tolerance=1.0, **drawn, **options)
    return output


def img_keys() -> list[str]:
    return [f"img-{number:09d}" for number in range(40)]


def sides(output: Path) -> list[str]:
    """The sides of the samples of an output, in its order, from the captions."""
    texts = [row["caption"] for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [side_of(int(text.rpartition(" ")[2])) for text in texts]


def rows_of(output: Path) -> pa.Table:
    """The samples of an output as a pool of its own."""
    paths = sorted(output.glob("*.parquet"))
    tables = [pq.read_table(path, columns=["key", "uid"]) for path in paths]
    numbered = [
        table.append_column("shard", pa.array([n] * len(table), pa.int32()))
        .append_column("sample_id", pa.array([bytes([n, row]) * 8 for row in range(len(table))], pa.binary(16)))
        for n, table in enumerate(tables)
    ]  # fmt: skip
    return with_originals(pa.concat_tables(numbered), [str(path.with_suffix(".tar")) for path in paths])


def joined(file: Path, output: Path, on: str) -> list[str | None]:
    """The side of each sample of an output by a label file."""
    (column,) = join_labels(file, rows_of(output), on=on).columns
    return [column.names[code] if code >= 0 else None for code in column.codes_N.tolist()]


def test_labels_follow_the_original_key(selected: Path, tmp_path: Path) -> None:
    """A file by the pool's keys gives each selected sample its own label, and its provenance says how."""
    file = labels_of(tmp_path / "labels.csv", "key", img_keys())
    assert joined(file, selected, "key") == sides(selected)
    assert "before they were selected" in str(join_labels(file, rows_of(selected), on="key").match)


def test_labels_by_the_new_key_are_joined_as_they_are(selected: Path, tmp_path: Path) -> None:
    """A file that was made for the written shards has their keys, and none that the samples had before."""
    keys = rows_of(selected)["key"].to_pylist()
    file = labels_of(tmp_path / "labels.csv", "key", keys)
    assert joined(file, selected, "key") == [side_of(number) for number in range(20)]
    assert "before they were selected" not in str(join_labels(file, rows_of(selected), on="key").match)


def test_keys_that_may_be_either_are_refused(digits: Path, tmp_path: Path) -> None:
    """Nine digits on both sides: the same file by uid is joined, by key it is refused with that advice."""
    keys = [f"{number:09d}" for number in range(40)]
    wrong = labels_of(tmp_path / "labels.csv", "key", keys)
    with pytest.raises(UsageError, match=r"gave their samples new keys; \d+ of them are in the file, and 20 .* on uid"):
        joined(wrong, digits, "key")
    right = labels_of(tmp_path / "uids.csv", "uid", [uid_of(key) for key in keys])
    assert joined(right, digits, "uid") == sides(digits)


def test_sample_ids_of_the_pool_are_followed(digits: Path, tmp_path: Path) -> None:
    """Ids stand for bytes and place: those of the pool name the samples that were selected."""
    ledger = [row for path in sorted((digits / "_curate/ledger").glob("?????.parquet"))
              for row in pq.read_table(path).to_pylist()]  # fmt: skip
    file = labels_of(tmp_path / "labels.csv", "sample_id", [row["sample_id"].hex() for row in ledger])
    assert joined(file, digits, "sample_id") == sides(digits)


def test_a_sample_written_several_times_is_one_sample(selected: Path, tmp_path: Path) -> None:
    """As after `train --write-shards`: copies share an original key and id. Others with the key are refused still."""
    rows = rows_of(selected).slice(0, 3)
    file = labels_of(tmp_path / "labels.csv", "key", img_keys())
    twice = pa.concat_tables([rows, rows.set_column(0, "key", pa.array(["000099997", "000099998", "000099999"]))])
    assert join_labels(file, twice, on="key").match.pool_matched == 6
    ids = pa.array([bytes([n]) * 16 for n in range(6)], pa.binary(16))
    other = twice.drop_columns(["original_id"]).append_column("original_id", ids)
    with pytest.raises(UsageError, match="3 samples of the pool have a key that an earlier one has too"):
        join_labels(file, other, on="key")


def test_shards_without_a_sidecar_have_the_names_they_have(selected: Path, tmp_path: Path) -> None:
    """No sidecar, somebody else's or a broken one: rows come back as they were; part of the shards may have one."""
    rows = rows_of(selected).select(["key", "uid", "shard", "sample_id"])
    for content in (None, b"nothing", "table"):
        folder = tmp_path / str(content)
        folder.mkdir()
        if isinstance(content, bytes):
            (folder / "0.parquet").write_bytes(content)
        if content == "table":
            pq.write_table(pa.table({"key": ["a"]}), folder / "0.parquet")
        assert with_originals(rows, [str(folder / "0.tar")]).column_names == rows.column_names
    stem = sorted(selected.glob("*.tar"))[0]
    found = with_originals(rows, [str(stem), "nowhere.tar"])
    assert found["original_key"].null_count == sum(shard != 0 for shard in rows["shard"].to_pylist())


def test_train_score_and_audit_follow_them(
    selected: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three verbs that take labels, over shards that were selected: the policy's group has its true members."""
    monkeypatch.setitem(configs.CONFIGS, "mini", MINI)
    labels, policy = labels_of(tmp_path / "labels.csv", "key", img_keys()), tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    few = sides(selected).count("few")
    shards = [str(path) for path in sorted(selected.glob("*.tar"))]
    trained = curate.train(
        shards, tmp_path / "run", model="mini", batch=4, steps=2, policy=policy, labels=labels, engine="inline"
    )
    log = (trained.path / "log.jsonl").read_text().splitlines()
    (told,) = (line for line in map(json.loads, log) if line["kind"] == "policy")
    assert told["members"] == {"side=few": few}
    select(selected, tmp_path / "again", tiny_checkpoint)
    found = curate.audit(tmp_path / "again", labels=labels, columns=["side"], engine="inline")
    assert any("before they were selected" in note for note in found.notes)
    scored = tmp_path / "scored"
    select(selected, scored, tiny_checkpoint, policy=policy, labels=labels)
    (members,) = (scored / "_curate/policy").glob("*.parquet")
    assert sum(pq.read_table(members).columns[3].to_pylist()) == few


def test_train_and_audit_refuse_keys_that_may_be_either(
    digits: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said with the fix, and a training is as if it had not begun."""
    monkeypatch.setitem(configs.CONFIGS, "mini", MINI)
    labels, policy = labels_of(tmp_path / "l.csv", "key", [f"{n:09d}" for n in range(40)]), tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    shards = [str(path) for path in digits.glob("*.tar")]
    settings: dict[str, Any] = {"model": "mini", "batch": 4, "steps": 2, "policy": policy, "engine": "inline"}
    with pytest.raises(UsageError, match="Join on uid"):
        curate.train(shards, tmp_path / "run", labels=labels, **settings)
    assert not (tmp_path / "run" / "log.jsonl").exists()
    select(digits, tmp_path / "again", tiny_checkpoint)
    with pytest.raises(UsageError, match="Join on uid"):
        curate.audit(tmp_path / "again", labels=labels, engine="inline")
    uids = labels_of(tmp_path / "uids.csv", "uid", [uid_of(f"{n:09d}") for n in range(40)])
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    curate.train(shards, tmp_path / "run", labels=uids, on="uid", **settings)
