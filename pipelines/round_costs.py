"""What a `curate score` has cost, from its receipts: FLOPs of the models over what they embedded, and of the draws.

Forward passes are counted by the analytic count of each model at the mean caption length of the pairs that were kept;
embeddings that were stored already cost nothing. Costs reading the captions of one output shard.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from curate.costs.flops import selection_flops
from curate.costs.ledger import CostLedger
from curate.models.embed import DualEncoder
from curate.models.load import load_model
from curate.receipts import Receipt, Store
from curate.run_record import read_run
from curate.selection.alignment import alignment_flops
from curate.selection.criteria import weights
from curate.settings import SelectSettings

CAPTIONS = 256  # whose length is measured


def score_ledger(output: Path, seconds: float) -> CostLedger:
    """The reference's pass under `reference`, the learner's and the draws under `scoring`; all seconds with the latter.

    Errors: UsageError where `output` holds no run; ModelError.
    """
    settings, store = read_run(output).settings, Store.of(output)
    scored, drawn = list(store.receipts("score")), list(store.receipts("selection"))
    names = {"reference": settings.score.reference, "learner": settings.score.learner}
    models = {role: load_model(name, precision=settings.score.precision) for role, name in names.items() if name}
    captions = _captions(output)
    rows = sum(receipt.facts["candidates"] for receipt in scored)
    fresh = sum(receipt.facts["candidates"] for receipt in scored if not receipt.facts["reference_cached"])
    ledger = CostLedger().add("reference", samples=fresh, flops=fresh * _forward(models["reference"], captions))
    flops = 0.0 if settings.select is None else _draws(drawn, settings.select, models)
    if "learner" in models:
        forward = _forward(models["learner"], captions)
        flops += rows * forward
        if settings.score.trusted_size is not None:
            flops += alignment_flops(forward, trusted=settings.score.trusted_size, candidates=rows)
    return ledger.add("scoring", samples=rows if "learner" in models else 0, flops=flops, seconds=seconds)


def _draws(drawn: list[Receipt], settings: SelectSettings, models: dict[str, DualEncoder]) -> float:
    if settings.criterion == "alignment":
        return 0.0
    used = weights(settings.criterion)
    widths = sum(model.width for role, model in models.items() if getattr(used, role))
    return sum(
        selection_flops(receipt.facts["candidates"], receipt.facts["drawn"], widths, settings.chunks)
        for receipt in drawn
    )


def _captions(output: Path) -> list[str]:
    """Some captions of the first shard that was written."""
    for path in sorted(output.glob("*.parquet"))[:1]:
        column: list[str | None] = pq.read_table(path, columns=["caption"])["caption"].to_pylist()
        return [text or "" for text in column[:CAPTIONS]]
    return []


def _forward(model: DualEncoder, captions: list[str]) -> float:
    """FLOPs of embedding one pair."""
    tokens = float((model.tokenize(captions) != 0).sum(1).float().mean()) if captions else 1.0
    return float(model.flops_per_sample(max(1, round(tokens))))
