"""What a verb returns, and when a loss is no success."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from curate.errors import LossAboveTolerance
from curate.receipts import Receipt
from curate.results import RunResult, lost_shards, refuse_loss


def scored(shard: str, rows: int, reasons: dict[str, int], flaw: str | None = None) -> Receipt:
    facts: dict[str, Any] = {"shard": shard, "rows": rows, "reasons": reasons, "flaw": flaw}
    return Receipt(f"score-{shard}", "score", (), facts)


def test_a_shard_is_lost_above_its_tolerance() -> None:
    """Exactly the tolerance is accepted, one sample more is not, and the share is told."""
    receipts = [scored("a.tar", 100, {"image-empty": 5}), scored("b.tar", 100, {"image-empty": 4, "tar-truncated": 2})]
    assert lost_shards(receipts, 0.05) == ["b.tar (6.0% quarantined)"]
    assert lost_shards(receipts, 0.06) == []


def test_a_flaw_loses_an_unknown_part() -> None:
    """A cut shard is a loss at any tolerance but 1, since nobody knows how many samples it had."""
    receipts = [scored("a.tar", 100, {}, "tar-truncated at byte 512")]
    assert lost_shards(receipts, 0.99) == ["a.tar (0.0% quarantined, tar-truncated at byte 512)"]
    assert lost_shards(receipts, 1) == []


def test_an_empty_shard_is_no_loss() -> None:
    """Zero rows divide by nothing."""
    assert lost_shards([scored("a.tar", 0, {})], 0) == []


def test_the_refusal_names_three_shards_and_the_way_on() -> None:
    """The message has the number, the first three, where the samples are, and what to do; it ends with code 3."""
    refuse_loss([], 0.05, Path("out"))
    lost = [f"{number}.tar (50.0% quarantined)" for number in range(5)]
    with pytest.raises(LossAboveTolerance, match=r"^5 shards lost more than --tolerance 0\.05.*and 2 more") as caught:
        refuse_loss(lost, 0.05, Path("out"))
    message = str(caught.value)
    assert "2.tar" in message
    assert "3.tar" not in message
    assert "curate explain out KEY" in message
    assert "--tolerance 1" in message
    assert caught.value.exit_code == 3


def test_a_result_is_plain_json() -> None:
    """The result survives JSON with its counts, shards and command."""
    result = RunResult(Path("out"), {"in": 2, "kept": 1}, {"selected": 1}, ("00000.tar",), 1.23456, "python -m x")
    value = json.loads(json.dumps(result.as_json()))
    assert value["seconds"] == 1.235
    assert (value["output"], value["shards"], value["train_command"]) == ("out", ["00000.tar"], "python -m x")
