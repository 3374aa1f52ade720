"""The count of planted noise before and after a selection."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from curate.demonstration.corpus import TRUTH_SCHEMA
from curate.demonstration.noise_table import ANY, area_under_curve, noise_table, noise_view
from curate.errors import VerificationError
from curate.ledger import LEDGER_SCHEMA

# fault, origin, status, similarity
SAMPLES: list[tuple[str | None, int, str, float | None]] = [
    (None, 0, "kept", 0.9),
    (None, 1, "kept", 0.8),
    (None, 2, "dropped", 0.3),
    ("near-duplicate", 0, "kept", 0.9),
    ("near-duplicate", 2, "kept", 0.7),
    ("mismatched-caption", 5, "dropped", 0.1),
    ("mismatched-caption", 6, "kept", 0.5),
    ("blurred-image", 7, "dropped", 0.2),
    ("missing-caption", 8, "quarantined", None),
]


def truth_and_ledger(samples: list[tuple[str | None, int, str, float | None]]) -> tuple[pa.Table, pa.Table]:
    truth: list[dict[str, Any]] = []
    ledger: list[dict[str, Any]] = []
    for i, (fault, origin, status, similarity) in enumerate(samples):
        row = {"ordinal": i, "key": f"k{i}"}
        group = "caption-de" if i == 1 else "caption-en"
        truth.append({**row, "shard": "00000.tar", "part": "pool", "fault": fault, "origin": origin, "group": group})
        place = {**row, "shard": "/data/pool/00000.tar", "sample_id": bytes(16)}
        ledger.append({**place, "status": status, "reference_similarity": similarity})
    return pa.Table.from_pylist(truth, TRUTH_SCHEMA), pa.Table.from_pylist(ledger, LEDGER_SCHEMA)


def test_counts_before_and_after() -> None:
    """A fault is counted among all samples before, among kept ones after."""
    row = noise_table(*truth_and_ledger(SAMPLES)).row("mismatched-caption")
    assert (row.before, row.before_of, row.after, row.after_of) == (2, 9, 1, 5)
    assert row.share_after == pytest.approx(0.2)


def test_a_copy_without_its_source_is_no_near_duplicate() -> None:
    """Of two copies kept, only the one whose source is kept too counts as redundant."""
    row = noise_table(*truth_and_ledger(SAMPLES)).row("near-duplicate")
    assert (row.before, row.after) == (2, 1)


def test_any_fault_and_groups_and_broken() -> None:
    """The last row sums the faults; groups and quarantined samples are counted beside it."""
    table = noise_table(*truth_and_ledger(SAMPLES))
    assert (table.row(ANY).before, table.row(ANY).after) == (5, 2)
    assert [(row.fault, row.before, row.after) for row in table.groups] == [("caption-de", 1, 1), ("caption-en", 8, 4)]
    assert (table.broken, table.broken_quarantined) == (1, 1)


def test_separation_is_the_area_under_the_curve() -> None:
    """Sound 0.9, 0.8, 0.3 against mismatched 0.1, 0.5: five of six pairs are in order."""
    assert noise_table(*truth_and_ledger(SAMPLES)).separation == pytest.approx(5 / 6)
    assert area_under_curve([3.0, 2.0], [1.0, 2.0]) == 0.875


def test_a_ledger_of_another_corpus_is_refused() -> None:
    """A ledger row whose key is not the truth's is an error that names the sample."""
    truth, ledger = truth_and_ledger(SAMPLES)
    with pytest.raises(VerificationError, match="k3"):
        noise_table(truth.filter(pa.array([i != 3 for i in range(9)])), ledger)


def test_nothing_kept_renders() -> None:
    """A selection that kept nothing gives shares of zero and a table that prints."""
    table = noise_table(*truth_and_ledger([(None, 0, "dropped", 0.1), ("blurred-image", 1, "dropped", 0.2)]))
    out = io.StringIO()
    Console(file=out, width=100).print(noise_view(table))
    assert table.row("blurred-image").share_after == 0.0
    assert "none left" in out.getvalue()
    assert table.separation is None


def test_the_view_shows_shares_and_change() -> None:
    """The printed row of a fault has both counts, both shares and the factor."""
    out = io.StringIO()
    Console(file=out, width=100).print(noise_view(noise_table(*truth_and_ledger(SAMPLES))))
    line = next(line for line in out.getvalue().splitlines() if "mismatched-caption" in line)
    assert line.split() == ["mismatched-caption", "2", "22.2%", "1", "20.0%", "1.1x", "less"]
