"""`curate score` under a policy: floors and ceilings kept exactly, conflicts and the price told, the same on resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import curate
from curate.cli import main
from curate.errors import RunMismatch, UsageError
from curate.ledger import read_ledger
from curate.pipelines.planning import Piece, SuperBatch
from curate.pipelines.selecting import SelectSpec
from curate.settings import SelectSettings
from tests.conftest import make_checkpoint
from tests.e2e.policies import (
    assert_kept,
    certificate_of,
    make_captioned_pool,
    rows_in_turn,
    score,
    write_labels,
    write_policy,
)
from tests.e2e.pools import check_run, make_pool, published
from tests.making import make_samples, make_tar

TIGHT = {"a": {"min_share": 0.55}, "b": {"max_ratio": 0.5}}  # of thirds
OF_POLICY = {"certificate.json", "README.md", "croissant.json", "meta.json"}  # these tell of it


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_captioned_pool(
        tmp_path_factory.mktemp("pool"),
        lambda n: f"{('a woman', 'a man', 'a woman and a man', 'a dog')[n % 4]} with number {n}",
    )


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "learner", "sigmoid", seed=5)


@pytest.fixture(scope="module")
def run(pool: Path, tiny_checkpoint: Path, learner: Path) -> Callable[..., Any]:
    return lambda output, **options: score(pool, output, tiny_checkpoint, learner=str(learner), **options)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    return write_labels(folder / "labels.csv", {"third": lambda n: "abc"[n % 3], "shard": lambda n: str(n // 40)})


@pytest.fixture(scope="module")
def tight(labels: Path) -> Path:
    return write_policy(labels.parent / "tight.yaml", {"third": TIGHT})


@pytest.fixture(scope="module")
def plain(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "plain"
    run(output)
    return output


@pytest.fixture(scope="module")
def ruled(run: Callable[..., Any], tight: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "ruled"
    run(output, policy=tight, labels=labels)
    return output


def group_counts(output: Path, member: Callable[[str], bool]) -> list[tuple[int, int, int, int]]:
    """Per draw, cumulated: members among the candidates, candidates, members drawn, drawn; of equal super-batches."""
    shards, drawn, counts = read_ledger(output, ["key", "sub_batch"]), rows_in_turn(output), []
    seen: Counter[str] = Counter()
    candidates = [row for row in shards.to_pylist() if row["sub_batch"] is not None]
    for number, rows in enumerate(drawn):
        here = [row["key"] for row in candidates if row["sub_batch"] == number]
        seen += Counter(n=sum(map(member, here)), pool=len(here))
        seen += Counter(members=sum(member(row["key"]) for row in rows), chosen=len(rows))
        counts.append((seen["n"], seen["pool"], seen["members"], seen["chosen"]))
    return counts


def test_disjoint_floors_and_ceilings_are_kept_at_every_draw(plain: Path, ruled: Path) -> None:
    """Counted from the ledger and the labels alone, each group is within its bounds after every draw; plainly not."""
    for number, (group, bounds) in enumerate(TIGHT.items()):
        assert_kept(group_counts(ruled, lambda key, number=number: int(key) % 3 == number), bounds)
        with pytest.raises(AssertionError):
            assert_kept(group_counts(plain, lambda key, number=number: int(key) % 3 == number), bounds)
        [row] = [row for row in certificate_of(ruled)["groups"] if row["group"] == f"third={group}"]
        assert row["C"] == group_counts(ruled, lambda key, number=number: int(key) % 3 == number)[-1][2]
    assert certificate_of(ruled)["draws_with_conflict"] == 0
    check_run(ruled)


@pytest.mark.parametrize("shard", ["0", "1", "2"])
@pytest.mark.parametrize("asked", [{"min_count": 7}, {"min_share": 0.28}])
def test_a_group_that_only_one_super_batch_has_gets_what_it_is_owed(
    plain: Path, tmp_path: Path, shard: str, asked: dict[str, float]
) -> None:
    """Ten samples of one shard are owed seven of the 24 that are drawn, whether their super-batch is first or last."""
    labels = write_labels(tmp_path / "l.csv", {"few": lambda n: str(n // 40) if n % 4 == 0 else "no"})
    path = write_policy(tmp_path / "p.yaml", {"few": {shard: asked}})
    options: dict[str, Any] = {"to": tmp_path / "out", "super_batch": 40, "policy": path, "labels": labels}
    result = curate.select(plain, engine="inline", **options)
    assert result.certificate is not None
    assert [row["C"] for row in result.certificate["groups"]] == [7]
    assert result.certificate["draws_with_conflict"] == 0


def test_a_count_is_spread_over_the_super_batches_that_have_its_group(plain: Path, tmp_path: Path) -> None:
    """Fourteen owed to ten samples each of two shards: seven of either, though the first draw could give eight."""
    labels = write_labels(tmp_path / "l.csv", {"few": lambda n: str(n < 80 and n % 4 == 1)})
    path = write_policy(tmp_path / "p.yaml", {"few": {"True": {"min_count": 14}}})
    curate.select(plain, to=tmp_path / "out", super_batch=40, policy=path, labels=labels, engine="inline")
    few = [
        sum(int(row["key"]) < 80 and int(row["key"]) % 4 == 1 for row in rows)
        for rows in rows_in_turn(tmp_path / "out")
    ]
    assert sorted(few) == [0, 7, 7]


def test_a_policy_that_does_not_bind_changes_nothing(
    run: Callable[..., Any], plain: Path, labels: Path, tmp_path: Path
) -> None:
    """With bounds that the plain selection keeps, every shard, sidecar and ledger has the plain run's bytes."""
    loose = write_policy(tmp_path / "loose.yaml", {"third": {"a": {"min_ratio": 0.1}, "c": {"max_ratio": 2.9}}})
    result = run(tmp_path / "out", policy=loose, labels=labels)
    ours, theirs = (
        {k: v for k, v in published(out).items() if k not in OF_POLICY} for out in (tmp_path / "out", plain)
    )
    assert ours == theirs
    price = result.certificate["price"]
    assert price["given_up_per_member"] == 0
    assert price["score_with_policy"] == price["score_without"]


def test_overlapping_mentions_are_kept_by_their_atoms(run: Callable[..., Any], tmp_path: Path) -> None:
    """Captions that mention women, men or both keep to both floors at once, counted from the captions."""
    asked = {"female": {"min_share": 0.6}, "male": {"min_share": 0.6}}
    path = write_policy(tmp_path / "p.yaml", {"gender": asked}, "    overlapping: true\n")
    run(tmp_path / "out", policy=path)
    assert_kept(group_counts(tmp_path / "out", lambda key: int(key) % 4 in (0, 2)), asked["female"])
    assert_kept(group_counts(tmp_path / "out", lambda key: int(key) % 4 in (1, 2)), asked["male"])
    [column] = certificate_of(tmp_path / "out")["columns"]
    assert "mention" in column["provenance"]


def test_bounds_that_one_draw_cannot_meet_are_told(run: Callable[..., Any], plain: Path, tmp_path: Path) -> None:
    """Groups that only the last super-batch has, and that owe more together than it may give: told, and short."""
    last = sorted({row["key"] for row in read_ledger(plain, ["key", "sub_batch"]).to_pylist() if row["sub_batch"] == 2})
    half = len(last) // 2
    one, two = set(last[:half]), set(last[half - 2 :])  # two samples are in both
    labels = write_labels(
        tmp_path / "l.csv",
        {"first": lambda n: str(f"{n:09d}" in one), "second": lambda n: str(f"{n:09d}" in two)},
    )
    asked = {"first": {"True": {"min_count": 6}}, "second": {"True": {"min_count": 6}}}
    run(tmp_path / "out", policy=write_policy(tmp_path / "p.yaml", asked), labels=labels)
    certificate = certificate_of(tmp_path / "out")
    assert certificate["draws_with_conflict"] == 1
    [conflict] = certificate["sub_batches_with_conflict"]
    assert conflict["sub_batch"] == 2
    assert conflict["conflict"].startswith(
        "first=True at least 6, second=True at least 6 cannot be met together in 8 of"
    )
    by_hand = [sum(row["key"] in group for row in rows_in_turn(tmp_path / "out")[2]) for group in (one, two)]
    assert [row["C"] for row in certificate["groups"]] == by_hand
    assert any(row["reason"].startswith("short by") for row in certificate["groups"])
    assert curate.verify(tmp_path / "out", load=False).ok


def test_the_command_prints_the_price(
    pool: Path, tiny_checkpoint: Path, learner: Path, tight: Path, labels: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`curate score --policy` says on standard error what each group got and what was given up, as the file does."""
    models = ["--reference", str(tiny_checkpoint), "--learner", str(learner)]
    out = ["-o", str(tmp_path / "out"), "--engine", "inline", "--super-batch", "50", "--chunks", "4"]
    assert main(["score", str(pool), *out, *models, "--policy", str(tight), "--labels", str(labels)]) == 0
    said = capsys.readouterr().err
    given_up = certificate_of(tmp_path / "out")["price"]["given_up_per_member"]
    assert given_up > 0
    assert f"policy: price {given_up:.4g} of learnability per sample" in said
    assert "policy: third=a: 14 of 40 chosen, at least 14: at its floor" in said
    assert "policy of A. Expert (2026-11-22): 2 groups of 1 columns" in said


def test_a_dry_run_reads_the_policy_and_writes_nothing(
    pool: Path, tiny_checkpoint: Path, labels: Path, tmp_path: Path
) -> None:
    """`curate.plan` refuses a policy that is wrong, and plans a run under one that is not."""
    wrong = write_policy(tmp_path / "p.yaml", {"third": {"z": {"min_ratio": 0.5}}})
    with pytest.raises(UsageError, match=r"p\.yaml:8: columns\.0\.groups\.0: no group of third is called 'z'"):
        curate.plan(pool, tmp_path / "out", reference=str(tiny_checkpoint), policy=wrong, labels=labels)
    right = write_policy(tmp_path / "p.yaml", {"third": {"a": {"min_ratio": 0.5}}})
    plan = curate.plan(pool, tmp_path / "out", reference=str(tiny_checkpoint), policy=right, labels=labels)
    assert plan.samples == 120
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_under_a_policy_resumes_to_the_same_bytes(
    run: Callable[..., Any], ruled: Path, tight: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first draw, the same call goes on with what that draw owes and gives the same bytes."""
    from curate.pipelines import passes

    draw, done = passes.select_super_batch, []

    def interrupted(spec: SelectSpec) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(draw(spec))
        return done[0]

    with monkeypatch.context() as patched:
        patched.setattr(passes, "select_super_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", policy=tight, labels=labels)
    assert len(list((tmp_path / "out" / "_curate" / "commits").glob("selection-*"))) == 1
    run(tmp_path / "out", policy=tight, labels=labels)
    assert published(tmp_path / "out") == published(ruled)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"engine": "threads", "workers": 2}, {"engine": "processes", "workers": 2}])
def test_the_engine_changes_no_byte_under_a_policy(
    run: Callable[..., Any], ruled: Path, tight: Path, labels: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Threads and processes publish the bytes of the inline engine, certificate included."""
    run(tmp_path / "out", policy=tight, labels=labels, **options)
    assert published(tmp_path / "out") == published(ruled)


def test_alignment_keeps_to_a_policy(
    pool: Path, tiny_checkpoint: Path, learner: Path, labels: Path, tight: Path, tmp_path: Path
) -> None:
    """Drawn by one score each: floors kept; with nothing binding the draw of a run without a policy."""
    trusted = make_pool(tmp_path / "trusted", shards=1, samples=15, seed=9)
    options: dict[str, Any] = {
        "learner": str(learner),
        "criterion": "alignment",
        "trusted": trusted,
        "trusted_size": 12,
    }
    score(pool, tmp_path / "out", tiny_checkpoint, policy=tight, labels=labels, **options)
    for number, bounds in enumerate(TIGHT.values()):
        assert_kept(group_counts(tmp_path / "out", lambda key, number=number: int(key) % 3 == number), bounds)
    certificate = certificate_of(tmp_path / "out")
    assert certificate["price_unit"] == "alignment"
    loose = write_policy(tmp_path / "loose.yaml", {"third": {"a": {"min_ratio": 0.0}}})
    curate.select(tmp_path / "out", to=tmp_path / "loose", policy=loose, labels=labels, engine="inline")
    curate.select(tmp_path / "out", to=tmp_path / "none", no_policy=True, engine="inline")
    assert drawn_files(tmp_path / "loose") == drawn_files(tmp_path / "none")
    assert drawn_files(tmp_path / "loose") != drawn_files(tmp_path / "out")


def drawn_files(output: Path) -> list[Any]:
    columns = ["sample_id", "status", "rank", "sub_batch", "score"]
    files = sorted((output / "_curate" / "ledger").glob("?????.parquet"))
    return [pq.read_table(file, columns=columns) for file in files]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"a": {"min_count": 50}}, r"p\.yaml:8: columns\.0\.groups\.0\.min_count: no selection can keep it: third=a "
         r"at least 50 of 40 in the pool: more than there are\. Selected are 24 of 120"),
        ({"a": {"min_count": 20}, "b": {"min_count": 10}}, r"groups\.0\.min_count: no selection can keep it: third=a "
         r"at least 20, third=b at least 10 cannot be met together in 24 of 120 candidates"),
        ({"a": {"max_ratio": 0.5}, "b": {"max_ratio": 0.5}, "c": {"max_ratio": 0.5}}, r"max_ratio: no selection can "
         "keep it: third=a at most 4, third=b at most 4, third=c at most 4 cannot be met together"),
        ({"a": {"min_share": 0.5, "max_ratio": 1.0}}, r"min_share: no selection can keep it: third=a at least 12 and "
         "at most 8"),
    ],
)  # fmt: skip
def test_a_policy_that_no_selection_can_keep_is_refused_by_line_and_field(
    plain: Path, labels: Path, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    """Exit code 2 with file, line, field and the conflict, before anything is drawn."""
    path = write_policy(tmp_path / "p.yaml", {"third": asked})
    with pytest.raises(UsageError, match=message) as raised:
        curate.select(plain, to=tmp_path / "out", policy=path, labels=labels, engine="inline")
    assert raised.value.exit_code == 2
    assert not (tmp_path / "out" / "_curate" / "RUN.json").exists()


def test_a_duplicate_is_nobody_that_could_be_drawn(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Ten of a group, each there twice, are five: six are refused, and five are found in their super-batches."""
    pairs = make_samples(40)
    twice = [(key, pairs[n // 2 * 2][1]) for n, (key, _) in enumerate(pairs)]
    make_tar(tmp_path / "pool.tar", twice)
    score(tmp_path / "pool.tar", tmp_path / "out", tiny_checkpoint, super_batch=20)
    labels = write_labels(tmp_path / "l.csv", {"few": lambda n: str(n < 4 or n >= 34)}, samples=40)
    asked: dict[str, Any] = {"labels": labels, "engine": "inline"}
    six = write_policy(tmp_path / "p.yaml", {"few": {"True": {"min_count": 6}}})
    with pytest.raises(UsageError, match=r"few=True at least 6 of 5 in the pool: .* Selected are 8 of 20"):
        curate.select(tmp_path / "out", policy=six, **asked)
    curate.select(tmp_path / "out", to=tmp_path / "all", deduplicate="off", policy=six, **asked)
    assert [row["C"] for row in certificate_of(tmp_path / "all")["groups"]] == [6]
    five = write_policy(tmp_path / "p.yaml", {"few": {"True": {"min_count": 5}}})
    result = curate.select(tmp_path / "out", policy=five, **asked)
    assert result.certificate is not None
    assert [(row["n"], row["C"]) for row in result.certificate["groups"]] == [(5, 5)]
    assert result.certificate["draws_with_conflict"] == 0


def test_a_column_that_only_warns_refuses_nothing(plain: Path, labels: Path, tmp_path: Path) -> None:
    """`severity: warning` is served as far as it goes, and its conflicts are told."""
    text = write_policy(tmp_path / "p.yaml", {"third": {"a": {"min_ratio": 0.5}}}).read_text()
    more = "  - column: shard\n    source: a test\n    severity: warning\n    groups: ['0', '1']\n    min_count: 20\n"
    (tmp_path / "p.yaml").write_text(text + more)
    result = curate.select(plain, to=tmp_path / "out", policy=tmp_path / "p.yaml", labels=labels, engine="inline")
    assert result.certificate is not None
    assert result.certificate["draws_with_conflict"] > 0


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ({"third": {"q": {"min_ratio": 1}}}, {}, r"p\.yaml:8: columns\.0\.groups\.0: no group of third is called 'q'"),
        ({"gender": {"woman": {"min_ratio": 1}}}, {}, "no group of gender is called 'woman'; there are female, male"),
        ({"thirds": {"a": {"min_ratio": 1}}}, {},
         r"p\.yaml:6: columns\.0\.column: no column is called 'thirds'; did you mean 'third'"),
        (None, {}, "--labels: labels give groups to a policy; name that too, with --policy FILE"),
        ({"third": {"a": {"min_ratio": 1}}}, {"no_policy": True}, "--policy and --no-policy contradict each other"),
        ({"third": {"a": {"min_ratio": 1}}}, {"on": "mail"}, "on 'mail'"),
        ({"gender": {"female": {"min_ratio": 0.1}, "male": {"min_ratio": 0.1}}}, {},
         r"columns\.0: 30 rows are in several groups of gender; say overlapping: true"),
    ],
)  # fmt: skip
def test_mistakes_in_a_policy_are_told_and_cost_nothing(
    plain: Path, labels: Path, tmp_path: Path, policy: Any, options: dict[str, Any], message: str
) -> None:
    """Each is a UsageError that says what is wrong; the shards of the earlier selection stay."""
    before = published(plain)
    path = None if policy is None else write_policy(tmp_path / "p.yaml", policy)
    with pytest.raises(UsageError, match=message):
        curate.select(plain, policy=path, labels=labels, engine="inline", **options)
    assert published(plain) == before


def test_another_policy_belongs_to_another_run(
    run: Callable[..., Any], ruled: Path, labels: Path, tmp_path: Path
) -> None:
    """RUN.json pins policy and labels; a run without a policy has no word of one in it."""
    other = write_policy(tmp_path / "p.yaml", {"third": {"a": {"min_ratio": 0.5}}})
    with pytest.raises(RunMismatch, match=r"settings\.select\.policy\.text"):
        run(ruled, policy=other, labels=labels)
    with pytest.raises(RunMismatch, match=r"settings\.select\.policy: .* there, null now"):
        run(ruled)


def test_a_run_without_a_policy_is_what_it_was(plain: Path) -> None:
    """Records and unit ids of runs without a policy are those of the version before there were any."""
    assert "policy" not in json.loads((plain / "_curate" / "RUN.json").read_text())["settings"]["select"]
    settings = SelectSettings(criterion="easy-reference", loss="sigmoid")
    tables = {0: (Path("a"), "ab" * 32)}
    batch = SuperBatch(0, (Piece(0, 0, 9),), 3)
    spec = SelectSpec(Path("out"), batch, tables, {"reference": {"scale": 1.0}}, settings, 1)
    assert spec.unit.id == "selection-9b611e12b030c3a1c318417d1805cbec"
    assert not (plain / "certificate.json").exists()
