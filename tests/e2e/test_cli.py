"""The command line, called in this process: what goes to which stream, exit codes, and what messages say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from curate.cli import main
from tests.e2e.pools import make_bad_pool, make_pool
from tests.making import make_samples, make_tar

COLOURED = re.compile(r"\x1b\[[\d;]*\b(?:3|4|9|10)\d[\d;]*m")
QUICK = ["--engine", "inline", "--super-batch", "40", "--chunks", "2"]


@dataclass(frozen=True, slots=True)
class Called:
    """What one call of the command line returned and printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Call = Callable[..., Called]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call("score", pool, "-o", out, ...)`, with no CURATE_ variable of the machine in the way."""
    for name in list(os.environ):
        if name.startswith("CURATE_"):
            monkeypatch.delenv(name)

    def run(*arguments: object) -> Called:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Called(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pool"), shards=2, samples=20)


@pytest.fixture(scope="module")
def finished(pool: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made through the command line."""
    output = tmp_path_factory.mktemp("runs") / "out"
    assert main(["score", str(pool), "-o", str(output), "--reference", str(tiny_checkpoint), *QUICK]) == 0
    return output


def test_score_ends_with_the_command_that_trains_on_it(
    call: Call, pool: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Standard output is open_clip's command and nothing else; counts and progress are on standard error."""
    called = call("score", pool, "-o", tmp_path / "out", "--reference", tiny_checkpoint, *QUICK)
    assert called.code == 0
    (command,) = called.out.splitlines()
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "open_clip_train.main"]
    assert words[words.index("--train-data") + 1].startswith(str(tmp_path / "out"))
    assert words[words.index("--train-num-samples") + 1] == "8"
    assert "40 samples in = 8 kept, 32 dropped, 0 quarantined" in called.err
    assert "engine: inline" in called.err


def test_every_verb_prints_one_json_value(call: Call, pool: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With --json standard output is one JSON value: `json.loads` takes all of it."""
    out, reference = tmp_path / "out", ["--reference", tiny_checkpoint]
    shards = call("inspect", pool, "--json").json["shards"]
    assert [shard["samples"] for shard in shards] == [20, 20]
    plan = call("score", pool, "-o", out, *reference, *QUICK[2:], "--dry-run", "--json").json
    assert (plan["samples"], plan["selected"]) == (40, 8)
    assert not out.exists()
    assert call("score", pool, "-o", out, *reference, *QUICK, "--json").json["counts"]["kept"] == 8
    drawn = call("select", out, "-o", tmp_path / "half", "--keep", "0.5", "--engine", "inline", "--json")
    assert drawn.json["counts"]["kept"] == 20
    written = call("write", tmp_path / "half", "--samples-per-shard", "10", "--engine", "inline", "--json").json
    assert written["shards"] == ["00000.tar", "00001.tar"]
    assert call("verify", out, "--no-load", "--json").json["ok"] is True
    explained = call("explain", out, "000000027", "--json").json
    assert [row["key"] for row in explained] == ["000000027"]
    assert sum(call("explain", out, "--json").json.values()) == 40


@pytest.mark.slow
def test_doctor_prints_one_json_value(call: Call) -> None:
    """`curate doctor --json` is one JSON value with the machine's facts, rates and fallbacks."""
    called = call("doctor", "--json")
    assert called.code == 0
    assert {"facts", "rates", "fallbacks", "versions"} <= set(called.json)


@pytest.mark.slow
def test_demo_prints_one_json_value(call: Call, tmp_path: Path) -> None:
    """A small demonstration with --json is one JSON value, and the same as its demo.json."""
    called = call("demo", "-o", tmp_path / "demo", "--samples", "100", "--steps", "2", "--json")
    assert called.code == 0
    assert called.json == json.loads((tmp_path / "demo" / "demo.json").read_text())


def test_a_trained_checkpoint_scores(call: Call, pool: Path, tmp_path: Path) -> None:
    """`curate train` prints the name under which `curate score` takes what it made."""
    fitted = call("train", pool, "-o", tmp_path / "ckpt", "--steps", "1", "--batch", "8")
    assert (fitted.code, fitted.out.strip()) == (0, f"local-dir:{tmp_path / 'ckpt'}")
    scored = call("score", pool, "-o", tmp_path / "out", "--reference", fitted.out.strip(), *QUICK, "--json")
    assert scored.json["counts"] == {"in": 40, "kept": 8, "dropped": 32, "quarantined": 0}
    again = call("train", pool, "-o", tmp_path / "ckpt", "--steps", "1", "--batch", "8", "--overwrite", "--json")
    assert again.json["path"] == str(tmp_path / "ckpt")


# What a message has to say: {name} stands for a path below; code, arguments, and words of what, where and what next.
REFUSED: list[tuple[int, str, tuple[str, ...]]] = [
    (2, "nosuchverb", ("nosuchverb", "Available commands: demo, doctor, inspect, score")),
    (2, "score {pool} -o {new} --reference {model} --nosuch 1", ("--nosuch", "curate score --help")),
    (2, "score {pool} --reference {model}", ("--output requires", "curate score --help")),
    (2, "score {pool} -o {new}", ("--reference requires", "curate score --help")),
    (2, "score {pool} -o {new} --reference {model} --keep much", ("--keep", '"much"', "curate score --help")),
    (2, "score {pool} -o {new} --reference {model} --criterion best", ("--criterion", "learnability", "--help")),
    (2, "score {pool} -o {new} --reference {model} --keep 2", ("--keep 2.0", "less than or equal to 1")),
    (2, "score {pool} -o {new} --reference {model} --keep 0.2 --sub-batch 3", ("--keep and --sub-batch", "give one")),
    (2, "score {pool} -o {new} --reference {model} --super-batch 0", ("--super-batch 0", "greater than or equal to 1")),
    (2, "score {pool} -o {new} --reference {model} --workers 0", ("--workers 0", "at least one")),
    (2, "score {pool} -o {new} --reference {model} --tolerance 5", ("--tolerance 5", "between 0 and 1")),
    (2, "score {pool} -o {new} --reference {model} --criterion learnability", ("learnability", "needs a learner")),
    (2, "score {pool} -o {new} --reference {model} --scheduler tcp://10.1.1.1:9", ("tcp://10.1.1.1:9", "tls://")),
    (2, "score -o {new} --reference {model}", ("no shard found", "shards end in .tar")),
    (2, "score {missing} -o {new} --reference {model}", ("{missing}", "no such file", "check the path")),
    (2, "score {pool} -o {foreign} --reference {model}", ("{foreign}", "holds no run", "another directory")),
    (2, "score {pool} -o {foreign} --reference {model} --overwrite", ("{foreign}", "holds no run")),
    (2, "score {pool} -o {file} --reference {model}", ("{file} is a file", "-o names a directory")),
    (2, "score {pool} -o s3://bucket/out --reference {model}", ("s3:/", "mounted here", "sync the result")),
    (2, "score {pool} -o {finished} --reference {model} --gain 3", ("gain: 100.0 there, 3.0 now", "--overwrite")),
    (2, "score pipe:cat -o {new} --reference {model}", ("pipe:cat", "not opened", "allowed are file")),
    (1, "score {pool} -o {new} --reference {missing}", ("{missing}", "no directory")),
    (1, "score {pool} -o {new} --reference nosuchmodel", ("nosuchmodel", "open_clip.list_models()")),
    (2, "inspect", ("no shard found", "shards end in .tar")),
    (2, "inspect {missing}", ("{missing}", "no such file", "check the path")),
    (2, "select {foreign}", ("{foreign}", "no run there", "curate score SHARDS -o")),
    (2, "select {finished} -o {new} --keep 0", ("--keep 0.0", "greater than 0")),
    (2, "select {finished} --keep 0.5 --workers 0", ("--workers 0", "at least one")),
    (2, "write {finished} --scheduler tcp://10.1.1.1:9", ("tcp://10.1.1.1:9", "--allow-remote-scheduler")),
    (2, "write {missing}", ("{missing}", "no run there", "curate score SHARDS -o")),
    (2, "write {finished} -o {new} --samples-per-shard 10001", ("--samples-per-shard 10001", "10000")),
    (2, "verify {missing}", ("{missing}", "no run there", "curate score SHARDS -o")),
    (2, "explain {finished} nobody", ("'nobody'", "{finished}", "curate inspect SHARDS")),
    (2, "train {missing} -o {new}", ("{missing}", "no such file", "check the path")),
    (2, "train {pool} -o {foreign} --steps 1", ("{foreign}", "not empty", "another directory")),
    (1, "train {pool} -o {new} --model nosuchmodel --steps 1", ("nosuchmodel", "open_clip.list_models()")),
    (2, "demo -o {foreign}", ("{foreign}", "'thesis.tex'", "another directory")),
]


@pytest.mark.parametrize(("code", "line", "said"), REFUSED, ids=[line for _, line, _ in REFUSED])
def test_what_is_refused_is_said(
    call: Call, pool: Path, finished: Path, tiny_checkpoint: Path, tmp_path: Path, code: int, line: str, said: Any
) -> None:
    """One line on standard error says what, where and what next; no traceback, nothing written or taken back."""
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    file.write_text("")
    names = {
        "pool": pool, "finished": finished, "model": tiny_checkpoint, "missing": tmp_path / "missing.tar",
        "new": tmp_path / "new", "foreign": foreign, "file": file,
    }  # fmt: skip
    called = call(*(word.format(**names) for word in line.split()))
    assert (called.code, called.out) == (code, "")
    last = called.err.splitlines()[-1]
    assert last.startswith("curate: ")
    assert [words for words in said if words.format(**names) not in last] == []
    assert "Traceback" not in called.err
    assert not (tmp_path / "new").exists()
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    assert (finished / "_curate" / "SUCCESS.json").exists()


def test_loss_above_tolerance_is_exit_code_3(call: Call, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A cut shard ends the run with code 3, naming the shard and both ways on; --tolerance 1 accepts it."""
    pool = make_bad_pool(tmp_path / "pool")
    command = ["score", pool, "-o", tmp_path / "out", "--reference", tiny_checkpoint, *QUICK]
    called = call(*command)
    assert (called.code, called.out) == (3, "")
    for words in ("00002.tar", "tar-truncated", f"curate explain {tmp_path / 'out'} KEY", "--tolerance 1"):
        assert words in called.err.splitlines()[-1]
    accepted = call(*command, "--tolerance", "1")
    assert accepted.code == 0
    assert "1 image-undecodable" in accepted.err


def test_a_changed_output_is_exit_code_4(call: Call, finished: Path, tmp_path: Path) -> None:
    """`verify` answers 0 for what was written and 4 once a byte of it has changed, in words and as JSON."""
    assert call("verify", finished, "--no-load").code == 0
    copy = shutil.copytree(finished, tmp_path / "out")
    data = bytearray((copy / "00000.tar").read_bytes())
    data[600] ^= 1
    (copy / "00000.tar").write_bytes(data)
    called = call("verify", copy, "--no-load")
    assert called.code == 4
    assert "NOT verified" in called.out
    told = call("verify", copy, "--no-load", "--json")
    assert (told.code, told.json["ok"]) == (4, False)


def test_an_interrupt_is_exit_code_130_and_resumes(
    call: Call, pool: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a pass ends with 130 and a word on resuming, without a traceback; the same command then finishes."""
    command = ["score", pool, "-o", tmp_path / "out", "--reference", tiny_checkpoint, *QUICK]

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("curate.pipelines.passes.select_pass", interrupt)
        called = call(*command)
    assert (called.code, called.out) == (130, "")
    assert called.err.splitlines()[-1] == "curate: interrupted; the same command resumes"
    assert "Traceback" not in called.err
    monkeypatch.setattr("curate.pipelines.scoring._read_batch", lambda *_: pytest.fail("scored again"))
    assert call(*command).code == 0


def test_an_error_of_the_system_is_one_line(
    call: Call, pool: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that only the operating system can explain is told with its path, as exit code 1."""

    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error", "/some/disk")

    monkeypatch.setattr("curate.pipelines.passes.score_pass", fail)
    called = call("score", pool, "-o", tmp_path / "out", "--reference", tiny_checkpoint, *QUICK)
    assert called.code == 1
    assert called.err.splitlines()[-1] == "curate: /some/disk: Input/output error; check the path and the disk"


def test_settings_come_from_the_environment(
    call: Call, pool: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CURATE_SCORE_KEEP is --keep, and an option on the command line is the stronger of the two."""
    command = ["score", pool, "-o", tmp_path / "out", "--reference", tiny_checkpoint, *QUICK[2:], "--dry-run", "--json"]
    monkeypatch.setenv("CURATE_SCORE_KEEP", "0.5")
    assert call(*command).json["selected"] == 20
    assert call(*command, "--keep", "0.1").json["selected"] == 4
    monkeypatch.setenv("CURATE_SCORE_KEEP", "much")
    refused = call(*command)
    assert refused.code == 2
    assert "much" in refused.err


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard whose captions and keys are markup, control sequences and bytes that are no UTF-8."""
    (_, first), (_, second), (_, third) = make_samples(3)
    samples = [
        ("[bold]k[/bold]", {**first, "txt": b"[red]not markup[/red] [/nothing]"}),
        ("[bold]l[/bold]", {**second, "txt": b"[red]not markup[/red] [/nothing]"}),
        ("bytes\udcff", {**third, "jpg": b"no image"}),
    ]
    return make_tar(tmp_path_factory.mktemp("hostile") / "a[b].tar", samples)


def test_inspect_shows_markup_as_it_is(call: Call, hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets in captions, keys and paths are printed, not taken for styles."""
    monkeypatch.setenv("COLUMNS", "300")
    called = call("inspect", hostile)
    assert called.code == 0
    for words in ("[red]not markup[/red] [/nothing]", "a[b].tar"):
        assert words in called.out


def test_names_that_are_no_utf8_can_be_printed(
    call: Call, hostile: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Keys of any bytes do not stop a verb from printing, in words or as JSON."""
    assert call("inspect", hostile, "--json").json["samples"] == 3
    out = tmp_path / "out"
    command = ["score", hostile, "-o", out, "--reference", tiny_checkpoint, *QUICK, "--tolerance", "1"]
    assert call(*command, "--keep", "0.5").code == 0
    assert "[bold]k[/bold]" in call("explain", out, "[bold]k[/bold]").out
    assert call("verify", out, "--no-load").code == 0


@pytest.mark.parametrize("colour", [{"NO_COLOR": "1", "FORCE_COLOR": "1"}, {}], ids=["NO_COLOR", "no terminal"])
def test_there_are_no_escape_codes_where_nobody_reads_them(
    call: Call, pool: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, colour: dict[str, str]
) -> None:
    """Off a terminal nothing is coloured; with NO_COLOR not even where colours are forced."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in colour.items():
        monkeypatch.setenv(name, value)
    for arguments in (["inspect", pool], ["verify", finished, "--no-load"], ["explain", finished], ["score", pool]):
        called = call(*arguments)
        assert not COLOURED.search(called.out + called.err)
        if not colour:
            assert "\x1b" not in called.out + called.err
