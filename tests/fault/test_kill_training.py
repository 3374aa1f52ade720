"""Training that is killed or interrupted: the same command again ends with the weights of an undisturbed run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fault.forking import ForkServer
from tests.making import make_tar
from tests.unit.test_training import samples
from tests.unit.test_training_policy import POLICY

WEIGHTS = "open_clip_model.safetensors"
Command = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Command:
    """The arguments of a run of forty steps, with a state after every second."""
    shard = make_tar(tmp_path_factory.mktemp("pool") / "00000.tar", samples(40))
    fixed = ["--model", str(tiny_checkpoint), "--reference", str(tiny_checkpoint), "--criterion", "learnability"]
    sizes = ["--batch", "4", "--filter-ratio", "0.5", "--steps", "40", "--checkpoint-every", "2", "--handover", "off"]
    return lambda output: ["train", str(shard), "-o", str(output), *fixed, *sizes, "--engine", "inline"]


@pytest.fixture(scope="module")
def undisturbed(forks: ForkServer, command: Command, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "run"
    code, log = forks.run(command(output))
    assert code == 0, log
    return (output / WEIGHTS).read_bytes()


def states(output: Path, least: int) -> Callable[[], bool]:
    """Has the run kept a state of step `least` or later?"""
    directory = output / "_curate" / "state"
    return lambda: any(int(path.stem.removeprefix("step-")) >= least for path in directory.glob("step-*.safetensors"))


@pytest.mark.parametrize("least", [2, 12, 30])
def test_a_killed_run_goes_on_from_its_last_state(
    least: int, forks: ForkServer, command: Command, undisturbed: bytes, tmp_path: Path
) -> None:
    """SIGKILL while it trains: the same command ends with the same weights, and nothing is left over."""
    output = tmp_path / "run"
    assert forks.start(command(output)).kill_when(states(output, least), signal.SIGKILL) == -signal.SIGKILL
    assert not (output / "open_clip_config.json").exists()
    code, log = forks.run(command(output))
    assert code == 0, log
    assert (output / WEIGHTS).read_bytes() == undisturbed
    assert not list(output.rglob("*.tmp"))


def test_an_interrupted_run_says_so_and_resumes(
    forks: ForkServer, command: Command, undisturbed: bytes, tmp_path: Path
) -> None:
    """SIGINT: exit code 130, a state at the very step, and the same weights in the end."""
    output = tmp_path / "run"
    child = forks.start(command(output))
    assert child.kill_when(states(output, 4), signal.SIGINT) == 130
    assert "the same command resumes" in child.log.read_text()
    assert forks.run(command(output))[0] == 0
    assert (output / WEIGHTS).read_bytes() == undisturbed


def test_a_full_disk_ends_with_an_error(
    forks: ForkServer, command: Command, undisturbed: bytes, tmp_path: Path
) -> None:
    """No file may grow beyond 64 kB: exit code 1, the cause is named, and with room the run goes on."""
    output = tmp_path / "run"
    code, log = forks.run(command(output), limit=64_000)
    assert (code, "the file-size limit is reached" in log) == (1, True), log
    assert forks.run(command(output))[0] == 0
    assert (output / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize("criterion", ["learnability", "uniform"])
def test_a_killed_run_under_a_policy_keeps_its_debts(
    criterion: str, forks: ForkServer, command: Command, tmp_path: Path
) -> None:
    """SIGKILL while quotas bind: weights, log and certificate are those of a run that was left alone."""
    labels, policy = tmp_path / "labels.csv", tmp_path / "policy.yaml"
    labels.write_text("key,side\n" + "".join(f"{n:09d},{'few' if n % 10 == 3 else 'many'}\n" for n in range(40)))
    policy.write_text(POLICY.format(bounds="min_share: 0.18"))

    def arguments(name: str) -> list[str]:
        given = [criterion if word == "learnability" else word for word in command(tmp_path / name)]
        return [*given, "--policy", str(policy), "--labels", str(labels)]

    code, log = forks.run(arguments("whole"))
    assert code == 0, log
    assert "policy: side=few" in log
    killed = tmp_path / "killed"
    assert forks.start(arguments("killed")).kill_when(states(killed, 12), signal.SIGKILL) == -signal.SIGKILL
    assert not (killed / "certificate.json").exists()
    assert forks.run(arguments("killed"))[0] == 0
    for name in (WEIGHTS, "certificate.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((killed / "certificate.json").read_bytes())["draws_bound"] >= 5
