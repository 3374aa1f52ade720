"""Processes killed while a policy steers the draws: what each group is owed survives, and so does every byte."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.policies import certificate_of, make_captioned_pool, write_labels, write_policy
from tests.e2e.pools import check_run, published
from tests.fault.forking import ForkServer
from tests.fault.resuming import check_resumed, killed_at

MOMENTS: dict[str, Callable[[Path], bool]] = {
    "captions read": lambda out: there(out, "traits") == 4,
    "members known": lambda out: there(out, "policy") == 1,
    "first draw": lambda out: there(out, "selection") >= 1,
    "fourth draw": lambda out: there(out, "selection") >= 4,
    "certified": lambda out: (out / "certificate.json").exists(),
}


def there(output: Path, stage: str) -> int:
    """Receipts of a stage."""
    return len(list((output / "_curate" / "commits").glob(f"{stage}-*.json")))


@pytest.fixture(scope="module")
def command(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """The arguments of a run of eight super-batches under a policy that binds in all of them."""
    folder = tmp_path_factory.mktemp("given")
    make_captioned_pool(folder / "pool", lambda n: f"a thing with number {n}", shards=4)
    labels = write_labels(folder / "labels.csv", {"third": lambda n: "abc"[n % 3]}, samples=160)
    policy = write_policy(folder / "p.yaml", {"third": {"a": {"min_share": 0.6}, "b": {"max_ratio": 0.4}}})
    draw = ["--keep", "0.5", "--super-batch", "20", "--chunks", "4", "--samples-per-shard", "5", "--engine", "inline"]
    files = ["--policy", str(policy), "--labels", str(labels), "--reference", str(tiny_checkpoint)]
    return lambda output: ["score", str(folder / "pool"), "-o", str(output), *draw, *files]


@pytest.fixture(scope="module")
def undisturbed(
    forks: ForkServer, command: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    output = tmp_path_factory.mktemp("runs") / "out"
    code, log = forks.run(command(output))
    assert code == 0, log
    assert [row["C"] for row in certificate_of(output)["groups"]] == [48, 11]
    return published(output)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_under_a_policy_resumes_to_the_same_bytes(
    forks: ForkServer, command: Callable[[Path], list[str]], undisturbed: dict[str, str], tmp_path: Path, moment: str
) -> None:
    """SIGKILL between the captions and the certificate, then the same command: the same selection and certificate."""
    output = killed_at(forks, command, tmp_path, MOMENTS[moment])
    check_resumed(forks, command(output), output, undisturbed)


@pytest.mark.parametrize("moment", ["captions read", "members known"])
def test_a_run_killed_before_it_takes_the_place_of_another_costs_nothing(
    forks: ForkServer, command: Callable[[Path], list[str]], undisturbed: dict[str, str], tmp_path: Path, moment: str
) -> None:
    """SIGKILL of --overwrite while the earlier run stands: it has all its bytes, and the same command goes on."""
    plain = [part for part in command(tmp_path / "plain") if not part.endswith((".yaml", ".csv"))]
    code, log = forks.run([part for part in plain if part not in ("--policy", "--labels")])
    assert code == 0, log
    earlier = published(tmp_path / "plain")
    for attempt in range(5):
        output = shutil.copytree(tmp_path / "plain", tmp_path / f"out{attempt}")
        arguments = [*command(output), "--overwrite"]
        killed = forks.start(arguments).kill_when(
            lambda output=output: MOMENTS[moment](output / "_curate/next"), signal.SIGKILL
        )
        if (output / "_curate/next").exists():
            break
    assert killed == -signal.SIGKILL
    assert published(output) == earlier
    check_run(output)
    check_resumed(forks, arguments, output, undisturbed)
    assert not (output / "_curate/next").exists()


def test_two_drivers_at_once_draw_one_chain(
    forks: ForkServer, command: Callable[[Path], list[str]], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Two runs of one command into one directory agree on every draw, though each waits for the one before."""
    delays = random.Random(1)
    for attempt in range(2):
        output = tmp_path / f"out{attempt}"
        first = forks.start(command(output))
        time.sleep(delays.uniform(0, 0.5))
        second = forks.start(command(output))
        codes = first.wait(), second.wait()
        assert codes == (0, 0), first.log.read_text() + second.log.read_text()
        check_run(output)
        assert published(output) == undisturbed
