"""What a candidate is chosen for, as a weight per model: the score is a weighted sum of the models' losses.

    learnability     learner's loss minus reference's    hard for the learner, easy for the reference
    easy-reference   minus the reference's loss          what the reference already agrees with
    hard-learner     the learner's loss                  what the learner gets wrong, noise included

A fourth criterion weighs no pairs and has no weights here: `alignment` (`alignment.py`, drawn by `independent.py`).

Both losses split into a part of the pair alone (unconditional) and a part given the chosen (conditional). For the
softmax loss the similarity of a pair lowers its loss and the log-sum-exp over the others raises it, hence the two
signs. Source: Evans et al. 2024, arXiv 2406.17711, section 2.2, Algorithms 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from curate.errors import UsageError

Criterion = Literal["learnability", "easy-reference", "hard-learner"]  # of the joint sampler
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
AnyCriterion = Literal["learnability", "easy-reference", "hard-learner", "alignment"]
LossName = Literal["sigmoid", "softmax"]
LOSSES: tuple[LossName, ...] = get_args(LossName)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight of each model's loss in the score; 0 means that the model is not needed."""

    reference: float
    learner: float

    def conditional(self) -> tuple[float, float]:
        """Signs (reference, learner) of softplus(x_ij), or of the log-sum-exp: a loss term counts as it is."""
        return self.reference, self.learner

    def unconditional(self, loss: LossName) -> tuple[float, float]:
        """Signs (reference, learner) of softplus(-x_ii) for sigmoid, of the scaled similarity a s_ii for softmax."""
        sign = 1.0 if loss == "sigmoid" else -1.0
        return sign * self.reference + 0.0, sign * self.learner + 0.0  # + 0.0: no negative zero


_WEIGHTS: dict[str, Weights] = {
    "learnability": Weights(reference=-1.0, learner=1.0),
    "easy-reference": Weights(reference=-1.0, learner=0.0),
    "hard-learner": Weights(reference=0.0, learner=1.0),
}


def weights(criterion: str) -> Weights:
    """The weights of a criterion; `UsageError` naming the choices for an unknown one.

    >>> weights("learnability").unconditional("softmax")
    (1.0, -1.0)
    """
    if criterion == "alignment":
        raise UsageError(
            "alignment is scored by derivative, not by pairs: compute `alignment_scores` and draw with `draw_alone` "
            f"(curate.selection), or choose one of {', '.join(CRITERIA)}"
        )
    if criterion not in _WEIGHTS:
        raise UsageError(f"criterion {criterion!r} is unknown; choose one of {', '.join(CRITERIA)}")
    return _WEIGHTS[criterion]


def require_models(criterion: str, *, reference: bool, learner: bool) -> Weights:
    """The weights of a criterion, or `UsageError` if a model that it weighs is not there."""
    weight = weights(criterion)
    if weight.reference and not reference:
        raise UsageError(f"criterion {criterion!r} needs a reference model; give one, or choose hard-learner")
    if weight.learner and not learner:
        raise UsageError(f"criterion {criterion!r} needs a learner; name its checkpoint, or choose easy-reference")
    return weight


def check_available(criterion: str, *, reference: bool, learner: bool, trusted: bool) -> None:
    """`UsageError` for an unknown criterion, or one that asks for a model or for trusted pairs that are not there."""
    if criterion != "alignment":
        require_models(criterion, reference=reference, learner=learner)
    elif not learner:
        raise UsageError("criterion 'alignment' needs a learner, whose gradients it compares; name its --learner")
    elif not trusted:
        raise UsageError(
            "criterion 'alignment' needs scores along a trusted gradient; name a few clean shards: --trusted"
        )


def default_gain(criterion: str) -> float:
    """100 (the paper's) for the joint criteria, whose losses differ by hundredths; 2 per deviation for alignment."""
    return 2.0 if criterion == "alignment" else 100.0


def check_loss(loss: str) -> None:
    """`UsageError` naming the choices unless the loss is known."""
    if loss not in LOSSES:
        raise UsageError(f"loss {loss!r} is unknown; choose one of {', '.join(LOSSES)}")
