"""Any sequence of passes, kills, losses of power, damage and second drivers ends in the bytes of an undisturbed run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import curate
from curate.errors import UsageError, VerificationError
from curate.run_record import read_run
from curate.storage import file_digest
from tests.e2e.pools import check_run, make_pool, published
from tests.fault.crash_disk import LOSSES, CrashDisk, PowerCut, installed

Draw = tuple[float, int]  # keep, seed
DRAWS = st.sampled_from([(0.5, 0), (0.5, 1), (0.25, 0)])
STOPS = st.integers(0, 130)


class World:
    """A scored output to start from, and what every selection of it publishes when nobody disturbs it."""

    def __init__(self, pool: Path, reference: Path, folder: Path) -> None:
        self.folder, self._pool, self._reference = folder, pool, reference
        self._published: dict[Draw, dict[str, str]] = {}
        self.start = folder / "start" / "out"
        self.score(self.start, (0.5, 0), scores_only=False)

    def score(self, output: Path, draw: Draw, **options: Any) -> None:
        """The main command, which also resumes and repairs."""
        keep, seed = draw
        drawing: dict[str, Any] = {"keep": keep, "seed": seed, "super_batch": 9, "chunks": 2, "samples_per_shard": 3}
        curate.score(self._pool, output, reference=str(self._reference), engine="inline", **drawing, **options)

    def published(self, draw: Draw) -> dict[str, str]:
        if draw not in self._published:
            output = self.folder / f"{draw}"
            self.score(output, draw)
            self._published[draw] = published(output)
        return self._published[draw]


class Run(RuleBasedStateMachine):
    """One output directory and everything that may happen to it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.folder = Path(tempfile.mkdtemp(dir=world.folder))
        self.root = self.folder / "0"
        shutil.copytree(world.start, self.root / "out")
        self.moves = 0

    @property
    def output(self) -> Path:
        return self.root / "out"

    def draw(self) -> Draw:
        """What RUN.json says is drawn."""
        chosen = read_run(self.output).settings.select
        assert chosen is not None
        return chosen.keep, chosen.seed

    def attempt(self, work: Callable[[], object]) -> None:
        """Do `work`; where scores were damaged it says so, and the main command repairs them."""
        try:
            work()
        except (UsageError, VerificationError) as error:
            if "run `curate score` again" not in str(error) and "same `curate score` command" not in str(error):
                raise
            self.world.score(self.output, self.draw())

    @rule(draw=DRAWS)
    def select(self, draw: Draw) -> None:
        self.attempt(lambda: curate.select(self.output, keep=draw[0], seed=draw[1], engine="inline"))

    @rule()
    def write(self) -> None:
        self.attempt(lambda: curate.write(self.output, engine="inline"))

    @rule()
    def score(self) -> None:
        self.world.score(self.output, self.draw())

    @rule(draw=st.none() | DRAWS, stop=STOPS, loss=st.sampled_from(LOSSES))
    def lose_power(self, draw: Draw | None, stop: int, loss: dict[str, Any]) -> None:
        """Stop a selection, or with None a writing, before an operation; go on with what is left of the disk."""
        disk = CrashDisk(self.root, stop)
        try:
            with installed(disk):
                self.write() if draw is None else self.select(draw)
        except PowerCut:
            self.moves += 1
            self.root = disk.surviving(self.folder / f"{self.moves}", **loss)

    @rule(stop=STOPS)
    def let_another_driver_overtake(self, stop: int) -> None:
        """While one driver writes, another starts and finishes between two of its operations."""
        other: list[CrashDisk] = []

        def overtake(number: int, _: str) -> None:
            if number == stop and not other:
                other.append(CrashDisk(self.root))
                self.world.score(self.output, self.draw())

        draw = self.draw()
        self.world.score(self.output, draw)  # both drivers run the same command over sound scores
        (self.output / "_curate" / "SUCCESS.json").unlink()
        for path in (self.output / "_curate" / "commits").glob("shards-*"):
            path.unlink()
        with installed(Overtaken(self.root, fail=overtake)):
            self.world.score(self.output, draw)

    @rule(pick=st.integers(0, 2**16), cut=st.booleans())
    def damage(self, pick: int, cut: bool) -> None:
        """A file under `_curate/` is deleted, or cut."""
        stages = ("score", "selection", "shards", "ledger", "commits")
        files = [path for stage in stages for path in sorted((self.output / "_curate" / stage).glob("*"))]
        files = [path for path in files if path.parent.name != "ledger" or len(path.stem) == 32]
        if files:
            path = files[pick % len(files)]
            half = path.read_bytes()[: path.stat().st_size // 2]
            path.unlink()
            if cut:
                path.write_bytes(half)

    @invariant()
    def success_is_true(self) -> None:
        """Wherever SUCCESS is, everything that the manifest lists is there, whole."""
        if (self.output / "_curate" / "SUCCESS.json").exists():
            manifest = json.loads((self.output / "_curate" / "manifest.json").read_bytes())
            for name, sha256 in manifest["digests"].items():
                assert file_digest(self.output / name) == sha256

    def teardown(self) -> None:
        draw = self.draw()
        self.world.score(self.output, draw)
        check_run(self.output)
        assert published(self.output) == self.world.published(draw)
        shutil.rmtree(self.folder)


class Overtaken(CrashDisk):
    """Operations in a directory where another driver works too; nothing is modelled, nothing is lost."""

    def _change(self, path: Path, inode: Any) -> None:
        pass

    def _find(self, path: Path) -> Any:  # noqa: ARG002 - as in CrashDisk
        return self._tree


@pytest.mark.slow
def test_whatever_happens_the_same_command_ends_in_the_same_bytes(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After any few steps of the machine one more `curate score` publishes what an undisturbed run publishes."""
    folder = tmp_path_factory.mktemp("machine")
    world = World(make_pool(folder / "pool", shards=2, samples=8), tiny_checkpoint, folder)
    run_state_machine_as_test(
        lambda: Run(world),
        settings=settings(
            max_examples=12,
            stateful_step_count=5,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        ),
    )
