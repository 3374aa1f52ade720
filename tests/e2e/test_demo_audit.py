"""The demonstration audited: the planted group is found and nothing else, and a policy repairs it at a small price."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import curate
from curate.demonstration.corpus import draw_corpus
from curate.pipelines.demonstration_audit import COLUMN, PLANTED, audit_and_repair

QUIET: dict[str, Any] = {"seed": 0, "workers": None, "quiet": True}


@pytest.mark.slow
def test_the_planted_group_is_found_and_repaired(tmp_path: Path) -> None:
    """Of 39 groups the audit finds the one that is treated unevenly; under the policy it finds none."""
    corpus = draw_corpus(tmp_path / "corpus", samples=4000, shards=4, clean_reference=1500)
    reference = curate.train(corpus.reference, tmp_path / "reference", model="curate-tiny", steps=120)
    curate.score(
        corpus.pool, tmp_path / "out", reference=f"local-dir:{reference.path}", super_batch=4000, deduplicate="near"
    )
    repair = audit_and_repair(corpus, tmp_path / "out", tmp_path, **QUIET)
    assert repair is not None
    assert repair.found_it_only, repair.left_out
    assert repair.left_out_after == ()
    assert (repair.before.verdict, repair.after.verdict) == ("violated", "passed")
    assert repair.before.ratio is not None
    assert repair.after.ratio is not None
    assert repair.before.ratio[2] < 0.8 < repair.after.ratio[0]
    assert repair.given_up is not None
    assert abs(repair.given_up) < 0.05  # a draw is random: it may happen to score higher
    assert f"{COLUMN}: {PLANTED}" in repair.lines()[0]
    assert all(path.is_file() for path in repair.reports)


def test_a_corpus_without_the_group_is_not_audited(tmp_path: Path) -> None:
    """Forty pairs hold too few German captions to say anything, and the demonstration goes on without."""
    corpus = draw_corpus(tmp_path / "corpus", samples=40, shards=1, clean_reference=10)
    assert audit_and_repair(corpus, tmp_path / "out", tmp_path, **QUIET) is None
