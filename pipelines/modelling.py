"""Settle what a run asks of its models before anything is scored: criterion, loss, identities, cache."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curate.errors import CacheMismatch, CurateWarning, UsageError
from curate.models.embed import DualEncoder
from curate.models.identity import ModelIdentity
from curate.models.load import load_model
from curate.models.spec import parse_spec
from curate.run_record import read_run
from curate.selection.criteria import AnyCriterion, check_available, check_loss
from curate.selection.criteria import LossName as Loss
from curate.settings import ScoreSettings


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The settled choice; `models` holds the loaded models by role, `identities` what `RUN.json` pins of them."""

    settings: ScoreSettings
    criterion: AnyCriterion
    loss: Loss
    models: dict[str, DualEncoder]

    @property
    def identities(self) -> dict[str, Any]:
        return {role: model.identity.to_json() for role, model in self.models.items()}

    def check_cache(self, cache: Path) -> Path:
        """`cache` if its reference embeddings are of this reference; CacheMismatch names every difference."""
        stored = ModelIdentity.from_json(read_run(cache).models["reference"])
        differences = self.models["reference"].identity.differences(stored)
        if differences:
            raise CacheMismatch(
                f"--reference-cache {cache} was made by {stored.name}, not by this reference: "
                f"{'; '.join(differences)}. Leave the option out to embed anew"
            )
        return cache


def choose_models(settings: ScoreSettings, criterion: str | None, loss: str) -> ModelChoice:
    """Load the models that `settings` name and settle criterion and loss.

    Without a criterion, it is alignment where there are trusted pairs, learnability where there is a learner and
    easy-reference where there is none, since learnability without a trained learner is easy-reference plus noise. Loss
    "auto" is the models' own; alignment takes the learner's.
    """
    learner, trusted = settings.learner is not None, settings.trusted is not None
    if trusted and not learner:
        raise UsageError("--trusted is for scores of a learner; name its checkpoint with --learner")
    chosen = criterion or default_criterion(learner=learner, trusted=trusted)
    check_available(chosen, reference=True, learner=learner, trusted=trusted)
    given = {"reference": settings.reference, "learner": settings.learner}
    names = {role: parse_spec(name).absolute for role, name in given.items() if name}
    settings = settings.model_copy(update=names)  # a worker may run in another directory
    models = {role: load_model(name, precision=settings.precision) for role, name in names.items()}
    settled = _own_loss(models["learner"], loss) if chosen == "alignment" else _settle_loss(models, loss)
    return ModelChoice(settings, chosen, settled, models)  # type: ignore[arg-type]  # checked two lines above


def default_criterion(*, learner: bool, trusted: bool) -> AnyCriterion:
    """The criterion of a run that names none."""
    return "alignment" if trusted else "learnability" if learner else "easy-reference"


def _own_loss(learner: DualEncoder, loss: str) -> Loss:
    if loss not in ("auto", learner.loss):
        raise UsageError(f"alignment scores are of the learner's own loss, {learner.loss}; leave --loss {loss} out")
    return learner.loss


def _settle_loss(models: dict[str, DualEncoder], loss: str) -> Loss:
    own = {role: model.loss for role, model in models.items()}
    if loss == "auto":
        if len(set(own.values())) > 1:
            described = ", ".join(f"the {role} with {name}" for role, name in own.items())
            raise UsageError(
                f"the models were trained with different losses ({described}); say --loss sigmoid or softmax"
            )
        return own["reference"]
    check_loss(loss)
    for role, name in own.items():
        if name != loss:
            warnings.warn(
                f"the {role} was trained with the {name} loss and is scored with {loss}"
                + (", with a bias of 0" if loss == "sigmoid" else ""),
                CurateWarning,
                stacklevel=3,
            )
    return loss  # type: ignore[return-value]  # check_loss knows the names
