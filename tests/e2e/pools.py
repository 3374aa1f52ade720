"""Small pools of shards for the tests of whole runs, and the checker that every run has to pass afterwards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.making import make_image, make_samples, make_tar


def make_pool(directory: Path, *, shards: int = 3, samples: int = 40, seed: int = 0) -> Path:
    """`shards` readable shards of `samples` pairs each, with a json and a DataComp uid in every sample."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        pairs = []
        for key, parts in make_samples(samples, seed=1000 * seed + 100 * shard, start=samples * shard):
            uid = hashlib.md5(f"{seed}-{key}".encode()).hexdigest()
            fields = {"uid": uid, "url": f"https://example.org/{key}.jpg", "caption": parts["txt"].decode()}
            pairs.append((key, {**parts, "json": json.dumps(fields).encode()}))
        make_tar(directory / f"{shard:05d}.tar", pairs)
    return directory


def make_bad_pool(directory: Path) -> Path:
    """One good shard; one with an undecodable image, no caption, a repeated key, a copy; one cut inside a member."""
    directory.mkdir(parents=True, exist_ok=True)
    make_tar(directory / "00000.tar", make_samples(40, seed=1))
    bad = make_samples(40, seed=2, start=100)
    bad[3] = (bad[3][0], {"jpg": make_image("jpeg")[:200], "txt": b"a cut image"})
    bad[5] = (bad[5][0], {"jpg": make_image("jpeg", seed=77)})
    bad[7] = (bad[6][0], bad[7][1])
    bad[9] = (bad[9][0], bad[8][1])
    make_tar(directory / "00001.tar", bad)
    cut = make_tar(directory / "00002.tar", make_samples(40, seed=3, start=200))
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2 + 700])
    return directory


def published(output: Path) -> dict[str, str]:
    """sha256 of every file that a user sees in an output directory."""
    files = [path for path in output.rglob("*") if path.is_file() and "_curate" not in path.parts]
    files += (output / "_curate" / "ledger").glob("?????.parquet")
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def check_run(output: Path) -> dict[str, Any]:
    """Accounting, multiset and leftovers of a finished run, without the code that made it; returns the manifest."""
    manifest: dict[str, Any] = json.loads((output / "_curate" / "manifest.json").read_text())
    files = sorted((output / "_curate" / "ledger").glob("?????.parquet"))
    ledger = [row for file in files for row in pq.read_table(file).to_pylist()]
    statuses = Counter(row["status"] for row in ledger)
    assert manifest["counts"] == {"in": len(ledger)} | {s: statuses[s] for s in ("kept", "dropped", "quarantined")}
    assert all(row["reason"] for row in ledger)
    kept = {row["out_key"]: row["sample_id"] for row in ledger if row["status"] == "kept"}
    written = [row for file in sorted(output.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert {row["key"]: row["sample_id"] for row in written} == kept
    assert len({row["sample_id"] for row in written}) == len(written) == statuses["kept"]
    if (output / "_curate" / "SUCCESS.json").exists():
        assert not list((output / "_curate" / "attempts").iterdir())
    assert not [path for path in output.rglob("*.tmp") if "attempts" not in path.parts]
    return manifest
