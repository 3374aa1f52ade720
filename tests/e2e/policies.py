"""Pools with groups, policies over them, and what a selection owes them, reckoned without the code that drew it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import curate
from curate.ledger import read_ledger
from tests.making import make_samples, make_tar

HEAD = "schema: 1\nauthor: A. Expert\ndate: 2026-11-22\nrationale: a test\ncolumns:\n"
Asked = Mapping[str, Mapping[str, float]]  # group -> its bounds


def make_captioned_pool(directory: Path, caption: Callable[[int], str], *, shards: int = 3, samples: int = 40) -> Path:
    """`shards` shards of `samples` pairs, keys 000000000 and up, the caption of sample n being `caption(n)`."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        pairs = make_samples(samples, seed=100 * shard, start=samples * shard)
        named = [(key, {**parts, "txt": caption(int(key)).encode()}) for key, parts in pairs]
        make_tar(directory / f"{shard:05d}.tar", named)
    return directory


def write_labels(path: Path, columns: Mapping[str, Callable[[int], str]], samples: int = 120) -> Path:
    rows = [",".join([f"{n:09d}", *(of(n) for of in columns.values())]) for n in range(samples)]
    path.write_text("\n".join([",".join(["key", *columns]), *rows]) + "\n")
    return path


def write_policy(path: Path, columns: Mapping[str, Asked], more: str = "") -> Path:
    """One column per name; `more` are further lines of each."""
    text = HEAD
    for column, groups in columns.items():
        listed = ", ".join(json.dumps({"name": name} | dict(bounds)) for name, bounds in groups.items())
        text += f"  - column: {column}\n    source: a test\n{more}    groups: [{listed}]\n"
    path.write_text(text)
    return path


def score(pool: Path, output: Path, reference: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"engine": "inline", "super_batch": 50, "chunks": 4, "samples_per_shard": 10}
    return curate.score(pool, output, reference=str(reference), **settings | options)


def certificate_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "certificate.json").read_text())
    return found


def rows_in_turn(output: Path) -> list[list[dict[str, Any]]]:
    """Drawn rows of the ledger per sub-batch, in the order of the draws."""
    rows = read_ledger(output, ["key", "status", "sub_batch"]).to_pylist()
    numbers = sorted({row["sub_batch"] for row in rows if row["sub_batch"] is not None})
    return [[row for row in rows if row["sub_batch"] == number and row["status"] == "kept"] for number in numbers]


def owed_by_now(bounds: Mapping[str, float], n: int, pool: int, chosen: int) -> tuple[Fraction, Fraction]:
    """Floor and ceiling of a group of `n` where `chosen` of `pool` were drawn; no ceiling is all of the group."""
    even = Fraction(chosen * n, pool)
    low = max(
        Fraction(str(bounds.get("min_ratio", 0))) * even,
        Fraction(str(bounds.get("min_share", 0))) * chosen,
    )
    return low, Fraction(str(bounds["max_ratio"])) * even if "max_ratio" in bounds else Fraction(n)


def assert_kept(counts: Sequence[tuple[int, int, int, int]], bounds: Mapping[str, float]) -> None:
    """Of each draw (n, pool, members chosen, chosen), cumulated: rounded down on the way, up at the end.

    A share is owed by the end only: where a group's candidates come late, so do those that are chosen.
    """
    for number, (n, pool, members, chosen) in enumerate(counts):
        last = number == len(counts) - 1
        low, high = owed_by_now(bounds if last else {**bounds, "min_share": 0}, n, pool, chosen)
        least = math.ceil(low) if last else math.floor(low)
        assert least <= members <= max(math.ceil(high), least)
