"""What a training run depends on, in one frozen record that is pinned when it starts and compared when it resumes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from curate.errors import UsageError
from curate.selection.criteria import CRITERIA, default_gain

Criterion = Literal["uniform", "learnability", "easy-reference", "hard-learner", "alignment"]
TRAINING_CRITERIA: Final[tuple[Criterion, ...]] = get_args(Criterion)
Loss = Literal["sigmoid", "softmax"]
Feedforward = Literal["dense", "fff"]
Scoring = Literal["full", "flexi"]
FREE: Final = ("memory_gb", "device", "checkpoint_every")  # may change over a resume: they change no result
_CHOICES: Final = {
    "criterion": TRAINING_CRITERIA,
    "loss": get_args(Loss),
    "precision": ("auto", "fp32", "bf16"),
    "ffn": get_args(Feedforward),
    "scoring": get_args(Scoring),
}


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Settings of a training run. Either `steps` or `epochs` ends it; `lr` is the peak of warm-up and cosine decay.

    `batch` pairs of each super-batch are trained on, which holds batch / (1 - filter_ratio); uniform draws none. An
    epoch passes over every candidate once. `betas`: with 0.999 the second moment is too slow for curated batches (arXiv
    2406.17711, appendix), hence 0.95. `augment` shifts and zooms images by up to a tenth; it never mirrors them, since
    captions say left and right. `memory_gb` bounds the cache of decoded images (a larger corpus is decoded again in
    each epoch) and, apart from it, what is kept of a scoring pass. `lag`: scores are that many steps old. `label` names
    the json field that tells clean pairs from others, by its values in `clean`; only the report uses it.
    """

    model: str = "curate-tiny"
    reference: str | None = None
    criterion: Criterion = "uniform"
    loss: Loss = "sigmoid"
    batch: int = 128
    filter_ratio: float = 0.8
    chunks: int = 16
    gain: float = 100.0
    steps: int | None = None
    epochs: float = 10.0
    lr: float = 2e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.1
    clip_gradient: float = 1.0
    seed: int = 0
    augment: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    memory_gb: float = 2.0
    ffn: Feedforward = "dense"
    ffn_depth: int = 3
    ffn_leaf_width: int | None = None
    estimator: str = "backprop"
    tangents: int = 1
    rules: str = ""
    estimator_workers: int = 1
    scoring: Scoring = "full"
    lag: int = 0
    handover: str = "auto"
    trusted: tuple[str, ...] = ()
    watch_every: int = 50
    eval_shards: tuple[str, ...] = ()
    zeroshot: tuple[str, ...] = ()
    zeroshot_label: str | None = None
    eval_every: int | None = None
    checkpoint_every: int = 200
    label: str | None = None
    clean: tuple[str, ...] = ("true", "null", "none", "clean")

    def __post_init__(self) -> None:
        unknown = [
            f"{name} {getattr(self, name)!r} is unknown; choose {', '.join(choices)}"
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]
        problems = unknown + [message for wrong, message in self._numbers() if wrong]
        if not unknown:
            problems += [message for wrong, message in self._combinations() if wrong]
        if problems:
            raise UsageError("training settings: " + "; ".join(problems))

    def _numbers(self) -> tuple[tuple[bool, str], ...]:
        return (
            (self.batch < 2, f"batch {self.batch} holds no negative pair; use at least 2"),
            (self.steps is not None and self.steps < 1, f"steps {self.steps} must be positive"),
            (self.steps is None and not 0 < self.epochs < math.inf, f"epochs {self.epochs} must be positive"),
            (not 0 < self.lr < math.inf, f"lr {self.lr} must be positive"),
            (self.weight_decay < 0, f"weight decay {self.weight_decay} must not be negative"),
            (not 0 <= self.warmup < 1, f"warmup {self.warmup} is the share of steps that warm up, below 1"),
            (not self.memory_gb > 0, f"memory_gb {self.memory_gb} must be positive"),
            (
                not 0 <= self.filter_ratio < 1,
                f"filter ratio {self.filter_ratio} is the share of a super-batch that is left out: 0 up to below 1",
            ),
            (self.chunks < 1, f"chunks {self.chunks} must be at least 1"),
            (not 0 <= self.gain < math.inf, f"gain {self.gain} must be 0 or more"),
            (self.lag < 0, f"lag {self.lag} must be 0 or more steps"),
            (self.estimator_workers < 1, f"estimator workers {self.estimator_workers} must be at least 1"),
            (self.tangents < 1, f"tangents {self.tangents} must be at least 1"),
            (self.watch_every < 1, f"watch every {self.watch_every} steps: at least 1"),
            (self.checkpoint_every < 1, f"a checkpoint every {self.checkpoint_every} steps: at least 1"),
            (self.eval_every is not None and self.eval_every < 1, f"eval every {self.eval_every} steps: at least 1"),
            (not 0 <= self.seed < 2**63, f"seed {self.seed} must be a whole number of 0 or more"),
            (not 0 <= self.ffn_depth <= 12, f"ffn depth {self.ffn_depth} is not between 0 and 12"),
            (
                self.ffn_leaf_width is not None and self.ffn_leaf_width < 1,
                f"ffn leaf width {self.ffn_leaf_width} must be at least 1",
            ),
        )

    def _combinations(self) -> tuple[tuple[bool, str], ...]:
        criterion, needs = self.criterion, self.criterion in ("learnability", "easy-reference")
        return (
            (
                needs and not self.reference,
                f"criterion {criterion!r} needs a reference model; name it with --reference",
            ),
            (
                criterion == "alignment" and not self.trusted,
                "criterion 'alignment' needs a small trusted set; name its shards with --trusted",
            ),
            (
                self.scoring == "flexi" and criterion in ("uniform", "alignment"),
                f"flexi scoring and criterion {criterion!r} do not go together; choose one of {', '.join(CRITERIA)}",
            ),
            (
                self.scoring == "flexi" and self.estimator not in ("backprop", "backprop-checkpoint"),
                f"flexi trains part of a batch at low resolution, which estimator {self.estimator!r} cannot",
            ),
            (
                self.estimator_workers > 1 and self.estimator not in ("forward", "forward-dense"),
                f"estimator {self.estimator!r} is not shared among workers; forward and forward-dense are",
            ),
            (
                self.lag > 0 and criterion in ("uniform", "alignment"),
                f"a lag of scores means nothing to criterion {criterion!r}",
            ),
            (
                self.lag > 0 and criterion == "easy-reference" and self.handover == "off",
                "a lag of scores means nothing to criterion 'easy-reference' without a handover: the learner is not "
                "asked",
            ),
        )

    @property
    def super_batch(self) -> int:
        """Candidates of a step under the criterion. Example: batch 128 at filter ratio 0.8 is drawn from 640."""
        return self.batch if self.criterion == "uniform" else self.window

    @property
    def window(self) -> int:
        """Candidates that a step may choose among at all: under a policy a uniform draw finds substitutes in it."""
        return max(self.batch, round(self.batch / (1 - self.filter_ratio)))

    @property
    def penalised(self) -> bool:
        """Does the loss hold the penalties of fast feedforward layers? That of local and shared estimators cannot."""
        whole = (
            "backprop",
            "backprop-checkpoint",
            "forward",
            "forward-dense",
            "forward-activity",
            "forward-exact",
            "zeroth-order",
            "hybrid",
        )
        return self.estimator in whole and self.estimator_workers == 1

    @property
    def parts_examples(self) -> bool:
        """Does the estimator look at the activations of each example, so that two cannot share a caption's?"""
        return any(word in f"{self.estimator} {self.rules}" for word in ("local", "activity"))

    @property
    def uses_reference(self) -> bool:
        """Does the criterion weigh the reference's loss?"""
        return self.criterion in ("learnability", "easy-reference")

    @property
    def uses_learner(self) -> bool:
        """Is the learner run over the candidates?"""
        return self.criterion in ("learnability", "hard-learner")

    def total_steps(self, samples: int) -> int:
        """Steps of the run for this many candidates. Example: 2,500 samples, batch 128, 10 epochs give 195."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * samples / self.super_batch))


def parse_settings(settings: dict[str, Any]) -> TrainSettings:
    """Errors: UsageError for a name that is not a setting."""
    known = [f.name for f in fields(TrainSettings)]
    if unknown := sorted(set(settings) - set(known)):
        raise UsageError(f"training settings: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    settings = _defaults(settings)
    lists = {name for name in ("trusted", "eval_shards", "zeroshot", "clean", "betas") if name in settings}
    return TrainSettings(**settings | {name: _several(settings[name]) for name in lists})


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """What stands for None: learnability where there is a reference, and the criterion's own gain."""
    settings = dict(settings)
    if settings.get("criterion", ...) is None:
        settings["criterion"] = "learnability" if settings.get("reference") else "uniform"
    if settings.get("gain") is None:
        settings["gain"] = default_gain(settings.get("criterion", "uniform"))
    return settings


def _several(value: Any) -> tuple[Any, ...]:
    several = (value,) if isinstance(value, str | Path) else tuple(value)
    return tuple(str(one) if isinstance(one, Path) else one for one in several)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `train` did: `loss` is the mean over the last tenth of the steps, `skipped` counts samples by reason.

    `certificate` says how the draws kept to a policy.
    """

    path: Path
    steps: int
    seconds: float
    loss: float
    samples: int
    skipped: dict[str, int]
    report: Path | None = None
    factor: float = 1.0
    certificate: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "path": str(self.path), "report": None if self.report is None else str(self.report)}
