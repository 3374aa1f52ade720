"""Loss of power in the later passes of a whole run: SUCCESS is true wherever it is seen, and nothing old comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import curate
from curate.pipelines.finishing import reopen
from curate.storage import file_digest
from tests.e2e.pools import check_run, make_pool, published
from tests.fault.crash_disk import LOSSES, CrashDisk, PowerCut, installed


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 16 samples in shards of three."""
    folder = tmp_path_factory.mktemp("finished")
    pool = make_pool(folder / "pool", shards=2, samples=8)
    drawing = {"keep": 0.5, "super_batch": 9, "chunks": 2, "samples_per_shard": 3}
    curate.score(pool, folder / "out", reference=str(tiny_checkpoint), engine="inline", **drawing)
    return folder / "out"


def check_success(output: Path) -> None:
    """If SUCCESS is there, so is every byte that the manifest lists."""
    if (output / "_curate" / "SUCCESS.json").exists():
        manifest = json.loads((output / "_curate" / "manifest.json").read_bytes())
        for name, sha256 in manifest["digests"].items():
            assert file_digest(output / name) == sha256


def test_what_was_taken_back_stays_away(finished: Path, tmp_path: Path) -> None:
    """Once a run is reopened no loss of power brings back SUCCESS or an old shard, which the next run might not own."""
    (tmp_path / "root").mkdir()
    output = shutil.copytree(finished, tmp_path / "root" / "out")
    disk = CrashDisk(output.parent)
    with installed(disk):
        reopen(output)
    for number, loss in enumerate(LOSSES):
        after = disk.surviving(tmp_path / str(number), **loss) / "out"
        assert not (after / "_curate" / "SUCCESS.json").exists()
        assert not [path for path in after.iterdir() if path.is_file()]


@pytest.mark.slow
def test_success_is_never_seen_over_less(finished: Path, tmp_path: Path) -> None:
    """Writing anew over a finished run, without power at one operation in seventeen: SUCCESS is true or absent."""
    expected, stop = published(finished), 0
    while True:
        root = tmp_path / f"{stop}"
        root.mkdir()
        shutil.copytree(finished, root / "out")
        disk = CrashDisk(root, stop)
        try:
            with installed(disk):
                curate.write(root / "out", engine="inline")
            break
        except PowerCut:
            for number, loss in enumerate(LOSSES[:5]):
                check_success(disk.surviving(tmp_path / f"{stop}-{number}", **loss) / "out")
        again = tmp_path / f"{stop}-{(stop // 17) % 5}" / "out"
        curate.write(again, engine="inline")
        check_run(again)
        assert published(again) == expected
        stop += 17
    assert stop > 60
