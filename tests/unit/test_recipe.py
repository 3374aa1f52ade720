"""Recipes: what YAML is read, what is refused with which line, and what the rounds then are."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from curate import recipe as recipes
from curate.errors import UsageError
from curate.marked_yaml import LARGEST, parse_yaml, read_yaml
from curate.pipelines import rounds, runner
from curate.pipelines.round_plan import plan_rounds
from curate.recipe import Recipe, check_recipe, read_recipe

HEAD = "schema: 1\noutput: out\nshards: pool/\nreference: small\nrounds: 2\n"  # five lines
OUT = Path("/out")


def recipe(text: str) -> Recipe:
    return check_recipe(parse_yaml(HEAD + text, "r.yaml"))


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        recipe(text)
    return str(caught.value)


def test_scalars_are_those_of_yaml_1_2() -> None:
    """`on` is text, 1e-3 is a number, a date is text, quotes make text; each place knows its line."""
    marked = parse_yaml("a: on\nb: 1e-3\nc: 2020-01-01\nd: '5'\ne: [0x1f, .5, ~,\n  true]\nf-g: -7\n", "r.yaml")
    assert marked.value == {"a": "on", "b": 1e-3, "c": "2020-01-01", "d": "5", "e": [31, 0.5, None, True], "f_g": -7}
    assert [marked.at("b"), marked.at("e", 3), marked.at("f_g", "x", "y")] == ["r.yaml:2", "r.yaml:6", "r.yaml:7"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml:3: a is given twice (first: r.yaml:1)"),
        ("x:\n  a-b: 1\n  a_b: 2", "r.yaml:3: x.a_b is given twice (first: r.yaml:2)"),
        ("a: &x [1]\nb: *x", "r.yaml:1: anchors and aliases"),
        ("a: *x", "r.yaml:1: anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "r.yaml:1: the tag tag:yaml.org,2002:python/object"),
        ("a: !!int x", "r.yaml:1: 'x' is not of the kind"),
        ("a: " + "9" * 5000, "or too long"),
        ("a: [1", "r.yaml:1: "),
        ("a: 1\n---\nb: 2", "r.yaml:2: "),
        ("[1]: 2", "r.yaml:1: a key is a word"),
        ("1: 2", "r.yaml:1: a key is a word"),
        ("a: \x00", "r.yaml: unacceptable character"),
        ("[" * 2_000, "r.yaml: nested too deep"),
    ],
)
def test_yaml_that_is_not_read_is_named_with_its_line(text: str, message: str) -> None:
    """Doubled keys, anchors, tags, torn or foreign documents are usage errors, never tracebacks."""
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "r.yaml")
    assert message in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    """A missing file, a large one, a folder and bytes that are no text are refused by name."""
    large, binary = tmp_path / "large.yaml", tmp_path / "binary.yaml"
    large.write_text("a: " + "x" * LARGEST)
    binary.write_bytes(b"a: \xff")
    for path, message in (
        (tmp_path / "none.yaml", "No such file"),
        (large, "larger than 65,536 bytes"),
        (binary, "not UTF-8 at byte 3"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(UsageError, match=message):
            read_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  batch: 8\n  step: 5", "r.yaml:8: train.step: unknown; did you mean 'steps'?"),
        ("train:\n  reference: x", "r.yaml:7: train.reference: unknown"),
        ("tra: {}", "r.yaml:6: tra: unknown; did you mean 'train'?; r.yaml:1: train: is missing"),
        ("train:\n  steps: '5'", "r.yaml:7: train.steps: '5': Input should be a valid integer"),
        ("train:\n  steps: true", "r.yaml:7: train.steps: True: Input should be a valid integer"),
        ("train:\n  lr: .inf", "r.yaml:7: train.lr: inf: Input should be a finite number"),
        ("train:\n  lr: 1e-3\n  batch: 1", "r.yaml:8: train.batch: batch 1 holds no negative pair"),
        ("train:\n  criterion: uniform\n  lag: 2", "train.criterion: a lag of scores means nothing"),
        (
            "train:\n  criterion: alignment",
            "r.yaml:7: train.criterion: criterion 'alignment' needs a small trusted set",
        ),
        ("train: [1]", "r.yaml:6: train: keys and values are expected here"),
        ("train:\n  shards: [a, 1]", "r.yaml:7: train.shards.1: 1: Input should be a valid string"),
        ("train:\n  shards: []", "r.yaml:7: train.shards: []: Value should have at least 1 item"),
        (
            "train: {}\nscore:\n  keep: 5\n  gain: -1",
            "r.yaml:8: score.keep: 5: Input should be less than or equal to 1",
        ),
        ("train: {}\nscore:\n  keep: 5\n  gain: -1", "; r.yaml:9: score.gain: -1"),
        ("train: {}\nscore: {keep: 0.1, sub_batch: 3}", "r.yaml:7: score.sub_batch: keep and sub_batch both"),
        ("train: {}\nscore: {super_batch: 4, sub_batch: 5}", "r.yaml:7: score.sub_batch: 5 is larger"),
        ("train: {}\nscore:\n  criterion: alignment", "r.yaml:8: score.criterion: alignment needs a small trusted set"),
        (
            "train:\n  policy: p\n  labels: l\nscore: {}",
            "r.yaml:8: train.labels: keys and sample ids are new in the shards that `score` writes",
        ),
        ("train: {}\neval:", "r.yaml:7: eval: nothing to measure"),
        ("train: {}\neval: {zeroshot: a, pool: 3}", "r.yaml:7: eval.pool: would do nothing without retrieval"),
    ],
)
def test_a_refusal_names_file_line_and_field(text: str, message: str) -> None:
    """Unknown keys, wrong types, impossible values and values that do not go together: line and field are named."""
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: a recipe has keys and values"),
        ("- 1", "r.yaml:1: a recipe has keys and values"),
        ("schema: 2\noutput: o\nshards: a\ntrain: {}", "r.yaml:1: schema: 2: Input should be 1"),
        ("schema: 1\noutput: o\nshards: a\ntrain: {}\nrounds: 0", "r.yaml:5: rounds: 0"),
        ("schema: 1\noutput: o\nshards: a\ntrain: {}\nscore:", "r.yaml:5: score: needs a reference"),
        ("schema: 1\noutput: o\nshards: a\nreference: 3\ntrain: {}", "r.yaml:4: reference: the name of a model, or"),
        ("schema: 1\noutput: o\nshards: a\nreference:\n  train: {}\ntrain: {}", "reference.train.shards: is missing"),
        (
            "schema: 1\noutput: o\nshards: a\nreference:\n  train:\n    shards: b\n    criterion: learnability\ntrain:",
            "r.yaml:7: reference.train.criterion: criterion 'learnability' needs a reference model; name it with ref",
        ),
    ],
)
def test_a_whole_file_that_is_no_recipe(text: str, message: str) -> None:
    """The top level has a schema, sections are sections, and what needs a reference says so."""
    with pytest.raises(UsageError) as caught:
        check_recipe(parse_yaml(text, "r.yaml"))
    assert message in str(caught.value)


def test_the_score_section_has_the_options_of_score() -> None:
    """What `score` takes and a recipe does not settle itself is a key, under the same name."""
    ours = {"shards", "output", "reference", "scores_only", "overwrite", "quiet"}
    ours |= {"workers", "scheduler", "engine", "allow_remote_scheduler"}
    assert set(recipes._SCORE.model_fields) == set(inspect.signature(runner.score).parameters) - ours


def test_the_eval_section_has_the_options_of_evaluate() -> None:
    """Likewise for `evaluate`."""
    assert set(recipes._Eval.model_fields) == set(inspect.signature(rounds.evaluate).parameters) - {
        "checkpoint", "device", "quiet"
    }  # fmt: skip


def test_changes_replace_fields(tmp_path: Path) -> None:
    """--set changes or adds a field; an error about it names the option instead of a line."""
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + "train: {steps: 5}\n")
    changed = read_recipe(path, ["train.steps=7", "score.keep=0.1", "train.betas=[0.5, 0.6]", "train.filter-ratio=.5"])
    assert changed.score == {"keep": 0.1}
    assert changed.train == {"steps": 7, "betas": (0.5, 0.6), "filter_ratio": 0.5}
    for change, message in (
        ("train.steps=x", "--set train.steps=x: train.steps: 'x': Input should be a valid integer"),
        ("train.stepz=1", "--set train.stepz=1: train.stepz: unknown"),
        ("tran.x=1", "--set tran.x=1: tran: unknown"),
        ("rounds.x=1", "--set rounds.x=1: there is no 'x' below a value"),
        ("train.steps", "write FIELD=VALUE"),
        ("train.steps=[", "--set train.steps=[:1: "),
    ):
        with pytest.raises(UsageError) as caught:
            read_recipe(path, [change])
        assert message in str(caught.value)


def options(text: str, part: str) -> list[dict[str, Any]]:
    """The options of a part in each round."""
    return [getattr(one, part).options for one in plan_rounds(recipe(text), OUT).rounds]


def test_each_round_scores_with_the_learner_of_the_one_before() -> None:
    """Round 1 falls back to easy-reference; round 2 has round 1's learner and stored embeddings, and another seed."""
    first, second = options("score: {criterion: learnability, gain: 50, seed: 7}\ntrain: {}", "score")
    assert first == {"criterion": "easy-reference", "gain": 50, "seed": 7} | {
        "reference": "small", "learner": None, "reference_cache": None
    }  # fmt: skip
    assert second == {"criterion": "learnability", "gain": 50, "seed": 8} | {
        "reference": "small", "learner": "/out/round-1/learner", "reference_cache": "/out/round-1/filtered"
    }  # fmt: skip


def test_alignment_leaves_nothing_of_itself_in_a_round_without_a_learner() -> None:
    """Its trusted set needs a learner and its gain has other units; both come back in round 2."""
    first, second = options("score: {criterion: alignment, trusted: t/, gain: 3}\ntrain: {}", "score")
    assert not {"trusted", "gain"} & first.keys()
    assert (second["trusted"], second["gain"], second["criterion"]) == (("t/",), 3, "alignment")


def test_a_learner_given_is_scored_with_in_round_1(tiny_checkpoint: Path) -> None:
    """`score.learner`, or a trained `train.model`, is scored with at once; easy-reference leaves it out."""
    for text, learner in (
        (f"score: {{criterion: learnability}}\ntrain: {{model: {tiny_checkpoint}}}", str(tiny_checkpoint)),
        (f"score: {{learner: x}}\ntrain: {{model: {tiny_checkpoint}}}", "x"),
        ("score: {learner: x, criterion: easy-reference}\ntrain: {}", None),
    ):
        assert options(text, "score")[0]["learner"] == learner


def test_training_goes_on_unless_it_is_to_begin_anew() -> None:
    """Round 2 starts from round 1's learner on its own filtered shards; `fresh` starts from the model again."""
    plan = plan_rounds(recipe("score: {}\ntrain: {model: curate-tiny, steps: 5}"), OUT)
    first, second = (one.train for one in plan.rounds)
    assert (first.shards, second.shards) == (("/out/round-1/filtered",), ("/out/round-2/filtered",))
    assert (first.options["model"], second.options["model"]) == ("curate-tiny", "/out/round-1/learner")
    assert first.options["criterion"] == "uniform"
    assert "reference" not in first.options
    assert [o["model"] for o in options("score: {}\ntrain: {model: curate-tiny, fresh: true}", "train")] == [
        "curate-tiny"
    ] * 2


def test_without_scoring_training_draws_from_the_pool() -> None:
    """The online form: learnability on the pool; round 2 reads the reference's scores of round 1."""
    plan = plan_rounds(recipe("train: {steps: 5, write_shards: true}"), OUT)
    first, second = (one.train for one in plan.rounds)
    assert [one.score for one in plan.rounds] == [None, None]
    assert first.shards == second.shards == ("pool/",)
    assert (first.options["criterion"], first.options["reference"]) == ("learnability", "small")
    assert first.options["reference_cache"] is None
    assert second.options["reference_cache"] == "/out/round-1/learner/_curate/reference"
    assert second.options["write_shards"] == "/out/round-2/chosen"


def test_a_policy_of_the_training_is_handed_on() -> None:
    """`train.policy`, `train.labels` and `train.on` are those of `curate train`; a round without them has none."""
    text = "train: {policy: p.yaml, labels: l.csv, on: uid}"
    given = [(o["policy"], o["labels"], o["on"]) for o in options(text, "train")]
    assert given == [("p.yaml", "l.csv", "uid")] * 2
    assert not {"policy", "labels", "on"} & set(options("train: {}", "train")[0])


def test_a_fitted_reference_comes_first() -> None:
    """`reference.train` is a part of its own, and what it leaves is the reference of every round."""
    text = "schema: 1\noutput: o\nshards: a\nreference: {train: {shards: c/, steps: 3}}\n"
    text += "score: {}\ntrain: {}\neval: {retrieval: b}"
    plan = plan_rounds(check_recipe(parse_yaml(text, "r.yaml")), OUT)
    assert plan.fit is not None
    assert (plan.fit.shards, plan.fit.output, plan.fit.options) == (("c/",), OUT / "reference", {"steps": 3})
    assert plan.rounds[0].score is not None
    assert plan.rounds[0].score.options["reference"] == "/out/reference"
    assert [line.split()[:2] for line in plan.lines] == [["reference", "fit"], *[["round", "1"]] * 3]
    assert all(line.endswith("[to do]") for line in plan.lines)


def test_seconds_of_interrupted_calls_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that failed is not done; when it is, its time is that of all calls, and it is not done again."""
    now = iter([0.0, 5.0, 100.0, 102.0])
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: next(now))
    receipt = tmp_path / "round-1-train.json"

    def fails() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rounds._once(receipt, tmp_path, fails)
    assert not receipt.exists()
    assert rounds._once(receipt, tmp_path, lambda: {"steps": 3}) == {"steps": 3, "seconds": 7.0}
    assert rounds._once(receipt, tmp_path, fails) == {"steps": 3, "seconds": 7.0}
    assert [path.name for path in tmp_path.iterdir()] == [receipt.name]
