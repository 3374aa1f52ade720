"""Prices of stored draws, reckoned again from the scores that they were drawn from.

What a batch scores follows from its members and the stored embeddings alone; what it would have scored without the
policy takes the plain draw anew. That one is the same draw only where the arithmetic is: the stored draw is replayed
first, and where its logits come out with other bits (another machine, another kernel) the plain draw is not compared.
Cost of a draw: two draws and two looks at a batch, O(B D) memory; at most `MOST_DRAWS` of a run are taken, spread over
it. All prices together are the certificate's already by their receipts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from curate import scores
from curate.errors import VerificationError
from curate.policy.price import batch_score
from curate.receipts import Receipt, Store
from curate.run_record import RunRecord
from curate.selection.independent import draw_alone
from curate.selection.joint import Draw, Pairs, draw_joint, draw_with, joint_kernel, sides_of
from curate.settings import SelectSettings

# U candidates that could be drawn in the order of their ids, b drawn

MOST_DRAWS: Final = 8
_EQUAL: Final = 1e-6  # of the score, where the bits are the same
_NEAR: Final = 1e-4  # of the score and the members: fp32 sums in another order
_COUNTED: Final = ("selected", "not-selected")


@dataclass(frozen=True, slots=True)
class Stored:
    """A draw as it is stored: its candidates' ids and logits, their rows of the score tables, who was drawn in which
    order, in chunks of which sizes, and the sub-batch's number."""

    number: int
    rows: pa.Table
    sample_ids_U: NDArray[np.uint8]
    logit_U: NDArray[np.float32]
    index_b: NDArray[np.int64]
    chunk_b: NDArray[np.int64]


def check_prices(output: Path, record: RunRecord, drawn: Sequence[Receipt]) -> str:
    """What was found of the prices in these receipts, in words. Errors: VerificationError for a price that is wrong."""
    settings = record.settings.select
    assert settings is not None
    paid = [receipt for receipt in drawn if receipt.facts["policy"]["price"] is not None]
    if not paid:
        return "no price: nothing was drawn"
    store = Store.of(output)
    scored = {receipt.facts["shard"]: receipt for receipt in store.receipts("score")}
    tables = {n: store.locate(scored[s.url].outputs[0]) for n, s in enumerate(record.inputs) if s.url in scored}
    wanted = {shard for receipt in paid for shard in receipt.facts["shards"]}
    if any(tables.get(shard) is None for shard in wanted):
        return "price not checked: score tables are gone"
    models = next(iter(scored.values())).facts["models"]
    taken = [paid[one] for one in np.unique(np.linspace(0, len(paid) - 1, min(MOST_DRAWS, len(paid))).astype(int))]
    same = [_is_repeated(_stored(store, receipt, tables, settings), receipt, models, settings) for receipt in taken]
    share = f"{len(taken):,} of {len(paid):,} draws"
    if all(same):
        return f"price reckoned again in {share}"
    return f"price with the policy reckoned again in {share}, without it not checked: this machine rounds otherwise"


def _is_repeated(stored: Stored, receipt: Receipt, models: Mapping[str, Any], settings: SelectSettings) -> bool:
    """Whether both scores of a price came out again; False where only that of the draw itself could be compared."""
    own, plain, members = receipt.facts["policy"]["price"]
    drawing = _alone if settings.criterion == "alignment" else _jointly
    found, without, same = drawing(stored, models, settings)
    place = f"certificate.json, price of sub-batch {stored.number}"
    if members != len(stored.index_b):
        raise VerificationError(f"{place}: it says {members} members, counted again {len(stored.index_b)}")
    for name, said, value in (("with", own, found), ("without", plain, without if same else plain)):
        allowed = _EQUAL * abs(value) if same else _NEAR * (abs(value) + members)
        if not abs(said - value) <= allowed:
            raise VerificationError(
                f"{place}: it says a score of {said:.6g} {name} the policy, reckoned again {value:.6g}"
            )
    return same


def _jointly(stored: Stored, models: Mapping[str, Any], settings: SelectSettings) -> tuple[float, float, bool]:
    """Scores of the stored draw and of the plain one, and whether the stored one's logits have the same bits here."""
    assert settings.criterion != "alignment"
    criterion, loss, ids = settings.criterion, settings.loss, stored.sample_ids_U
    pairs = (_pairs(stored.rows, models, "reference", "ref"), _pairs(stored.rows, models, "learner", "learner"))
    how: dict[str, Any] = {"gain": settings.gain, "seed": settings.seed, "step": stored.number}
    how |= {"size": len(stored.index_b), "chunks": settings.chunks}
    parts = iter(np.split(stored.index_b, np.flatnonzero(np.diff(stored.chunk_b)) + 1))
    kernel = joint_kernel(*pairs, ids, criterion=criterion, loss=loss)
    replayed = draw_with(kernel, ids, choose=lambda *_: next(parts), **how)
    sides = sides_of(*pairs, ids, criterion)
    plain = draw_joint(*pairs, ids, criterion=criterion, loss=loss, **how)
    found, without = (batch_score(sides, loss, index_b) for index_b in (stored.index_b, plain.index_b))
    return found, without, _same_bits(replayed, stored)


def _alone(stored: Stored, _: Mapping[str, Any], settings: SelectSettings) -> tuple[float, float, bool]:
    """As `_jointly`, of draws by one score each."""
    score_U = stored.rows["alignment"].to_numpy()
    size, ids = len(stored.index_b), stored.sample_ids_U
    plain = draw_alone(score_U, ids, size=size, gain=settings.gain, seed=settings.seed, step=stored.number)
    found, without = (float(score_U[index_b].sum()) for index_b in (stored.index_b, plain.index_b))
    return found, without, _same_bits(plain, stored)


def _same_bits(draw: Draw, stored: Stored) -> bool:
    return np.array_equal(draw.logit_B, stored.logit_U)


def _stored(store: Store, receipt: Receipt, tables: Mapping[int, Path | None], settings: SelectSettings) -> Stored:
    path = store.locate(receipt.outputs[0])
    if path is None:
        raise VerificationError(f"{store.root / receipt.outputs[0].path} is gone; draw again with `curate select`")
    table = scores.read_table(path)
    table = table.filter(pc.is_in(table["reason"], value_set=pa.array(_COUNTED))).combine_chunks()
    names = ["alignment"] if settings.criterion == "alignment" else list(scores.TOWERS)
    rank_U = table["rank"].fill_null(-1).to_numpy().astype(np.int64)
    index_b = np.argsort(rank_U, kind="stable")[int((rank_U < 0).sum()) :]
    chunk_b = table["chunk"].fill_null(-1).to_numpy().astype(np.int64)[index_b]
    ids_U = scores.ids_to_array(table["sample_id"])
    logit_U = table["score"].to_numpy().astype(np.float32)
    return Stored(receipt.facts["super_batch"], _rows(table, tables, names), ids_U, logit_U, index_b, chunk_b)


def _rows(table: pa.Table, tables: Mapping[int, Path | None], names: Sequence[str]) -> pa.Table:
    """The rows of the score tables that these of a selection are of, in their order."""
    shard_U, row_U = (table[name].to_numpy() for name in ("shard", "row"))
    parts, places = [], []
    for shard in np.unique(shard_U).tolist():
        path, at = tables[shard], np.flatnonzero(shard_U == shard)
        assert path is not None, "asked before"
        parts.append(scores.read_table(path, ["sample_id", *names]).take(row_U[at]))
        places.append(at)
    rows = pa.concat_tables(parts).take(np.argsort(np.concatenate(places))).combine_chunks()
    if not rows["sample_id"].equals(table["sample_id"]):
        raise VerificationError("the score tables have other samples than the draws; restore them, or score anew")
    return rows


def _pairs(rows: pa.Table, models: Mapping[str, Any], role: str, prefix: str) -> Pairs | None:
    if pa.types.is_null(rows[f"{prefix}_image"].type):
        return None
    image_UD, text_UD = (torch.from_numpy(scores.unpack(rows[f"{prefix}_{tower}"])) for tower in ("image", "text"))
    return Pairs(image_UD, text_UD, models[role]["scale"], models[role]["bias"])
