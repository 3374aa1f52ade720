"""The figures of an audit: which there are, what they show first, and what they say of the rest."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from curate.auditing.audit import audit_columns
from curate.auditing.columns import Column, LabelError
from curate.auditing.membership import as_column, bins
from curate.auditing.outcome import Audit
from curate.auditing.report.chosen import largest, left_out
from curate.auditing.report.figures import figures_of, title_of
from curate.errors import UsageError
from curate.reporting.page import Figure, Page, Section, render

FORBIDDEN = re.compile(r"\b(?:un)?(?:fair|biased|compliant|fine)\w*|no bias|discriminat|legal", re.IGNORECASE)
HOSTILE = "</title><script>alert(1)</script> & \u202e"


def planted(**given: Any) -> tuple[Audit, list[Column], np.ndarray[Any, Any]]:
    """Mentions with a planted ratio, 40 clusters with two, an intersection, losses, draws, words; and the scores."""
    random, N = np.random.default_rng(3), 12_000
    women, men, old = random.random(N) < 0.25, random.random(N) < 0.25, random.random(N) < 0.2
    cluster = random.integers(0, 40, N)
    chance = 0.2 * np.where(women, 0.6, 1) * np.isin(cluster, (3, 11), invert=True).clip(0.3)
    selected = random.random(N) < chance
    everyone = np.ones(N, bool)
    columns = [
        Column("gender", "mention", "a lexicon", ("women", "men"), members_NG=np.stack([women, men], 1),
               known_N=everyone, label_error=LabelError(0.9, 0.98)),
        Column("age", "mention", "a lexicon", ("old",), members_NG=old[:, None], known_N=everyone),
        Column("cluster", "cluster", "k-means", tuple(f"cluster {n}" for n in range(40)),
               codes_N=cluster.astype(np.int32)),
        as_column("tone", np.array(["dark", HOSTILE, None], dtype=object)[random.integers(0, 3, N)], N),
    ]  # fmt: skip
    learner = random.normal(2, 0.5, N) + 0.5 * (cluster == 5)
    reference = random.normal(1.5, 0.5, N) + 0.6 * (cluster == 5)
    audit = audit_columns(
        columns,
        selected,
        selected * random.integers(1, 4, N),
        None,
        {"caption length": bins(random.integers(3, 40, N), 4)},
        intersections=[("gender", "age")],
        learner_loss_N=learner,
        reference_loss_N=reference,
        score_N=learner - reference,
        sub_batch_N=random.integers(0, 30, N),
        concepts={"doctor": random.random(N) < 0.1},
        placebos=4,
        **given,
    )
    return audit, columns, learner - reference


@pytest.fixture(scope="module")
def whole() -> tuple[Audit, list[Column], np.ndarray[Any, Any]]:
    return planted()


@pytest.fixture(scope="module")
def sections(whole: tuple[Audit, list[Column], np.ndarray[Any, Any]]) -> tuple[Section, ...]:
    audit, columns, score_N = whole
    return figures_of(audit, score_N=score_N, members={one.name: one for one in columns})


def by_title(sections: tuple[Section, ...], section: str) -> dict[str, Figure]:
    (found,) = [one for one in sections if one.title == section]
    return {figure.chart.title: figure for figure in found.figures}


def names(figure: Figure) -> list[str]:
    nodes = ElementTree.fromstring(str(figure.chart.svg)).iter("text")
    return ["".join(node.itertext()) for node in nodes if "name" in node.get("class", "").split()]


def test_every_plot_of_the_specification_is_there(sections: tuple[Section, ...]) -> None:
    """The whole first, then each column in the audit's order, then losses and associations."""
    assert [one.title for one in sections] == [
        "The audit as a whole", "Caption mentions: gender", "Caption mentions: age", "Cluster", "tone",
        "Intersection: gender & age", "Losses behind the scores", "Associations",
    ]  # fmt: skip
    assert list(by_title(sections, "The audit as a whole")) == [
        "Flags, and what chance alone flags", "All groups: ratio and evidence", "How far the mix moved",
    ]  # fmt: skip
    usual = ["Kept, against the rest", "From the pool to the selection", "Scores by group",
             "Late against early sub-batches"]  # fmt: skip
    assert set(by_title(sections, "tone")) == set(usual)
    held = "Crude, and with confounders held equal"
    assert set(by_title(sections, "Caption mentions: gender")) == {*usual, held}
    assert set(by_title(sections, "Cluster")) == {*usual, held, "Ratio and evidence"}
    assert "Ratios where gender & age cross" in by_title(sections, "Intersection: gender & age")
    assert list(by_title(sections, "Losses behind the scores")) == ["Learner against reference"]
    assert len(by_title(sections, "Associations")) == 1


def test_captions_tell_how_to_read_and_judge_nothing(sections: tuple[Section, ...]) -> None:
    """Every figure has sentences beside it and words for those who cannot see it; no verdict is among them."""
    for section in sections:
        for figure in section.figures:
            assert len(figure.caption) > 60
            assert figure.caption.endswith(".")
            assert figure.chart.description.strip()
            told = f"{section.title} {section.text} {figure.chart.title} {figure.caption} {figure.chart.description}"
            assert not FORBIDDEN.search(told), told
            ElementTree.fromstring(str(figure.chart.svg))


def test_the_page_holds_no_markup_of_names(sections: tuple[Section, ...]) -> None:
    """A group named like a script is text wherever it is drawn, and the same audit gives the same bytes."""
    page = render(Page("t", "s", [], sections, "f"))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "\u202e" not in page
    assert page == render(Page("t", "s", [], sections, "f"))


def test_flagged_groups_come_first(
    whole: tuple[Audit, list[Column], np.ndarray[Any, Any]], sections: tuple[Section, ...]
) -> None:
    """The forest plot begins with the planted clusters and counts the others in words; its dumbbell keeps its order."""
    audit = whole[0]
    column = next(one for one in audit.columns if one.name == "cluster")
    figures = by_title(sections, "Cluster")
    forest, shares = figures["Kept, against the rest"], figures["From the pool to the selection"]
    flagged = [row.group for row in column.groups if row.flagged]
    assert set(names(forest)[: len(flagged)]) == set(flagged) >= {"cluster 3", "cluster 11"}
    assert names(forest) == names(shares)
    assert len(names(forest)) == 20
    assert "20 of 40 groups are drawn, flagged ones first, none of the others flagged." in forest.caption
    assert {"cluster 3", "cluster 11"} <= set(names(figures["Ratio and evidence"]))
    assert left_out(column, 1).startswith("1 of 40")
    assert f"{len(flagged) - 1} of the others flagged" in left_out(column, 1)


def test_numbers_are_those_of_the_audit(
    whole: tuple[Audit, list[Column], np.ndarray[Any, Any]], sections: tuple[Section, ...]
) -> None:
    """The words of the forest plot, the dumbbell and the placebo panel repeat the audit's figures."""
    audit = whole[0]
    row = audit.columns[0].groups[0]
    assert row.ratio is not None
    assert row.share_of_selected is not None
    figures = by_title(sections, "Caption mentions: gender")
    said = figures["Kept, against the rest"].chart.description
    assert f"women: {row.ratio.value:.2f} ({row.ratio.low:.2f}-{row.ratio.high:.2f})" in said
    moved = figures["From the pool to the selection"].chart.description
    assert f"women: {row.share_of_pool:.1%} to {row.share_of_selected:.1%}." in moved
    placebo = by_title(sections, "The audit as a whole")["Flags, and what chance alone flags"]
    assert f"this selection: {audit.flags}." in placebo.chart.description
    held = figures["Crude, and with confounders held equal"]
    assert "women: explained: no." in held.chart.description
    assert "with equal caption length" in held.chart.legend
    assert "stated errors put right" in held.chart.legend


def test_an_intersection_is_a_table_with_n(
    whole: tuple[Audit, list[Column], np.ndarray[Any, Any]], sections: tuple[Section, ...]
) -> None:
    """Every combination has its ratio and its n in a cell, in whatever direction the table lies."""
    audit = whole[0]
    heat = by_title(sections, "Intersection: gender & age")["Ratios where gender & age cross"]
    column = audit.columns[-1]
    written = ["".join(n.itertext()) for n in ElementTree.fromstring(str(heat.chart.svg)).iter("text")]
    for row in column.groups:
        assert row.ratio is not None
        assert f"{row.ratio.value:.2f}" in written
        assert f"{row.pool / 1000:.3g}k" in written or str(row.pool) in written


def test_a_group_hard_for_both_stands_in_its_corner(sections: tuple[Section, ...]) -> None:
    """The planted cluster is named, and the words say in which quadrant it is."""
    figure = by_title(sections, "Losses behind the scores")["Learner against reference"]
    assert "hard for the reference too: cluster: cluster 5." in figure.chart.description
    assert "cluster 5" in names(figure)
    written = ElementTree.fromstring(str(figure.chart.svg)).iter("text")
    corner = {node.text: (float(node.get("x", "")), float(node.get("y", ""))) for node in written}
    known, hard = corner["worth learning"], corner["hard for the reference too"]
    both, beyond = corner["already learned"], corner["learned beyond the reference"]
    assert known[0] == both[0] < hard[0] == beyond[0]  # the reference's loss rises to the right
    assert known[1] == hard[1] < both[1] == beyond[1]  # the learner's upwards


def test_scores_are_drawn_from_quantiles_where_they_are_not_given(
    whole: tuple[Audit, list[Column], np.ndarray[Any, Any]], sections: tuple[Section, ...]
) -> None:
    """Without the scores five quantiles stand for them; with them the pool's line is there; the lengths must agree."""
    audit, columns, score_N = whole
    exact = by_title(sections, "tone")["Scores by group"]
    coarse = by_title(figures_of(audit), "tone")["Scores by group"]
    assert "the whole pool" in exact.chart.legend
    assert "the whole pool" not in coarse.chart.legend
    assert "5 quantiles" in coarse.caption
    assert float(np.median(score_N)) == pytest.approx(
        float(re.findall(r"the whole pool: median ([\d.]+)", exact.chart.description)[0].rstrip(".")), rel=0.01
    )
    dark = score_N[np.array(columns[3].codes_N) == columns[3].names.index("dark")]
    told = re.findall(r"dark: median (-?[\d.]+)\. ", exact.chart.description + " ")
    assert float(told[0]) == pytest.approx(float(np.median(dark)), rel=0.01)
    with pytest.raises(UsageError, match=r"score_N has 3 values for 12,000 rows"):
        figures_of(audit, score_N=[1.0, 2.0, 3.0], members={one.name: one for one in columns})


def test_a_thousand_groups_stay_legible() -> None:
    """Twenty rows at most are drawn, points are limited, and the page stays small."""
    random, N = np.random.default_rng(0), 20_000
    topics = random.integers(0, 1000, N)
    audit = audit_columns({"topic": [f"topic {n}" for n in topics]}, random.random(N) < 0.3, placebos=2)
    sections = figures_of(audit)
    forest = by_title(sections, "topic")["Kept, against the rest"]
    assert len(names(forest)) == 20
    assert "20 of 1,000 groups are drawn" in forest.caption
    assert len(render(Page("t", "s", [], sections, "f"))) < 600_000
    assert audit.columns[0].composition is not None
    moved = audit.columns[0].composition.total_variation  # a bootstrap of many small groups is far from the pool
    assert moved.low < moved.value < moved.high
    assert moved.low < moved.by_chance < moved.high


@pytest.mark.parametrize("kept", ["nothing", "everything", "one column"])
def test_edges_have_figures_or_none(kept: str) -> None:
    """Nothing or everything selected, or a single group: what cannot be drawn is left out, without an error."""
    N = 200
    selected = np.zeros(N, bool) if kept == "nothing" else np.ones(N, bool)
    if kept == "one column":
        selected = np.arange(N) % 2 == 0
    labels = ["all"] * N if kept == "one column" else ["a", "b"] * (N // 2)
    audit = audit_columns({"tone": labels}, selected, placebos=0)
    for section in figures_of(audit):
        assert section.filled
    json.dumps(audit.as_json(), allow_nan=False)
    assert largest(audit.columns[0].groups) == []
    assert title_of(audit.columns[0]) == "tone"


def test_groups_none_or_all_of_which_were_kept_have_a_place() -> None:
    """Ratios of 0 and without limit are drawn at the ends, with words for both."""
    labels = ["none"] * 50 + ["all"] * 50
    audit = audit_columns({"tone": labels}, [False] * 50 + [True] * 50, placebos=1)
    forest = by_title(figures_of(audit), "tone")["Kept, against the rest"]
    assert "none: 0.00 (0.00-" in forest.chart.description
    assert "all: above" in forest.chart.description
