"""Ledger lookups, and the closed list of reasons."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import UsageError
from curate.ledger import LEDGER_SCHEMA, find_rows, ledger_files, read_ledger, status_of
from curate.reasons import DROPPED, KEPT, QUARANTINED, REASONS

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "curate").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])


def write(output: Path, shard: int, rows: list[dict[str, Any]]) -> None:
    folder = output / "_curate" / "ledger"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), folder / f"{shard:05d}.parquet")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two shards that share a key; sample n has id nn..nn and uid of 32 hex digits of its own."""
    first = [
        {"sample_id": bytes([n]) * 16, "ordinal": n, "key": f"key{n}", "uid": f"{n + 200:032x}", "out_key": None}
        for n in range(3)
    ]
    first[1]["out_key"] = "000000042"
    write(tmp_path, 0, first)
    write(tmp_path, 1, [{"sample_id": bytes([9]) * 16, "ordinal": 0, "key": "key1", "uid": None, "out_key": None}])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("key0", [0]),
        ("key1", [1, 9]),
        ("000000042", [1]),
        (f"{202:032x}", [2]),
        ("09" * 16, [9]),
        ("nobody", []),
        ("None", []),
        ("zz" * 16, []),
    ],
)
def test_a_sample_is_found_by_any_of_its_names(output: Path, name: str, found: list[int]) -> None:
    """Original key, output key, uid and sample id each find the rows they belong to, in the order of the shards."""
    assert [row["sample_id"][0] for row in find_rows(output, name)] == found


def test_files_come_in_the_order_of_the_shards(output: Path) -> None:
    """Shard 100000 comes after shard 99999, and files that are not published yet are passed over."""
    for shard in (100_000, 99_999):
        write(output, shard, [])
    (output / "_curate" / "ledger" / f"{'a' * 32}.parquet").touch()
    assert [file.stem for file in ledger_files(output)] == ["00000", "00001", "99999", "100000"]
    assert read_ledger(output, ["key"])["key"].to_pylist() == ["key0", "key1", "key2", "key1"]


def test_no_ledger_is_said(tmp_path: Path) -> None:
    """A directory without a ledger is a UsageError that says which verb makes one."""
    with pytest.raises(UsageError, match="no ledger there yet"):
        read_ledger(tmp_path)


def test_every_reason_has_one_status() -> None:
    """The three lists share no reason, and each reason belongs to the status of its list."""
    assert len(REASONS) == len(KEPT) + len(DROPPED) + len(QUARANTINED)
    for status, reasons in (("kept", KEPT), ("dropped", DROPPED), ("quarantined", QUARANTINED)):
        assert {status_of(reason) for reason in reasons} == {status}


def constants(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def reasons_given(tree: ast.AST) -> list[str]:
    """String constants that stand where a reason stands: what is raised, returned, assigned or passed as one."""
    given: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"ImageRejected", "Flaw"}:
            given += [text for argument in node.args[:1] for text in constants(argument)]
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Sample" and len(node.args) > 1:
            given += constants(node.args[1])
        if isinstance(node, ast.keyword) and node.arg == "reason":
            given += constants(node.value)
        if isinstance(node, ast.Assign) and any("reason" in ast.unparse(target) for target in node.targets):
            given += constants(node.value) if isinstance(node.value, ast.Constant) else []
    return given


def test_every_reason_in_the_source_is_listed() -> None:
    """No module gives a reason that `curate.reasons` does not list, and a listed one is given somewhere."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCES if path.name != "reasons.py"}
    for path, tree in trees.items():
        unknown = {reason for reason in reasons_given(tree) if reason and reason not in REASONS}
        assert not unknown, f"{path.relative_to(ROOT)} gives {unknown}"
    written = {text for tree in trees.values() for text in constants(tree)}
    assert set(REASONS) <= written


def test_the_scan_would_find_an_unlisted_reason() -> None:
    """A reason that is raised, passed by name or assigned is seen by the scan."""
    source = (
        "raise ImageRejected('image-odd', 'x')\nFlaw(reason='tar-odd')\nreason_B[row] = 'drop-odd'\nSample(e, 'r', '')"
    )
    assert set(reasons_given(ast.parse(source))) == {"image-odd", "tar-odd", "drop-odd", "r"}
