"""The audit's report as text: what it says of every group, its tables, verdict, galleries and data."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curate.auditing.audit import audit_columns
from curate.auditing.clusters import embedding_clusters
from curate.auditing.columns import Column, LabelError
from curate.auditing.membership import as_column, bins
from curate.auditing.outcome import Audit
from curate.auditing.power import Reach
from curate.auditing.report import Gallery, Strip, Tile, cells, drawn, fetch, medoids, render_report
from curate.auditing.report.figures import figures_of
from curate.auditing.report.tables import MOST_PAIRS, behind_table, draws_table, group_table, overview
from curate.auditing.strata import Ratio
from curate.errors import UsageError
from curate.originals import GONE, read_originals
from curate.policy.checking import EXIT_CODES, GroupCheck, Result, Verdict
from curate.policy.ratios import pool_ratio
from tests.making import exif, make_image, make_tar

N = 6000
VERDICTS = re.compile(r"\b(?:un)?fair(?:ness|ly)?\b|\b(?:un)?biased\b|\bcompliant\b|no bias|\bfine\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def parts() -> tuple[list[Column], np.ndarray[Any, Any], Audit]:
    """Columns, selection and audit: one group is kept at half the rate of the others, one has four rows."""
    random = np.random.default_rng(5)
    tone_N = random.integers(0, 4, N)
    tone_N[:4] = 4
    masks_NG = random.random((N, 2)) < 0.3
    gender = Column(
        "gender", "mention", "a lexicon", ("women", "men"), members_NG=masks_NG, known_N=np.ones(N, bool),
        label_error=LabelError(0.9, 0.95),
    )  # fmt: skip
    tone = as_column("tone", np.array(["dark", "light", "medium", None, "rare"], object)[tone_N], N)
    selected_N = random.random(N) < np.where(tone_N == 1, 0.1, 0.2)
    audit = audit_columns(
        [tone, gender], selected_N, selected_N * 2, np.where(random.random(N) < 0.3, random.integers(0, 900, N), -1),
        {"caption length": bins(random.integers(5, 60, N), 4)}, intersections=[("tone", "gender")],
        learner_loss_N=random.random(N), reference_loss_N=random.random(N), score_N=random.random(N),
        sub_batch_N=random.integers(0, 9, N), concepts={"doctor": random.random(N) < 0.2}, placebos=4,
    )  # fmt: skip
    return [tone, gender], selected_N, audit


@pytest.fixture(scope="module")
def audit(parts: tuple[list[Column], np.ndarray[Any, Any], Audit]) -> Audit:
    return parts[2]


class Outline(HTMLParser):
    """The text of a page and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, _: Any) -> None:
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words.append(data)

    def handle_endtag(self, _: str) -> None:
        self.inside = ""

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def verdict(result: Result, conflict: str = "") -> Verdict:
    ratio = pool_ratio(150, 1500, 1000, N)
    check = GroupCheck("tone", "light", "error", 1500, 150, 150, None, ratio, result, "because 1 < 2")
    return Verdict(result, (check,), conflict)


def test_findings_come_before_everything_else(audit: Audit) -> None:
    """The planted group's sentence, its confounders and the random selections precede the first table."""
    text = Outline(render_report(audit, title="Audit of OUT")).text
    first = text.index("were kept 0.")
    assert "tone light were kept" in text[: first + 20]
    assert first < text.index("Could be explained by caption length: no") < text.index("Against chance.")
    assert text.index("Against chance.") < text.index("What was not detected") < text.index("Cohen's h")


def test_every_group_has_a_row_however_small(audit: Audit) -> None:
    """The group of four rows and the rows not known stand in the table; the small one says that it shows nothing."""
    tone = audit.columns[0]
    rows = {row[0].main: [cell.main for cell in row] + [cell.under for cell in row] for row in group_table(tone).rows}
    assert list(rows) == ["dark", "light", "medium", "rare", "unknown"]
    assert "none below 1" in rows["rare"]
    assert "too small to see any ratio below 1" in rows["rare"]
    assert "no group is known" in rows["unknown"]
    assert "confidently large" in rows["light"]


def test_the_tables_have_every_statistic(audit: Audit) -> None:
    """Counts, rates and ratios; crude beside conditional with the answer; exposures, losses, early and late."""
    tone, gender, crossed = audit.columns
    assert group_table(tone).head == (
        "Group", "In the pool", "Selected", "Never selected", "Rate", "Ratio to the rest", "Cohen's h", "q", "Level",
        "Could see",
    )  # fmt: skip
    behind = behind_table(gender)
    assert behind is not None
    assert behind.head == (
        "Group", "Crude ratio", "Within equal caption length", "Explained by caption length?",
        "With label errors put right", "Counting copies",
    )  # fmt: skip
    told = behind_table(tone)
    assert told is not None
    assert [row[3].main for row in told.rows if row[0].main == "light"] == ["no"]
    shrunk = behind_table(crossed)
    assert shrunk is not None
    assert "Rate after shrinkage" in shrunk.head
    draws = draws_table(tone)
    assert draws is not None
    assert {"Exposures", "Early", "Late", "Learner loss", "Reference loss", "Which means"} <= set(draws.head)
    row = draws.rows[0]
    assert row[1].main == f"{2 * tone.groups[0].selected:,}"


def test_a_plain_audit_has_no_empty_tables() -> None:
    """Without strata, draws, losses and concepts there is one table a column and no section for the others."""
    audit = audit_columns({"c": ["a", "b"] * 50}, np.arange(100) % 3 == 0, placebos=0)
    assert behind_table(audit.columns[0]) is None
    assert draws_table(audit.columns[0]) is None
    text = Outline(render_report(audit, title="Audit")).text
    assert "Associations" not in text
    assert "Pictures" not in text
    assert "no random selections were audited" in text


def test_provenance_coverage_and_unknown_share_are_told(audit: Audit) -> None:
    """The first table gives each column's source, what is known and what is not."""
    row = overview(audit).rows[0]
    tone = audit.columns[0]
    assert [cell.main for cell in row[:4]] == [
        "tone", "labels given by the caller", cells.percent(tone.coverage), cells.percent(tone.unknown_share),
    ]  # fmt: skip


def test_the_page_gives_no_verdict_on_the_selection(audit: Audit) -> None:
    """Findings, headings, explanations and figures keep to the wording rules."""
    text = Outline(render_report(audit, title="Audit", figures=figures_of(audit), verdict=verdict("passed"))).text
    assert VERDICTS.findall(text) == []
    assert "screening ratio, not a legal test" in text
    assert "does not show that a person of it is depicted" in text


def test_the_only_script_is_the_one_the_policy_names(audit: Audit) -> None:
    """One block of data, one script; the policy of content has that script's digest and no other source of scripts."""
    text = render_report(audit, title="Audit")
    data, script = Outline(text).scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src &#39;none&#39;" in policy
    assert re.findall(r"script-src ([^;]*)", policy.replace("&#39;", "'")) == [f"'sha256-{digest}'"]
    assert json.loads(data) == audit.as_json() | {"policy": None}
    assert re.search(r'(?:src|href|action)="(?!data:|#)', text) is None


def test_the_data_cannot_end_its_block() -> None:
    """Labels that look like the end of a script are in the data, with every < as an escape."""
    name = "</script><script>alert(1)</script><!--"
    audit = audit_columns({name: [name, "b"] * 50}, np.arange(100) % 3 == 0, placebos=0)
    text = render_report(audit, title=name)
    data, _ = Outline(text).scripts
    assert "<" not in data
    assert json.loads(data)["columns"][0]["groups"][0]["group"] == name
    assert text.count("<script") == 2


def test_equal_audits_give_equal_pages(audit: Audit) -> None:
    """The page has no clock and no chance in it."""
    one, other = (render_report(audit, title="A", figures=figures_of(audit)) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("result", list(EXIT_CODES))
def test_a_policy_has_its_section(audit: Audit, result: Result) -> None:
    """Result, reason and conflict are told; indeterminate is never told as a pass."""
    conflict = "tone=light at least 9 of 4" if result == "infeasible" else ""
    text = Outline(render_report(audit, title="A", verdict=verdict(result, conflict))).text
    assert f"Policy: {result}" in text
    assert "because 1 < 2" in text
    assert ("This is not a pass" in text) == (result == "indeterminate")
    assert ("The conflict: tone=light at least 9 of 4." in text) == (result == "infeasible")
    assert json.loads(Outline(render_report(audit, title="A", verdict=verdict(result))).scripts[0])["policy"]


def test_figures_stand_with_their_columns(audit: Audit) -> None:
    """A column's figures precede its table, what has no column stays a section of its own, and none is lost."""
    sections = figures_of(audit)
    text = render_report(audit, title="A", figures=sections)
    assert text.count("<figure>") == sum(len(section.figures) for section in sections)
    start, table = text.index('id="column-2"'), text.index("gender: rates and ratios")
    assert "<figure>" in text[start:table]
    assert text.index("Losses behind the scores</h2>") > text.index('id="column-3"')


def test_a_gallery_is_drawn_by_the_ids_alone(parts: tuple[list[Column], np.ndarray[Any, Any], Audit]) -> None:
    """Kept rows were kept, rows left out were not, all are of the group; other seeds draw others."""
    columns, selected_N, audit = parts
    ids = np.random.default_rng(1).bytes(16 * N)
    first, again, other = (
        drawn(audit, columns, selected_N, ids, intersections=[("tone", "gender")], seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    gallery = first[[one.title for one in first].index("Samples with tone light")]
    kept, left = ([tile.row for tile in strip.tiles] for strip in gallery.strips)
    light = columns[0].names.index("light")
    assert len(kept) == len(left) == 8
    assert columns[0].codes_N is not None
    assert set(columns[0].codes_N[kept + left]) == {light}
    assert selected_N[kept].all()
    assert not selected_N[left].any()
    with pytest.raises(UsageError, match="16 bytes a row"):
        drawn(audit, columns, selected_N, ids[:-1])


def test_every_cluster_shows_its_medoid() -> None:
    """One tile per cluster, of the sample nearest to its centre, flagged clusters first where there are many."""
    embedding_ND = np.random.default_rng(2).normal(size=(900, 8))
    found = embedding_clusters(embedding_ND, clusters=14)
    selected_N = (np.arange(900) % 4 == 0) & (found.column.codes_N != 9)
    audit = audit_columns([found.column], selected_N, placebos=0)
    [strip] = medoids(audit, found).strips
    assert sorted(tile.row for tile in strip.tiles) == sorted(found.medoids_K.tolist())
    leading = {tile.row: tile.note for tile in strip.tiles[: audit.flags]}
    assert "cluster 9: 0 of" in leading[int(found.medoids_K[9])]


def test_pictures_are_encoded_anew(tmp_path: Path) -> None:
    """A thumbnail is small, upright and without EXIF; a gone shard, a missing sample and a broken image have none."""
    turned = make_image("jpeg", 400, 200, exif=exif(6), comment=b"secret")
    shard = make_tar(
        tmp_path / "a.tar",
        [("0", {"jpg": turned, "txt": "été".encode()}), ("1", {"jpg": b"no picture", "txt": b"x" * 999})],
    )
    strip = Strip("All", tuple(Tile(row) for row in range(5)))
    places = {0: (str(shard), 0), 1: (str(shard), 1), 2: (str(shard), 7), 3: (str(tmp_path / "gone.tar"), 0)}
    [gallery] = fetch([Gallery("G", "", (strip,))], places.get)
    tiles = gallery.strips[0].tiles
    payload = base64.b64decode(tiles[0].picture.removeprefix("data:image/jpeg;base64,"))
    image = Image.open(io.BytesIO(payload))
    assert (image.format, image.size) == ("JPEG", (96, 192))
    assert not image.getexif()
    assert b"Exif" not in payload
    assert b"secret" not in payload
    assert [bool(tile.picture) for tile in tiles] == [True, False, False, False, False]
    assert tiles[0].caption == "été"
    assert len(tiles[1].caption) == 240
    assert "not there any more" in tiles[3].caption
    [named] = fetch([Gallery("G", "", (strip,))], places.get, lambda row: f"row {row}")
    assert [tile.caption for tile in named.strips[0].tiles] == [f"row {row}" for row in range(5)]


def test_many_groups_stay_whole() -> None:
    """A thousand groups: flagged first, not known last, every one with a row, none set against words."""
    codes_N = np.arange(20000) % 1001
    labels = [None if code == 1000 else f"g{code}" for code in codes_N.tolist()]
    selected_N = (np.arange(20000) // 1001) % 4 == 0
    selected_N[codes_N == 500] = True
    audit = audit_columns(
        {"c": labels}, selected_N, concepts={f"w{k}": np.arange(20000) % 7 == k for k in range(2)}, placebos=0
    )
    rows = group_table(audit.columns[0]).rows
    assert len(rows) == 1001
    assert (rows[0][0].main, rows[-1][0].main) == ("g500", "unknown")
    assert not audit.associations


def test_pairs_beyond_two_hundred_are_counted() -> None:
    """Ninety groups and three words are 270 pairs."""
    codes_N, selected_N = np.arange(18000) % 90, np.arange(18000) % 4 == 0
    words = {f"w{k}": (np.arange(18000) // 90) % 7 == k for k in range(3)}
    audit = audit_columns({"c": codes_N}, selected_N, concepts=words, placebos=0)
    assert f"The {MOST_PAIRS} pairs with the smallest q; the other 70" in render_report(audit, title="A")


def test_findings_beyond_twelve_are_counted() -> None:
    """Fifteen flagged groups: twelve sentences, and a line that counts the others."""
    labels = np.repeat(np.arange(30), 300)
    selected_N = np.random.default_rng(0).random(9000) < np.where(labels < 15, 0.1, 0.4)
    audit = audit_columns({"c": labels}, selected_N, placebos=0)
    text = Outline(render_report(audit, title="A")).text
    more = audit.flags - 12
    assert more > 1
    assert f"{more} more groups were flagged" in text


def test_a_gone_shard_is_not_taken_for_a_pattern(tmp_path: Path) -> None:
    """Where `a*.tar` is gone, `ab.tar` and `ac.tar` are not read in its place."""
    for name in ("ab.tar", "ac.tar"):
        make_tar(tmp_path / name, [("0", {"jpg": make_image(), "txt": b"another"})])
    named = [str(tmp_path / "a*.tar"), str(tmp_path / "a[b].tar"), str(tmp_path / "ab.tar")]
    found = dict(read_originals([(name, 0) for name in named], min_side=32))
    assert [found[name, 0].caption for name in named] == [GONE, GONE, "another"]


@pytest.mark.parametrize(
    ("cell", "main", "under", "key"),
    [
        (cells.ratio(Ratio(0.623, 0.55, 0.704)), "0.62", "0.55 to 0.70", "0.623"),
        (cells.ratio(Ratio(float("inf"), 3.2, float("inf"))), "none of the rest", "3.20 or more", "Infinity"),
        (cells.ratio(None), "\u2013", "", ""),
        (cells.probability(0.0000004), "<0.0001", "", "4e-07"),
        (cells.probability(0.0312, "G"), "0.031", "G", "0.0312"),
        (cells.number(-0.516), "\u22120.52", "", "-0.516"),
        (cells.number(float("nan")), "\u2013", "", ""),
        (cells.count(1234), "1,234", "", "1234.0"),
        (cells.reach(Reach(None, 3.5)), "none below 1", "from 3.50", "-1.0"),
        (cells.reach(Reach(0.76, None)), "up to 0.76", "", "0.76"),
    ],
)
def test_cells_say_and_sort(cell: cells.Cell, main: str, under: str, key: str) -> None:
    """What is read, what stands below, and the number that the column is sorted by."""
    assert (cell.main, cell.under, cell.key) == (main, under, key)


def test_percent_keeps_small_shares_apart() -> None:
    """Shares below a thousandth do not become 0.0 %."""
    assert [cells.percent(x) for x in (0, 1, 0.1834, 0.0077, 0.00042)] == ["0.0%", "100.0%", "18.3%", "0.77%", "0.042%"]


def test_a_reversal_is_shown_side_by_side() -> None:
    """Simpson: kept less often in all, more often in each stratum; both ratios and "direction reverses" in one row."""
    cells_of = [("a", "long", 900, 180), ("b", "long", 100, 15), ("a", "short", 100, 70), ("b", "short", 900, 540)]
    group = [g for g, _, n, _ in cells_of for _ in range(n)]
    length = [s for _, s, n, _ in cells_of for _ in range(n)]
    selected_N = np.concatenate([np.arange(n) < k for _, _, n, k in cells_of])
    audit = audit_columns({"c": group}, selected_N, strata={"length": length}, placebos=0)
    told = behind_table(audit.columns[0])
    assert told is not None
    crude, within, answer = told.rows[0][1:4]
    assert float(crude.key or "nan") < 1 < float(within.key or "nan")
    assert answer.main == "direction reverses"


def test_a_row_without_a_column_is_refused(parts: tuple[list[Column], np.ndarray[Any, Any], Audit]) -> None:
    """Galleries of an audit with columns that were not handed over name the one that is missing."""
    columns, selected_N, audit = parts
    renamed = [dataclasses.replace(column, name=f"{column.name}2") for column in columns]
    with pytest.raises(UsageError, match="is none of the columns given: tone2, gender2"):
        drawn(audit, renamed, selected_N, bytes(16 * N))
