"""Rounds of a recipe beside their baselines: each beside its own, charged with all that led to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import curate
from curate.costs.ledger import CostLedger
from curate.errors import UsageError
from curate.learner.journal import read_log
from curate.learner.report.history import read_history
from curate.learner.report.metrics import spent_at
from curate.learner.report.race import compare
from curate.models import configs
from curate.pipelines.round_plan import plan_rounds
from curate.recipe import read_recipe
from tests.conftest import MINI
from tests.making import make_samples, make_tar

pytestmark = pytest.mark.usefixtures("mini")
IID = """\
schema: 1
output: iid
shards: [pool]
rounds: 2
train: {model: mini, batch: 4, steps: 3, eval-shards: [held], eval-every: 1}
"""
JEST = """\
schema: 1
output: jest
shards: [pool]
reference: {train: {shards: [clean], model: mini, batch: 4, steps: 2}}
rounds: 2
score: {criterion: learnability, keep: 0.5, deduplicate: off}
train:
  model: mini
  batch: 4
  steps: 3
  eval-shards: [held]
  eval-every: 1
  baselines: [iid]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both recipes, finished, with what they are made of."""
    root = tmp_path_factory.mktemp("baselines")
    for name, count, seed in (("pool", 24, 0), ("clean", 8, 900), ("held", 8, 5000)):
        (root / name).mkdir()
        make_tar(root / name / "0.tar", make_samples(count, start=seed))
    (root / "iid.yaml").write_text(IID)
    (root / "jest.yaml").write_text(JEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.CONFIGS, "mini", MINI)
        patch.chdir(root)
        curate.run("iid.yaml", engine="inline")
        curate.run("jest.yaml", engine="inline")
    return root


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name paths from the directory where one is."""
    monkeypatch.chdir(place)


def options(change: str, rounds: int = 2) -> list[Any]:
    """The baselines of each round of the recipe with selection, under other ones given."""
    recipe = read_recipe(Path("jest.yaml"), [f"train.baselines={change}", f"rounds={rounds}"])
    return [one.train.options.get("baselines") for one in plan_rounds(recipe, Path("out")).rounds]


def test_every_round_stands_beside_the_same_round(place: Path) -> None:
    """A recipe as a baseline: its round 1 beside round 1, its round 2 beside round 2; each report states a result."""
    assert options("[iid]") == [("iid/round-1/learner",), ("iid/round-2/learner",)]
    for number in (1, 2):
        runs = [read_history(place / name / f"round-{number}/learner") for name in ("jest", "iid")]
        race = compare(runs[:1], runs[1:], "recall", 0.0, name="JEST")
        assert [(ours.path, theirs.path) for ours, theirs in race.pairs] == [(runs[0].path, runs[1].path)]
        page = (place / f"jest/round-{number}/learner/report.html").read_text()
        assert "Against IID" in page
        assert f"Selection, seed {number - 1}, against IID, seed {number - 1}" in page
        assert "the same seed" not in page


def test_a_round_is_charged_with_what_led_to_it(place: Path) -> None:
    """Before round 2 came the fit of the reference, two scoring passes and a training: sums of the summary."""
    rows = json.loads((place / "jest/summary.json").read_bytes())["rounds"]
    assert [row["name"] for row in rows] == ["reference", "1", "2"]
    whole = {name: sum(row["flops"][name] for row in rows) for name in ("reference", "scoring", "training")}
    history = read_history(place / "jest/round-2/learner")
    own = CostLedger.from_json(history.end["ledger"] if history.end else None)
    before = history.before
    assert before.reference.flops == pytest.approx(whole["reference"])
    assert before.scoring.flops == pytest.approx(whole["scoring"])
    trained = before.training.flops + before.training.optimiser + own.training.flops + own.training.optimiser
    assert trained == pytest.approx(whole["training"])
    assert "Spent before" in (place / "jest/round-2/learner/report.html").read_text()
    assert "Spent before" not in (place / "iid/round-1/learner/report.html").read_text()
    start = next(line for line in read_log(place / "iid/round-1/learner/log.jsonl") if line["kind"] == "start")
    assert CostLedger.from_json(start["before"]) == CostLedger()


def test_the_charge_is_in_every_comparison(place: Path) -> None:
    """At a target that both had at once, what is compared is what was spent before, and an evaluation's own part."""
    ours, theirs = (read_history(place / name / "round-2/learner") for name in ("jest", "iid"))
    race = compare([ours], [theirs], "recall", 0.0, name="JEST")
    assert race.statement is not None
    first = [CostLedger.from_json(run.evals[0]["ledger"]) + run.before for run in (ours, theirs)]
    assert race.statement.ratio == pytest.approx(first[1].flops() / first[0].flops())
    assert race.statement.iid == pytest.approx(first[1].flops())
    assert [level.budget for level in race.levels] == ["equal iterations", "equal candidates"]
    whole = theirs.before.flops() + theirs.evals[-1]["flops"]
    assert ours.before.flops() > whole  # so there are no equal FLOPs to compare at
    assert spent_at(theirs, theirs.evals[-1], "flops") == whole


def test_runs_of_train_stand_beside_the_round_of_their_seed() -> None:
    """Two plain runs, in any order, and a recipe with them; what no round could use is refused."""
    assert options("[iid/round-2/learner, iid/round-1/learner]") == [
        ("iid/round-1/learner",), ("iid/round-2/learner",),
    ]  # fmt: skip
    assert options("[iid/round-1/learner]") == [("iid/round-1/learner",), None]
    assert options("[iid]", rounds=1) == [("iid/round-1/learner",)]


@pytest.mark.parametrize(
    ("change", "rounds", "message"),
    [
        ("[nowhere]", 2, r"--set .*: train.baselines: nowhere: no log.jsonl can be read"),
        ("[iid]", 3, r"iid has no round 3; give it as many as here first, --set rounds=3"),
        ("[iid/round-2/learner]", 1, r"iid/round-2/learner has seed 1, the round has 0; runs are compared by seed"),
        ("[iid]\ntrain.seed=5", 2, r"iid/round-1/learner has seed 0, the round here 5; .* the same train.seed"),
    ],
)
def test_a_baseline_of_no_round_is_refused(change: str, rounds: int, message: str, tmp_path: Path) -> None:
    """Said with field and place before anything starts, and before anything is written."""
    changes = [f"train.baselines={change.split(chr(10))[0]}", f"rounds={rounds}", *change.split("\n")[1:]]
    with pytest.raises(UsageError, match=message):
        curate.run("jest.yaml", tmp_path / "new", changes=changes)
    assert not (tmp_path / "new").exists()
