"""Units and receipts on a sound disk; crashes and two writers are in tests/fault/test_commit_protocol.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from curate.errors import StorageError
from curate.receipts import Attempt, Output, Receipt, Store, Unit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.of(tmp_path / "out")
    store.prepare()
    return store


def produce(attempt: Attempt) -> dict[str, Any]:
    with attempt.open(".tar", published="00000.tar") as file:
        file.write(b"shard")
    with attempt.open(".json") as file:
        file.write(b"{}")
    return {"samples": 1}


def test_a_unit_is_named_by_what_it_depends_on() -> None:
    """Equal inputs give equal ids whatever their order; any other input or stage gives another."""
    unit = Unit("score", {"a": 1, "b": [2]})
    assert unit.id == Unit("score", {"b": [2], "a": 1}).id
    assert len({unit.id, Unit("score", {"a": 1, "b": [3]}).id, Unit("ledger", {"a": 1, "b": [2]}).id}) == 3
    assert unit.id.startswith("score-")


def test_a_receipt_survives_json() -> None:
    """A receipt is what its JSON says, and JSON of an unknown shape is refused."""
    receipt = Receipt("u", "score", (Output("score/a.parquet", "ab", 3), Output("b", "c", 0, "00000.tar")), {"rows": 2})
    assert Receipt.from_json(json.loads(json.dumps(receipt.as_json()))) == receipt
    with pytest.raises(TypeError):
        Receipt.from_json(receipt.as_json() | {"outputs": [{"path": "x", "colour": "red"}]})


def test_committing_twice_produces_once(store: Store) -> None:
    """The second commit of a unit returns the receipt without running it."""
    unit = Unit("shards", {})
    first = store.commit(unit, produce)
    assert store.commit(unit, lambda _: pytest.fail("produced again")) == first
    assert first.facts == {"samples": 1}
    assert [output.size for output in first.outputs] == [5, 2]
    assert not list((store.root / "attempts").iterdir())


def test_names_are_made_of_content(store: Store) -> None:
    """A file's name under its stage is the beginning of its sha256, so that equal attempts meet."""
    receipt = store.commit(Unit("shards", {}), produce)
    for output in receipt.outputs:
        assert Path(output.path).stem == output.sha256[:32]
        assert (store.root / output.path).stat().st_size == output.size


def test_publishing_gives_the_user_their_names(store: Store) -> None:
    """Only outputs with a published name appear in OUT; doing it twice changes nothing."""
    receipt = store.commit(Unit("shards", {}), produce)
    for _ in range(2):
        store.publish_outputs(receipt)
        assert [path.name for path in store.root.parent.iterdir() if path.is_file()] == ["00000.tar"]


def test_a_published_file_may_stand_for_a_collected_one(store: Store) -> None:
    """After the content-addressed name is collected the published one keeps the receipt valid."""
    unit = Unit("shards", {})
    receipt = store.commit(unit, produce)
    store.publish_outputs(receipt)
    (store.root / receipt.outputs[0].path).unlink()
    assert store.read(unit) == receipt
    store.publish_outputs(receipt)
    assert store.locate(receipt.outputs[0]) == store.root.parent / "00000.tar"


def test_publishing_what_is_gone_is_said(store: Store) -> None:
    """A file that vanished between the passes and the end stops the run instead of leaving a hole."""
    receipt = store.commit(Unit("shards", {}), produce)
    (store.root / receipt.outputs[0].path).unlink()
    with pytest.raises(StorageError, match="is gone; run the same command again"):
        store.publish_outputs(receipt)


def test_a_unit_that_fails_leaves_nothing(store: Store) -> None:
    """An exception inside a unit, an interruption included, removes its attempt and writes no receipt."""
    for error in (ValueError, KeyboardInterrupt):

        def fail(attempt: Attempt, error: type[BaseException] = error) -> dict[str, Any]:
            with attempt.open(".tar") as file:
                file.write(b"half")
                raise error

        with pytest.raises(error):
            store.commit(Unit("shards", {}), fail)
        assert not list((store.root / "attempts").iterdir())
        assert not list((store.root / "commits").iterdir())


def test_receipts_of_a_stage_come_in_order_without_the_unreadable(store: Store) -> None:
    """`receipts` yields one stage, sorted by unit, and passes over what cannot be read."""
    made = [store.commit(Unit("shards", {"number": number}), produce) for number in range(5)]
    store.commit(Unit("ledger", {}), lambda _: {})
    store.receipt_path("shards-cut").write_bytes(b'{"unit": "sh')
    assert list(store.receipts("shards")) == sorted(made, key=lambda receipt: receipt.unit)


def test_a_file_gone_for_no_reason_is_an_error(store: Store) -> None:
    """A missing input of a unit is raised, not taken for another driver's collection."""
    with pytest.raises(FileNotFoundError):
        store.commit(Unit("shards", {}), lambda _: {"size": Path("/nowhere/at/all").stat().st_size})
