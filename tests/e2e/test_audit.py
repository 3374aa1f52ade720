"""`curate audit` on everything that curate writes, and on what other tools selected: files, verdicts, exit codes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate
from curate.cli import main
from curate.errors import UsageError
from curate.ledger import read_ledger
from curate.pipelines.auditing import audit
from tests.e2e.pools import make_bad_pool, published
from tests.e2e.training_runs import TrainingRun
from tests.making import make_samples, make_tar

FILES = {"audit.json", "groups.parquet", "assignments.parquet", "report.html"}
INLINE: dict[str, Any] = {"engine": "inline"}


@pytest.fixture(scope="module")
def selection(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over shards of which two are damaged."""
    pool, output = make_bad_pool(tmp_path_factory.mktemp("pool")), tmp_path_factory.mktemp("runs") / "out"
    curate.score(
        pool, output, reference=str(tiny_checkpoint), keep=0.4, super_batch=50, tolerance=1.0, batch_size=16, **INLINE
    )
    return output


@pytest.fixture
def tones(selection: Path, tmp_path: Path) -> Path:
    """Labels of which the kept samples have another mix than the others, by sample id; some have none."""
    rows = read_ledger(selection, ["sample_id", "status"]).to_pylist()
    lines = ["sample_id,tone,coin"]
    for number, row in enumerate(rows):
        if row["status"] != "quarantined":
            dark = row["status"] == "dropped" and number % 3 > 0
            lines.append(f"{row['sample_id'].hex()},{'dark' if dark else 'light' if number % 7 else ''},{number % 2}")
    return written(tmp_path / "tones.csv", "\n".join(lines))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def policy(path: Path, bounds: str, group: str = "dark", column: str = "tone") -> Path:
    return written(
        path,
        "schema: 1\nauthor: A. Expert\ndate: 2026-11-22\nrationale: a test\ncolumns:\n"
        f"  - column: {column}\n    source: a file\n    groups: [{group}]\n    {bounds}\n",
    )


def test_an_audit_leaves_report_tables_and_json_that_agree(selection: Path) -> None:
    """The counts of groups.parquet are those of assignments.parquet, and those of the ledger."""
    before = published(selection)
    result = audit(selection, **INLINE)
    folder = selection / "_curate" / "audit"
    assert result.report == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == FILES
    counts = Counter(read_ledger(selection, ["status"])["status"].to_pylist())
    assert (result.audit.pool, result.audit.selected) == (counts["kept"] + counts["dropped"], counts["kept"])
    groups = pq.read_table(folder / "groups.parquet").to_pylist()
    rows = pq.read_table(folder / "assignments.parquet").to_pylist()
    assert len(rows) == result.audit.pool
    assert len(groups) == len(result.audit.rows) > 20
    for group in groups:
        if not group["is_unknown"] and group["kind"] != "intersection":
            of = [row for row in rows if group["group"] in listed(row[group["column"]])]
            assert len(of) == group["pool"], group["group"]
            assert sum(row["times_selected"] > 0 for row in of) == group["selected"]
    stored = json.loads((folder / "audit.json").read_bytes())
    assert stored["findings"] == list(result.findings)
    after = published(selection)
    assert {name for name in after if after[name] != before[name]} == {"README.md", "croissant.json"}
    assert "1 flag" in (selection / "README.md").read_text() or "flags of" in (selection / "README.md").read_text()
    assert curate.verify(selection).ok


def listed(value: str | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else [] if value is None else [value]


def test_an_audit_says_the_same_twice(selection: Path, tmp_path: Path) -> None:
    """Equal questions give equal bytes, wherever they are written and however many workers read the captions."""
    audit(selection, to=tmp_path / "one", seed=3, **INLINE)
    audit(selection, to=tmp_path / "two", seed=3, engine="threads", workers=2)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_columns_narrow_an_audit_to_those_that_are_named(selection: Path, tones: Path, tmp_path: Path) -> None:
    """What is not named is not tested, so it takes no power from what is; crossings and confounders come along."""
    result = audit(
        selection, labels=tones, on="sample_id", columns=["tone"], intersect=["tone,image shape"],
        confounder=["caption length", "caption script"], to=tmp_path / "audit", **INLINE,
    )  # fmt: skip
    assert {column.name for column in result.audit.columns} == {"tone", "image shape", "tone & image shape"}
    [dark] = [row for row in result.audit.rows if (row.column, row.group) == ("tone", "dark")]
    assert dark.selected == 0
    assert dark.level == "confidently large"
    names = {held.confounder for held in dark.conditional}
    assert names == {"caption length", "caption script", "caption length and caption script"}
    assert any("is not known" in line for line in result.findings)


@pytest.mark.parametrize(
    ("bounds", "group", "code", "said"),
    [
        ("min_count: 1", "light", 0, "passed"),
        ("min_ratio: 0.9", "dark", 1, "violated"),
        ("min_count: 100000", "dark", 2, "100000 are asked for, but the pool has"),
        ("min_ratio: 0.9", "'1'", 3, "indeterminate"),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_policys_verdict(
    selection: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    bounds: str, group: str, code: int, said: str,
) -> None:  # fmt: skip
    """0 passed, 1 violated, 2 infeasible, 3 indeterminate: what cannot be told is never a pass."""
    file = policy(tmp_path / "policy.yaml", bounds, group, "tone" if group in ("dark", "light") else "coin")
    arguments = ["audit", str(selection), "--labels", str(tones), "--on", "sample_id", "--columns", "tone"]
    arguments += ["--policy", str(file), "-o", str(tmp_path / "audit"), "--engine", "inline"]
    assert main(arguments) == code
    assert said in capsys.readouterr().out
    assert (tmp_path / "audit" / "certificate.json").is_file()
    assert json.loads((tmp_path / "audit" / "audit.json").read_bytes())["verdict"]["exit_code"] == code


def test_a_policy_narrows_no_audit(selection: Path, tones: Path, tmp_path: Path) -> None:
    """Without --columns every label is audited, whichever of them the policy names."""
    file = policy(tmp_path / "policy.yaml", "min_count: 1", "light")
    result = audit(selection, labels=tones, on="sample_id", policy=file, to=tmp_path / "audit", **INLINE)
    assert {"tone", "coin", "caption language"} <= {column.name for column in result.audit.columns}


def test_json_prints_one_value(selection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` prints the audit as one JSON value on standard output and nothing else."""
    assert main(["audit", str(selection), "-o", str(tmp_path / "audit"), "--engine", "inline", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["exit_code"] == 0
    assert value["audit"]["pool"] > 0


def test_a_training_is_audited_from_its_log_and_from_its_shards(
    training: TrainingRun, teed: Path, tmp_path: Path
) -> None:
    """Both give the same groups and counts, exposures apart from unique examples, early against late steps."""
    log = audit(training.run, to=tmp_path / "log", **INLINE).audit
    shards = audit(teed, to=tmp_path / "teed", **INLINE).audit
    drawn = Counter(row["key"] for step in training.steps for row in step)
    for one in (log, shards):
        assert (one.pool, one.selected, one.exposures) == (60, len(drawn), drawn.total())
        assert any(row.early_late is not None and row.early_late.early for row in one.rows)
    counts = [{(row.column, row.group): (row.pool, row.selected) for row in one.rows} for one in (log, shards)]
    assert counts[0] == counts[1]


def uid_file(path: Path, uids: list[str]) -> Path:
    pairs = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids]
    np.save(path, np.array(pairs, dtype=np.dtype("u8,u8")))
    return path


@pytest.mark.parametrize("kind", ["uids", "keys"])
def test_a_selection_of_another_tool_is_audited_from_its_pool(tmp_path: Path, kind: str) -> None:
    """A planted ratio of a third is found in a parquet of 3,000 rows, and it alone."""
    random = np.random.default_rng(0)
    rows = [
        {
            "key": f"k{number:05d}",
            "uid": f"{number * 7919:032x}",
            "text": f"a photo of a {('woman', 'man', 'dog', 'house')[number % 4]} number {number}",
            "url": f"https://site.example.{('org', 'de', 'fr')[number % 3]}/{number}.jpg",
        }
        for number in range(3000)
    ]
    chosen = [row for row in rows if random.random() < (0.1 if "woman" in row["text"] else 0.3)]
    pool = tmp_path / "pool.parquet"
    pq.write_table(pa.Table.from_pylist(rows), pool)
    if kind == "uids":
        selected = uid_file(tmp_path / "selected.npy", [row["uid"] for row in chosen])
    else:
        selected = written(tmp_path / "selected.txt", "\n".join(row["key"] for row in chosen))
    result = audit(pool, selected=selected, to=tmp_path / "audit")
    left = {row.group for row in result.audit.rows if row.level == "confidently large" and row.ratio.value < 1}  # type: ignore[union-attr]
    assert left == {"female"}
    assert result.findings[0].startswith("Captions that mention female were kept 0.3")
    with pytest.raises(UsageError, match="name a directory for the report"):
        audit(pool, selected=selected)


Damage = Callable[[Path, Path], dict[str, Any]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": "nowhere.csv"}, "nowhere.csv: No such file"),
        ({"columns": ["tine"]}, "no column 'tine'"),
        ({"intersect": ["gender"]}, "name two columns or more"),
        ({"intersect": ["gender,agge"]}, "agge"),
        ({"label_error": ["gender=high"]}, "give COLUMN=SENSITIVITY,SPECIFICITY"),
        ({"lexicon": ["nosuchset"]}, "nosuchset"),
        ({"clusters": 100000}, "--clusters 100000"),
        ({"confounder": ["score"]}, "what the selection did"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(
    selection: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    """Every bad option ends in a sentence that names it, and nothing is written."""
    with pytest.raises(UsageError, match=said):
        audit(selection, to=tmp_path / "audit", **INLINE, **options)
    assert not (tmp_path / "audit" / "report.html").exists()


def test_names_with_commas_and_lists_of_the_json_are_crossed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A column called "height, in cm" and a list-valued field: every group and crossing counted from what was given."""
    fields = [{"tags": ["a", "b"][: 1 + n % 2], "height, in cm": "tall" if n % 3 else "short"} for n in range(40)]
    pairs = [(key, parts | {"json": json.dumps(fields[n]).encode()}) for n, (key, parts) in enumerate(make_samples(40))]
    shards = make_tar(tmp_path / "00000.tar", pairs)
    curate.score(shards, tmp_path / "out", reference=str(tiny_checkpoint), keep=0.5, **INLINE)
    arguments = ["audit", str(tmp_path / "out"), "--intersect", '"height, in cm",tags', "--columns", "tags"]
    assert main([*arguments, "--engine", "inline"]) == 0
    kept = [row["status"] == "kept" for row in read_ledger(tmp_path / "out", ["status"]).to_pylist()]
    table = pq.read_table(tmp_path / "out/_curate/audit/groups.parquet").to_pylist()
    found = {(row["column"], row["group"]): (row["pool"], row["selected"]) for row in table}
    for group in "ab":
        member = [group in one["tags"] for one in fields]
        assert found["tags", group] == (sum(member), sum(a and b for a, b in zip(member, kept, strict=True)))
        tall = [one and fields[n]["height, in cm"] == "tall" for n, one in enumerate(member)]
        both = (sum(tall), sum(a and b for a, b in zip(tall, kept, strict=True)))
        assert found["height, in cm & tags", f"tall & {group}"] == both


@pytest.mark.parametrize(
    ("lines", "said", "earlier_than"),
    [
        ("key,tone\na,dark\n", "no column 'sample_id'", "read_selection"),
        ("sample_id,tone\n00,dark\n00,light\n", "1 rows repeat a sample_id with other labels", "read_selection"),
        ("sample_id,tone\n00,dark\n", r"0 of \d+ samples matched", "traits_pass"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_shards_are_read(
    selection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, said: str, earlier_than: str
) -> None:
    """A key that is not there or has two labels: before anything else; keys of another pool: before the captions."""
    monkeypatch.setattr(f"curate.pipelines.auditing.{earlier_than}", lambda *_, **__: pytest.fail("too late"))
    file = written(tmp_path / "labels.csv", lines)
    with pytest.raises(UsageError, match=said):
        audit(selection, labels=file, on="sample_id", to=tmp_path / "audit", **INLINE)


def test_there_is_nothing_to_audit_before_a_selection(pool: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Scores alone, and directories of something else, are refused with what to do."""
    curate.score(pool, tmp_path / "scored", reference=str(tiny_checkpoint), scores_only=True, **INLINE)
    with pytest.raises(UsageError, match="no ledger there yet"):
        audit(tmp_path / "scored", **INLINE)
    with pytest.raises(UsageError, match="no run of curate there"):
        audit(pool, **INLINE)


def test_a_report_replaces_nothing_but_a_report(selection: Path, training: TrainingRun, tmp_path: Path) -> None:
    """A run of curate has a report of its own; a report.html without audit.json beside it is someone else's."""
    other = tmp_path / "other"
    other.mkdir()
    written(other / "report.html", "mine")
    for target in (selection, training.run):
        with pytest.raises(UsageError, match="an output of curate"):
            audit(selection, to=target, **INLINE)
    with pytest.raises(UsageError, match="no audit's"):
        audit(selection, to=other, **INLINE)
    assert (other / "report.html").read_text() == "mine"


def test_with_another_directory_a_training_stays_as_it_was(training: TrainingRun, tmp_path: Path) -> None:
    """What had to be read of its shards lies beside the report."""
    before = {*training.run.rglob("*")}
    audit(training.run, to=tmp_path / "audit", **INLINE)
    audit(training.run, to=tmp_path / "audit", **INLINE)
    assert {*training.run.rglob("*")} == before


def test_a_pool_of_other_tools_with_lists_and_a_column_named_as_a_crossing(tmp_path: Path) -> None:
    """Lists are overlapping groups; a column "a & tags" and the crossing of a and tags are two in all files."""
    rows = {
        "key": [f"{n:03d}" for n in range(60)],
        "a": ["xy"[n % 2] for n in range(60)],
        "tags": [["p", "q"][: 1 + n % 3 // 2] for n in range(60)],
        "a & tags": ["uv"[n % 5 == 0] for n in range(60)],
    }
    pq.write_table(pa.table(rows), tmp_path / "pool.parquet")
    kept = [n % 4 > 1 for n in range(60)]
    selected = written(tmp_path / "kept.txt", "\n".join(key for key, one in zip(rows["key"], kept, strict=True) if one))
    asked = ["--columns", "tags", "--columns", "a & tags", "--intersect", "a,tags"]
    arguments = ["audit", str(tmp_path / "pool.parquet"), "--selected", str(selected), "-o", str(tmp_path / "audit")]
    assert main([*arguments, *asked]) == 0
    table = pq.read_table(tmp_path / "audit/groups.parquet").to_pylist()
    found = {(row["column"], row["group"]): (row["pool"], row["selected"]) for row in table}
    assert len(found) == len(table)
    for name, member in (
        (("tags", "q"), ["q" in tags for tags in rows["tags"]]),
        (("a & tags", "v"), [one == "v" for one in rows["a & tags"]]),
        (
            ('"a" & "tags"', "x & q"),
            [a == "x" and "q" in tags for a, tags in zip(rows["a"], rows["tags"], strict=True)],
        ),
    ):
        assert found[name] == (sum(member), sum(one and k for one, k in zip(member, kept, strict=True))), name
    columns = [one["name"] for one in json.loads((tmp_path / "audit/audit.json").read_text())["audit"]["columns"]]
    assert sorted(columns) == sorted(["a", "tags", "a & tags", '"a" & "tags"'])
    page = (tmp_path / "audit/report.html").read_text()
    assert "a &amp; tags" in page
    assert "&#34;a&#34; &amp; &#34;tags&#34;" in page or "&quot;a&quot; &amp; &quot;tags&quot;" in page
