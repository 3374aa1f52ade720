"""`curate run`: rounds of score, train and evaluate from a recipe; interrupted, resumed, extended, refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import curate
from curate.cli import main
from curate.demonstration.corpus import draw_corpus
from curate.errors import RunMismatch, UsageError
from curate.learner.engine import Progress
from curate.models import configs
from curate.models.load import load_model
from curate.pipelines import rounds
from curate.receipts import Store
from curate.recipe import read_recipe
from tests.conftest import MINI
from tests.making import make_samples, make_tar

pytestmark = pytest.mark.usefixtures("mini")
EXAMPLE = Path(__file__).parents[2] / "examples" / "recipe.yaml"
WEIGHTS = "open_clip_model.safetensors"
RECIPE = """\
schema: 1
output: mine
shards: [pool]
reference: {train: {shards: [clean], model: mini, batch: 4, steps: 2}}
rounds: 2
score: {criterion: learnability, keep: 0.5, deduplicate: off}
train:
  model: mini
  batch: 4
  steps: 3
  checkpoint-every: 2
eval: {retrieval: [clean]}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe, a pool of 2 x 12 pairs and 8 clean ones."""
    root = tmp_path_factory.mktemp("recipe")
    for shard in range(2):
        make_tar(_folder(root / "pool") / f"{shard}.tar", make_samples(12, start=100 * shard))
    make_tar(_folder(root / "clean") / "0.tar", make_samples(8, start=900))
    (root / "recipe.yaml").write_text(RECIPE)
    return root


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name paths from the directory where one is."""
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The output of the recipe, run without a break."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.CONFIGS, "mini", MINI)
        patch.chdir(place)
        curate.run("recipe.yaml", engine="inline")
    return place / "mine"


def call(*words: object) -> int:
    return main(["run", "recipe.yaml", *map(str, words), *(() if "--dry-run" in words else ("--engine", "inline"))])


def test_two_rounds(finished: Path) -> None:
    """Round 1 goes by easy-reference; round 2 is scored with round 1's learner and stored embeddings, and goes on."""
    runs = [json.loads((finished / f"round-{n}/filtered/_curate/RUN.json").read_bytes()) for n in (1, 2)]
    assert [run["settings"]["select"]["criterion"] for run in runs] == ["easy-reference", "learnability"]
    assert runs[1]["settings"]["score"]["learner"] == str(finished / "round-1" / "learner")
    cached = [
        {receipt.facts["reference_cached"] for receipt in Store.of(finished / f"round-{n}/filtered").receipts("score")}
        for n in (1, 2)
    ]
    assert cached == [{False}, {True}]
    trained = json.loads((finished / "round-2/learner/_curate/TRAIN.json").read_bytes())
    assert trained["settings"]["model"] == str(finished / "round-1" / "learner")
    assert {Path(source["url"]).parent for source in trained["inputs"]} == {finished / "round-2" / "filtered"}
    assert load_model(f"local-dir:{finished}/round-2/learner").loss == "sigmoid"


def test_the_summary_counts_what_each_phase_cost(finished: Path) -> None:
    """A row for the reference and each round; embedding with the reference is paid for once."""
    summary = json.loads((finished / "summary.json").read_bytes())
    reference, first, second = summary["rounds"]
    assert [row["name"] for row in summary["rounds"]] == ["reference", "1", "2"]
    assert [(row["pairs"], row["kept"], row["steps"], row["samples"]) for row in (first, second)] == [
        (24, 12, 3, 12)
    ] * 2
    assert reference["flops"]["reference"] > 0
    assert first["flops"]["reference"] > 0 < first["flops"]["training"]
    assert second["flops"]["reference"] == 0 < first["flops"]["scoring"] < second["flops"]["scoring"]
    for row in summary["rounds"]:
        assert set(row["metrics"]) == {"image>text@1", "text>image@1"}
        assert row["seconds"] > 0
    assert summary["flops"]["training"] == first["flops"]["training"] + second["flops"]["training"]


def test_a_finished_recipe_is_not_run_again(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command prints the same table and calls nothing."""
    before = (finished / "summary.json").read_bytes()
    for name in ("score", "train", "evaluate"):
        monkeypatch.setattr(rounds, name, None)
    assert call() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["round", "in", "kept", "steps", "loss"]
    assert [line.split()[0] for line in lines[1:5]] == ["reference", "1", "2", "all"]
    assert lines[-1] == f"local-dir:{finished}/round-2/learner"
    assert (finished / "summary.json").read_bytes() == before
    assert call("--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before)


def test_an_interrupted_recipe_goes_on_to_the_same_bits(
    finished: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGINT in the second step of the last training ends with 130; the same command ends as if nothing had been."""
    at = place / "interrupted" / "round-2"

    @contextlib.contextmanager
    def bar() -> Iterator[Any]:
        def report(state: Progress) -> None:
            if state.step == 2 and at.exists():
                os.kill(os.getpid(), signal.SIGINT)

        yield report

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "training_bar", bar)
        assert call("-o", "interrupted") == 130
    assert not (at / "learner" / WEIGHTS).exists()
    assert len(json.loads((place / "interrupted" / "summary.json").read_bytes())["rounds"]) == 2
    assert call("-o", "interrupted", "--dry-run") == 0
    states = [line.rpartition(" [")[2] for line in capsys.readouterr().out.splitlines()]
    assert states == ["done]"] * 5 + ["begun]", "to do]"]
    assert call("-o", "interrupted") == 0
    for part in ("reference", "round-1/learner", "round-2/learner"):
        assert (place / "interrupted" / part / WEIGHTS).read_bytes() == (finished / part / WEIGHTS).read_bytes(), part
    for name in ("round-1", "round-2"):
        tars = [sorted((out / name / "filtered").glob("*.tar")) for out in (finished, place / "interrupted")]
        assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]] != []


def test_a_changed_recipe_is_refused_by_its_difference(finished: Path) -> None:
    """Steps, fewer rounds, other shards: each is named. A tolerance changes no result and passes."""
    for change, named in (
        ("train.steps=4", "train.steps: 3 there, 4 now"),
        ("reference.train.steps=3", "reference.train.steps: 2 there, 3 now"),
        ("rounds=1", "rounds: 2 there, 1 now"),
        ("shards=[pool/0.tar]", "inputs.shards: 2 there, 1 now"),
    ):
        with pytest.raises(RunMismatch) as caught:
            curate.run("recipe.yaml", changes=[change], engine="inline")
        assert named in str(caught.value)
        assert str(finished) in str(caught.value)
    assert curate.run("recipe.yaml", changes=["score.tolerance=0.5"], engine="inline").model.name == "learner"


def test_rounds_may_be_added(finished: Path, place: Path) -> None:
    """With three rounds instead of two, the third is run and the others are as they were."""
    longer = shutil.copytree(finished, place / "longer")
    result = curate.run("recipe.yaml", longer, changes=["rounds=3"], engine="inline")
    assert [row.name for row in result.rows] == ["reference", "1", "2", "3"]
    assert (longer / "round-2/learner" / WEIGHTS).read_bytes() == (finished / "round-2/learner" / WEIGHTS).read_bytes()
    assert json.loads((longer / "recipe.json").read_bytes())["rounds"] == 3


def test_online_selection_from_the_pool(place: Path) -> None:
    """Without a score section the learner draws its own batches; the reference scores the pool in round 1 only."""
    text = RECIPE.replace("score: {criterion: learnability, keep: 0.5, deduplicate: off}\n", "")
    text = text.replace("checkpoint-every: 2", "filter-ratio: 0.5\n  write-shards: true").replace(
        "output: mine", "output: online"
    )
    (place / "online.yaml").write_text(text)
    result = curate.run("online.yaml", engine="inline")
    _, first, second = result.rows
    assert (first.pairs, first.kept, first.steps) == (None, None, 3)
    assert first.flops["reference"] > 0 == second.flops["reference"]
    assert min(first.flops["scoring"], second.flops["scoring"]) > 0
    for number in (1, 2):
        assert (place / "online" / f"round-{number}" / "chosen" / "_curate" / "SUCCESS.json").is_file()


def test_what_cannot_be_is_said_before_anything_starts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown key, a model or shards that are not there: exit code 2, file, line and field, and no directory."""
    for old, new, named in (
        ("  steps: 3", "  step: 3", "bad.yaml:10: train.step: unknown; did you mean 'steps'?"),
        ("  model: mini", "  model: maxi", "bad.yaml:8: train.model: model 'maxi': no architecture is called 'maxi'"),
        ("[pool]", "[pond]", "bad.yaml:3: shards: shard "),
        ("retrieval: [clean]", "zeroshot: [clean]", "bad.yaml:12: eval.zeroshot: "),
        ("rounds: 2", "rounds: 2\nrounds: 3", "bad.yaml:6: rounds is given twice"),
    ):
        (place / "bad.yaml").write_text(RECIPE.replace(old, new).replace("mine", "bad"))
        for words in ((), ("--dry-run",)):
            assert main(["run", "bad.yaml", *words]) == 2
            assert f"curate: {named}" in capsys.readouterr().err
    assert not (place / "bad").exists()


def test_a_policy_is_an_input_like_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in a policy of any section is told before anything starts; text and labels are pinned."""
    (place / "labels.csv").write_text("key,side\n000000000,few\n")
    columns = "columns: [{column: side, source: a test, groups: [few], min_ratio: 0.5}]"
    head = "schema: 1\nauthor: A. Expert\ndate: 2026-11-22\nrationale: a test\n"
    recipe = RECIPE.replace("mine", "bad").replace("keep: 0.5", "keep: 0.5, labels: labels.csv, policy: p.yaml")
    for text, policy, named in (
        (recipe, columns.replace("few", "fex"), "bad.yaml:6: score.policy: p.yaml:5: columns.0.groups.0: no group"),
        (recipe.replace("policy: p.yaml", "gain: 9"), columns, "bad.yaml:6: score.labels: --labels: labels give gro"),
        (RECIPE.replace("  steps: 3", "  steps: 3\n  policy: q.yaml"), columns, "bad.yaml:11: train.policy: "),
    ):
        (place / "bad.yaml").write_text(text)
        (place / "p.yaml").write_text(head + policy)
        assert main(["run", "bad.yaml"]) == 2
        assert f"curate: {named}" in capsys.readouterr().err.replace(f"{place}/", "")
    (place / "bad.yaml").write_text(recipe)
    found = rounds.check_inputs(read_recipe(place / "bad.yaml"))["score.policy"]
    assert found["text"] == head + columns
    assert found["labels"] == hashlib.sha256((place / "labels.csv").read_bytes()).hexdigest()
    assert not (place / "bad").exists()


def test_a_foreign_directory_is_left_alone(place: Path) -> None:
    """A directory that holds something else is refused, also with overwrite; a run is begun anew with it."""
    (_folder(place / "foreign") / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and holds no run of a recipe"):
            curate.run("recipe.yaml", "foreign", overwrite=overwrite)
    again = place / "again"
    changes = ["rounds=1", "train.steps=1"]
    curate.run("recipe.yaml", again, changes=["rounds=1"], engine="inline")
    assert curate.run("recipe.yaml", again, changes=changes, overwrite=True, engine="inline").rows[-1].steps == 1


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/recipe.yaml runs on the demo's corpus, here of 60 pairs and a few steps."""
    draw_corpus(tmp_path / "demo" / "corpus", samples=60, shards=2, clean_reference=20, held_out=20, side=32)
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(EXAMPLE), "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    small = ["model=mini", "batch=8", "steps=2"]
    words = [f"{part}.{setting}" for part in ("train", "reference.train") for setting in small]
    words += ["eval.pool=10", "score.tolerance=1"]
    assert main(["run", str(EXAMPLE), "--engine", "inline", *(w for word in words for w in ("--set", word))]) == 0
    assert (tmp_path / "runs" / "mine" / "round-2" / "learner" / WEIGHTS).is_file()


def test_fast_layers_are_gone_on_from() -> None:
    """The second round is scored with, and goes on from, a learner with fast feedforward layers."""
    result = curate.run("recipe.yaml", "fast", changes=["train.ffn=fff", "train.ffn_depth=1"], engine="inline")
    assert [row.name for row in result.rows] == ["reference", "1", "2"]
    assert all((Path("fast") / f"round-{n}/learner/curate_feedforward.json").is_file() for n in (1, 2))
