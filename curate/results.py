"""What a verb returns: counts, reasons, shards, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import LossAboveTolerance, UsageError
from curate.receipts import Receipt


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left on disk.

    `counts` has in, kept, dropped and quarantined (in, candidates and quarantined where only scores were made);
    `reasons` counts the ledger's reasons; `train_command` is open_clip's command line for the new shards;
    `certificate` says how a selection kept to its policy.
    """

    output: Path
    counts: dict[str, int]
    reasons: dict[str, int]
    shards: tuple[str, ...] = ()
    seconds: float = 0.0
    train_command: str | None = None
    certificate: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "counts": self.counts,
            "reasons": self.reasons,
            "shards": list(self.shards),
            "seconds": round(self.seconds, 3),
            "train_command": self.train_command,
        } | ({} if self.certificate is None else {"certificate": self.certificate})


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that is no share: 5 instead of 0.05 would accept any loss."""
    if not 0 <= tolerance <= 1:
        raise UsageError(f"--tolerance {tolerance:g}: a share of a shard's samples, between 0 and 1 (0.05 is 5 %)")


def lost_shards(scored: Sequence[Receipt], tolerance: float) -> list[str]:
    """Shards that lost more than `tolerance` of their samples, or an unknown number of them (a cut or damaged tar)."""
    lost = []
    for receipt in scored:
        facts = receipt.facts
        share = sum(facts["reasons"].values()) / max(1, facts["rows"])
        if share > tolerance or (facts["flaw"] is not None and tolerance < 1):
            flaw = f", {facts['flaw']}" if facts["flaw"] else ""
            lost.append(f"{facts['shard']} ({share:.1%} quarantined{flaw})")
    return lost


def refuse_loss(lost: Sequence[str], tolerance: float, output: Path) -> None:
    """Raise LossAboveTolerance if any shard was lost."""
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise LossAboveTolerance(
            f"{len(lost)} shards lost more than --tolerance {tolerance:g}, or an unknown part: "
            f"{'; '.join(lost[:3])}{more}. What is good was written, without SUCCESS.json; every lost sample is in the "
            f"ledger (curate explain {output} KEY). Mend the shards, or accept the loss with --tolerance 1"
        )
