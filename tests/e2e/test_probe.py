"""`curate probe` from the command line: a report, a table, JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import curate
from curate.cli import main
from curate.errors import UsageError
from curate.models import configs
from tests.conftest import MINI
from tests.making import make_samples, make_tar


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs, one of whose images is broken."""
    rows = make_samples(12)
    rows[3] = (rows[3][0], {**rows[3][1], "jpg": b"not an image"})
    return make_tar(tmp_path_factory.mktemp("pairs") / "0.tar", rows)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of one call."""
    capsys.readouterr()
    code = main(["probe", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_report_ends_in_a_verdict(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, shard: Path) -> None:
    """Forward gradients on a whole model are hopeless, and the report says so with its figures."""
    code, out, _ = printed(capsys, shard, "--model", tiny_checkpoint, "--seeds", "3", "--tangents", "2")
    assert code == 0
    assert out.splitlines()[0] == f"{tiny_checkpoint}, sigmoid loss, one batch of 11 pairs"
    assert "K = 2" in out
    assert "E|g_hat|^2/|g|^2" in out
    assert "heads only, exact" in out
    assert out.splitlines()[-1].startswith("hopeless: below 0.5")


def test_all_is_a_table_with_those_that_cannot_run(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, shard: Path
) -> None:
    """Every estimator is measured or says why not; a hybrid joins when it has rules; JSON holds the same."""
    words = (shard, "--model", tiny_checkpoint, "--seeds", "2", "--batch", "6", "--estimator", "all")
    code, out, _ = printed(capsys, *words)
    assert code == 0
    measured = [line.split()[0] for line in out.splitlines()[2:]][:7]
    assert sorted(measured) == sorted(
        ["backprop", "backprop-checkpoint", "forward", "forward-dense", "forward-local", "local-backprop",
         "zeroth-order"]
    )  # fmt: skip
    assert "forward-activity: BatchNorm in training couples" in out
    assert "takes as many passes" in out or "take as many passes" in out
    code, out, _ = printed(capsys, *words, "--rules", "logit_*:exact,*:backprop", "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert {report["estimator"] for report in found["reports"]} == {*measured, "hybrid"}
    assert set(found["refused"]) == {"forward-activity", "forward-exact"}
    assert found["pairs"] == 6
    shares = [report["progress"] for report in found["reports"]]
    assert shares == sorted(shares, reverse=True)


def test_only_occurring_words_are_parameters(tiny_softmax_checkpoint: Path, shard: Path) -> None:
    """The vocabulary of 49,408 rows counts with the rows in use; the checkpoint's loss is its own."""
    result = curate.probe(str(shard), estimator="backprop", model=str(tiny_softmax_checkpoint), seeds=2)
    assert result.loss == "softmax"
    assert result.reports[0].dimensions < 49_408 * 32
    assert result.reports[0].cosine == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::curate.errors.CurateWarning")  # two steps teach nothing
def test_fast_layers_are_trained_and_probed_by_activity(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shard: Path, tmp_path: Path
) -> None:
    """`train --ffn fff --estimator forward-activity` leaves a checkpoint that `probe` measures with it."""
    patches = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    monkeypatch.setitem(configs.CONFIGS, "mini-vit", {**MINI, "vision_cfg": patches})
    run, words = tmp_path / "run", ["--model", "mini-vit", "--criterion", "uniform"]
    words += ["--ffn", "fff", "--ffn-depth", "2", "--estimator", "forward-activity", "--batch", "4", "--steps", "2"]
    assert main(["train", str(shard), "-o", str(run), *words]) == 0
    code, out, _ = printed(capsys, shard, "--model", run, "--estimator", "forward-activity", "--seeds", "3", "--json")
    (report,) = json.loads(out)["reports"]
    assert code == 0
    assert report["estimator"] == "forward-activity"
    assert report["ratio"] > 1
    assert report["cosine"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--estimator", "nonsense"), "estimator 'nonsense' is none of backprop"),
        (("--estimator", "backprop", "--tangents", "2"), "backprop has no tangents"),
        (("--estimator", "hybrid"), "hybrid: no rules"),
        (("--estimator", "forward-exact"), "it is for at most 2,048"),
        (("--estimator", "forward-activity"), "BatchNorm in training couples"),
        (("--batch", "1"), "batch 1 holds no negative pair"),
        (("--seeds", "1"), "1 seeds"),
        (("--loss", "softmax"), "was trained with the sigmoid loss"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, shard: Path, options: tuple[str, ...], message: str
) -> None:
    """One line on standard error, exit code 2, nothing on standard output."""
    code, out, err = printed(capsys, shard, "--model", tiny_checkpoint, *options)
    assert (code, out) == (UsageError.exit_code, "")
    assert message in err
