"""What a step draws by, how sharply, and from how many candidates. Handover moves a run from one plan to the next."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from curate.learner.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class Plan:
    """`phase` names it in the journal. `criterion` is one of the settings', or "trim": the likeliest to be clean.

    `keep` is the share of the candidates that is trained on. Trimming goes by the learner's similarities times
    `learner_scale` (None: its own scale) plus the reference's times `reference_scale` (`curate.learner.trimming`).

    Example: Plan("selecting", "learnability", 100.0, 0.2) at batch 128 draws from 640 candidates.
    """

    phase: str
    criterion: str
    gain: float = 0.0
    keep: float = 1.0
    learner_scale: float | None = None
    reference_scale: float = 0.0

    def candidates(self, batch: int) -> int:
        """How many candidates a step looks at."""
        return max(batch, round(batch / self.keep))

    @property
    def uses_learner(self) -> bool:
        """Is the learner run over the candidates?"""
        return self.criterion in ("learnability", "hard-learner", "trim")

    @property
    def uses_learner_pass(self) -> bool:
        """Is the learner run over the candidates in any way, alignment's included?"""
        return self.uses_learner or self.criterion == "alignment"

    @property
    def uses_reference(self) -> bool:
        """Is the reference's opinion weighed?"""
        return self.criterion in ("learnability", "easy-reference") or (
            self.criterion == "trim" and self.reference_scale > 0
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def first_plan(settings: TrainSettings) -> Plan:
    """What the settings ask for, before any handover."""
    if settings.criterion == "uniform":
        return Plan("uniform", "uniform")
    return Plan("selecting", settings.criterion, settings.gain, settings.batch / settings.super_batch)
