"""`curate run --overwrite`: the earlier rounds are whole until the recipe in their place is known to be possible."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import curate
from curate.errors import RunMismatch, UsageError
from curate.models import configs
from curate.pipelines import round_place, round_policing
from tests.conftest import MINI
from tests.e2e.policies import make_captioned_pool, write_labels, write_policy
from tests.making import make_samples, make_tar

pytestmark = pytest.mark.usefixtures("mini")
RECIPE = """\
schema: 1
output: out
shards: [pool]
reference: REFERENCE
rounds: 1
score: {keep: 0.5, super_batch: 50, chunks: 4}
train: {model: mini, batch: 4, steps: 2}
eval: {retrieval: [clean]}
"""
POLICY = {"score.policy": "p.yaml", "score.labels": "labels.csv"}
ONLINE = {"shards": "[pool]", "train.policy": "p.yaml", "train.labels": "labels.csv"}


@pytest.fixture(scope="module")
def place(tiny_checkpoint: Path, tiny_softmax_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pairs of which a quarter are "b", and a recipe of one round that has been run."""
    root = tmp_path_factory.mktemp("recipe")
    make_captioned_pool(root / "pool", lambda n: f"a thing with number {n}")
    (root / "clean").mkdir()
    make_tar(root / "clean" / "0.tar", make_samples(8, start=900))
    (root / "bad").mkdir()
    make_tar(root / "bad" / "0.tar", [("x", {"jpg": b"no image"})])
    write_labels(root / "labels.csv", {"half": lambda n: "ab"[n % 4 == 1]})
    shutil.copytree(tiny_checkpoint, root / "hollow")
    (root / "hollow" / "open_clip_model.safetensors").write_bytes(b"no weights")
    shutil.copytree(tiny_softmax_checkpoint, root / "softmax")
    (root / "recipe.yaml").write_text(RECIPE.replace("REFERENCE", str(tiny_checkpoint)))
    (root / "online.yaml").write_text(RECIPE.replace("REFERENCE", str(tiny_checkpoint)).replace("score:", "#"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.CONFIGS, "mini", MINI)
        patch.chdir(root)
        curate.run("recipe.yaml", "finished", engine="inline")
    return root


@pytest.fixture(autouse=True)
def earlier(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that may be harmed, in the directory where one is."""
    monkeypatch.chdir(place)
    shutil.rmtree(place / "out", ignore_errors=True)
    return shutil.copytree(place / "finished", place / "out")


def overwrite(recipe: str = "recipe.yaml", **changes: Any) -> Any:
    words = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return curate.run(recipe, changes=words, overwrite=True, engine="inline")


def everything(output: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def made(output: Path) -> dict[str, str]:
    """What comes out: the shards that were written, the weights, and the recipe."""
    kinds = (".tar", "open_clip_model.safetensors", "recipe.json")
    return {name: digest for name, digest in everything(output).items() if name.endswith(kinds)}


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("recipe", POLICY, r"score.policy: round 1: .*no selection can keep it: half=b at least 31 of 30"),
        ("recipe", POLICY | {"score.deduplicate": "near", "score.policy": "other.yaml"}, r"no column .*'nowhere'"),
        ("online", ONLINE, r"train.policy: .*half=b"),
        ("recipe", {"shards": "[bad]"}, r"shards: no readable pair in 1 shards"),
        ("recipe", {"eval.retrieval": "[bad]"}, r"eval.retrieval: no readable pair in 1 shards"),
        ("recipe", {"score.trusted": "[bad]", "rounds": 2}, r"score.trusted: no readable pair in 1 shards"),
        ("online", {"train.trusted": "[bad]", "train.criterion": "alignment"}, r"train: no readable pair in 1 shards"),
        ("recipe", {"train.eval_shards": "[bad]"}, r"train: no readable pair in 1 shards"),
        ("online", {"shards": "[bad]"}, r"train: no readable pair in 1 shards"),
        ("recipe", {"reference": "{train: {shards: [bad], model: mini}}"}, r"reference.train: no readable pair"),
        ("online", {"train.batch": 100}, r"train: 120 candidates are fewer than a super-batch of 500"),
        ("recipe", {"reference": "hollow"}, r"reference: .*hollow"),
        ("online", {"reference": "hollow"}, r"train: .*hollow"),
        ("recipe", {"reference": "softmax", "rounds": 2}, r"score.loss: the reference has the softmax loss.*round 2"),
        (
            "online",
            {"reference": "{train: {shards: [clean], model: mini, loss: softmax}}"},
            r"train.loss: the reference has the softmax loss, the learner is to be trained with sigmoid",
        ),
        ("recipe", {"score.reference_cache": "other"}, r"score: --reference-cache .*other was made by"),
        ("recipe", {"shards": "[out/round-1/filtered]"}, r"shards: --overwrite would remove .*out/round-1/filtered"),
        ("recipe", {"shards": "[link/round-1/filtered]"}, r"shards: --overwrite would remove .*link/round-1/filtered"),
        ("recipe", {"train.model": "out/round-1/learner"}, r"train.model: --overwrite would remove"),
        ("recipe", {"reference": "out/round-1/learner"}, r"reference: --overwrite would remove"),
        ("recipe", {"score.reference_cache": "out/round-1/filtered"}, r"score.reference_cache: --overwrite would"),
        ("recipe", {"train.baselines": "[out]"}, r"train.baselines: --overwrite would remove"),
        ("recipe", {"score.labels": "out/summary.json", "score.policy": "p.yaml"}, r"score.policy: .*summary"),
    ],
)  # fmt: skip
def test_what_can_be_known_costs_the_earlier_run_nothing(
    place: Path, earlier: Path, recipe: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the line before anything is scored or trained, the earlier run has all its bytes, and no more."""
    write_policy(place / "p.yaml", {"half": {"b": {"min_count": 31}}})
    write_policy(place / "other.yaml", {"nowhere": {"b": {"min_count": 1}}})
    (place / "link").unlink(missing_ok=True)
    (place / "link").symlink_to(earlier)
    if "other" in changes.values() and not (place / "other").is_dir():
        curate.score(place / "pool", place / "other", reference=str(place / "softmax"), engine="inline")
    if recipe == "online" and "train.policy" in changes:
        write_policy(place / "p.yaml", {"half": {"b": {"min_ratio": 3.9}, "a": {"min_ratio": 1.0}}})
    before = everything(earlier)
    for name in ("score", "train"):
        monkeypatch.setattr(f"curate.pipelines.rounds.{name}", lambda *_, **__: pytest.fail("begun"))
    with pytest.raises(UsageError, match=message) as caught:
        overwrite(f"{recipe}.yaml", **changes)
    if "summary" not in message:  # a label file that is none is refused with the other inputs
        assert str(caught.value).endswith(f"The earlier run in {earlier} is as it was")
    assert everything(earlier) == before
    assert not (earlier / "_curate" / "next").exists()


def test_a_policy_that_can_be_met_takes_the_place(place: Path, earlier: Path) -> None:
    """After a refusal the mended policy makes what it makes in an empty directory."""
    write_policy(place / "p.yaml", {"half": {"b": {"min_count": 31}}})
    with pytest.raises(UsageError, match="no selection can keep it"):
        overwrite(**POLICY)
    write_policy(place / "p.yaml", {"half": {"b": {"min_count": 20}}})
    overwrite(**POLICY)
    curate.run("recipe.yaml", "fresh", changes=[f"{k}={v}" for k, v in POLICY.items()], engine="inline")
    assert made(earlier) == made(place / "fresh")
    assert sorted(path.name for path in (earlier / "_curate").iterdir()) == sorted(
        path.name for path in (place / "fresh/_curate").iterdir()
    )


def test_killed_while_it_looks(place: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier run is whole; what was looked at is not read a second time by the same command."""
    write_policy(place / "p.yaml", {"half": {"b": {"min_count": 20}}})
    before = everything(earlier)
    with monkeypatch.context() as killed:
        killed.setattr(round_policing, "rule_of", _die)
        with pytest.raises(_Killed):
            overwrite(**POLICY)
    assert {name: digest for name, digest in everything(earlier).items() if "/next/" not in name} == before
    monkeypatch.setattr("curate.pipelines.originals._describe", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr("curate.pipelines.rounds.score", _die)
    with pytest.raises(_Killed):
        overwrite(**POLICY)
    assert not (earlier / "_curate" / "next").exists()


@pytest.mark.parametrize("again", [True, False])
def test_killed_while_it_removes(place: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """With half of the earlier run gone, the same command, `--overwrite` or not, makes what a fresh run makes."""

    def half(path: Path, *_: Any) -> None:
        if path.name == "round-1":
            shutil.rmtree(path / "learner")
            raise _Killed
        _remove(path)

    _remove = round_place._remove
    with monkeypatch.context() as killed:
        killed.setattr(round_place, "_remove", half)
        with pytest.raises(_Killed):
            overwrite()
    assert (earlier / "round-1/filtered").is_dir()
    assert curate.pipelines.rounds.plan_recipe("recipe.yaml", changes=["train.steps=3"]).lines  # type: ignore[attr-defined]
    curate.run("recipe.yaml", overwrite=again, engine="inline")
    assert made(earlier) == made(place / "finished")


def test_any_moment_of_taking_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its n-th operation, for every n: the earlier run is whole, or the next call begins with nothing."""
    for number in range(100):
        output = _earlier(tmp_path / str(number))
        before = everything(output)
        with monkeypatch.context() as killed:
            _die_before(killed, number)
            try:
                round_place.begin(output, _record("new"), overwrite=True, check=lambda: None)
            except _Killed:
                pass
            else:
                break
        if everything(output) == before:
            with pytest.raises(RunMismatch):
                round_place.begin(output, _record("new"), overwrite=False, check=lambda: None)
            continue
        round_place.begin(output, _record("new"), overwrite=False, check=lambda: None)
        assert sorted(everything(output)) == ["mine.txt", "recipe.json"], number
    assert number > 6
    assert sorted(everything(output)) == ["mine.txt", "recipe.json"]


def _earlier(output: Path) -> Path:
    round_place.begin(output, _record("old"), overwrite=False, check=lambda: None)
    for name in ("round-1/filtered/0.tar", "reference/w", "_curate/round-1-score.json", "summary.json", "mine.txt"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    return output


def _record(name: str) -> dict[str, Any]:
    return {"recipe": {"train": name}, "inputs": {}, "rounds": 1, "digest": name}


class _Killed(BaseException):
    """Nothing catches it, as nothing catches a signal."""


def _die(*_: Any, **__: Any) -> None:
    raise _Killed


def _die_before(killed: pytest.MonkeyPatch, number: int) -> None:
    """Death in place of the operation of that number."""
    done: list[int] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            done.append(1)
            return _die() if len(done) > number else function(*given, **named)

        return called

    for name in ("make_directory", "replace_file", "put_if_absent", "remove", "sync_directory"):
        killed.setattr(round_place, name, counted(getattr(round_place, name)))
    killed.setattr(round_place.shutil, "rmtree", counted(shutil.rmtree))
