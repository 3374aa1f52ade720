"""Why one sample was kept, dropped or rejected: its ledger row, put into words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.errors import UsageError
from curate.ledger import find_rows, read_ledger
from curate.reasons import REASONS
from curate.run_record import RunRecord, TeeRecord, read_record


@dataclass(frozen=True, slots=True)
class Explanation:
    """One sample: its ledger row, and sentences about it."""

    row: dict[str, Any]
    sentences: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {**self.row, "sample_id": self.row["sample_id"].hex(), "explanation": list(self.sentences)}


def explain(output: str | PathLike[str], key: str) -> list[Explanation]:
    """Every sample of the ledger whose original key, new key, uid or sample id is `key`.

    Raises UsageError if there is none.
    """
    output = Path(output).expanduser().absolute()
    rows = list(find_rows(output, key))
    rows += [row for row in _repeated(output, key) if row not in rows]
    if not rows:
        raise UsageError(
            f"{output}: no sample with key, new key, uid or sample id {key!r}; "
            f"`curate inspect SHARDS` shows what keys look like, the ledger is {output}/_curate/ledger/*.parquet"
        )
    return [Explanation(row, tuple(_sentences(output, row))) for row in rows]


def summarise(output: Path) -> dict[str, int]:
    """How many samples have each status and reason, as `{"kept: selected": 24, ...}`, most frequent first."""
    table = read_ledger(output, ["status", "reason"])
    counts = Counter(f"{row['status']}: {row['reason']}, {REASONS[row['reason']]}" for row in table.to_pylist())
    return dict(counts.most_common())


def _sentences(output: Path, row: dict[str, Any]) -> list[str]:
    place = f"sample {row['key']!r} (number {row['ordinal']}) of {row['shard']}"
    sentences = [f"{place} was {row['status']}: {row['reason']}, {REASONS[row['reason']]}."]
    if row["detail"]:
        sentences.append(f"Detail: {row['detail']}.")
    if row["status"] == "quarantined":
        return sentences
    record = read_record(output)
    if row["reference_similarity"] is not None:
        sentences.append(_scores(row))
    if isinstance(record, TeeRecord):
        return sentences + ([_times(output, row)] if row["times_selected"] else [])
    if row["score"] is not None:
        sentences.append(_standing(output, record, row))
    if row["out_key"] is not None:
        sentences.append(f"It was written as {row['out_key']} in {row['out_shard']}.")
    return sentences


def _scores(row: dict[str, Any]) -> str:
    parts = [f"reference similarity {row['reference_similarity']:.4f} (loss {row['reference_loss']:.4f})"]
    if row["learner_similarity"] is not None:
        parts.append(f"learner similarity {row['learner_similarity']:.4f} (loss {row['learner_loss']:.4f})")
        parts.append(f"learnability of the pair alone {row['learner_loss'] - row['reference_loss']:+.4f}")
    if row.get("alignment") is not None:  # ledgers of earlier versions have no such column
        parts.append(f"alignment with the trusted gradient {row['alignment']:+.4g}")
    return "Scores: " + ", ".join(parts) + "."


def _repeated(output: Path, key: str) -> list[dict[str, Any]]:
    """The row of the sample that was written as `key` when a training chose it again: the ledger has its first key."""
    sidecar = output / f"{key[:-4]}.parquet"
    if not (key.isdecimal() and sidecar.is_file()):
        return []
    table = pq.read_table(sidecar, columns=["key", "sample_id"])
    found = table.filter(pc.equal(table["key"], key))["sample_id"].to_pylist()
    return [row for sample_id in found for row in find_rows(output, sample_id.hex())]


def _times(output: Path, row: dict[str, Any]) -> str:
    """At which steps a training chose the sample, and where each copy of it is."""
    columns = ["key", "sample_id", "original_shard", "sub_batch", "rank"]
    copies: list[str] = []
    for sidecar in sorted(output.glob("*.parquet"), key=lambda path: int(path.stem)):
        table = pq.read_table(sidecar, columns=columns)
        same = pc.equal(table["sample_id"], pa.scalar(row["sample_id"], pa.binary(16)))
        same = pc.and_(same, pc.equal(table["original_shard"], row["shard"]))
        copies += [
            f"step {one['sub_batch'] + 1} at rank {one['rank']} ({one['key']} in {sidecar.stem}.tar)"
            for one in table.filter(same).to_pylist()
        ]
    first = f", with a logit of {row['score']:.2f} the first time" if row["score"] is not None else ""
    return f"The training chose it {row['times_selected']} times{first}: {', '.join(copies)}."


def _standing(output: Path, record: RunRecord, row: dict[str, Any]) -> str:
    """Where the sample stood in its super-batch."""
    settings = record.settings.select
    table = read_ledger(output, ["sub_batch", "rank", "score"])
    table = table.filter(pc.and_(pc.equal(table["sub_batch"], row["sub_batch"]), pc.is_valid(table["score"])))
    drawn = len(table) - table["rank"].null_count
    above = pc.sum(pc.greater(table["score"], row["score"])).as_py() or 0
    name = f"super-batch {row['sub_batch']}"
    criterion = f"{settings.criterion}, gain {settings.gain:g}" if settings else "its criterion"
    if row["rank"] is not None:
        return (
            f"In {name} it was drawn at rank {row['rank']} of {drawn} (chunk {row['chunk']}), with a logit of "
            f"{row['score']:.2f} given what was chosen before it ({criterion})."
        )
    return (
        f"In {name} {drawn} of {len(table)} candidates were drawn; at the last chunk its logit was {row['score']:.2f} "
        f"({criterion}), and {above} candidates had a higher one when they were drawn or passed over."
    )
