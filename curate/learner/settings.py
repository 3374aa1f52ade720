"""What a training run depends on, in one frozen record that is stored beside the checkpoint it made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from curate.errors import UsageError

Criterion = Literal["uniform"]
Loss = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Settings of plain training. Either `steps` or `epochs` ends it; `lr` is the peak of warm-up and cosine decay.

    `betas`: with 0.999 the second moment is too slow for curated batches (arXiv 2406.17711, appendix), hence 0.95.
    `augment` shifts and zooms images by up to a tenth; it never mirrors them, since captions say left and right.
    `memory_gb` bounds the cache of decoded images; a larger corpus is decoded again in each epoch.
    """

    model: str = "curate-tiny"
    criterion: Criterion = "uniform"
    loss: Loss = "sigmoid"
    batch: int = 128
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
    eval_shards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            message
            for wrong, message in (
                (self.criterion != "uniform", f"criterion {self.criterion!r} is unknown; plain training has uniform"),
                (self.loss not in ("sigmoid", "softmax"), f"loss {self.loss!r} is unknown; choose sigmoid or softmax"),
                (
                    self.precision not in ("auto", "fp32", "bf16"),
                    f"precision {self.precision!r}; choose auto, fp32 or bf16",
                ),
                (self.batch < 2, f"batch {self.batch} holds no negative pair; use at least 2"),
                (self.steps is not None and self.steps < 1, f"steps {self.steps} must be positive"),
                (self.steps is None and not self.epochs > 0, f"epochs {self.epochs} must be positive"),
                (not self.lr > 0, f"lr {self.lr} must be positive"),
                (self.weight_decay < 0, f"weight decay {self.weight_decay} must not be negative"),
                (not 0 <= self.warmup < 1, f"warmup {self.warmup} is the share of steps that warm up, below 1"),
                (not self.memory_gb > 0, f"memory_gb {self.memory_gb} must be positive"),
            )
            if wrong
        ]
        if problems:
            raise UsageError("training settings: " + "; ".join(problems))

    def total_steps(self, samples: int) -> int:
        """Steps of the run for this many readable samples. Example: 2,500 samples, batch 128, 10 epochs give 195."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * samples / self.batch))


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What `train` did: `loss` is the mean over the last tenth of the steps, `skipped` counts samples by reason."""

    path: Path
    steps: int
    seconds: float
    loss: float
    samples: int
    skipped: dict[str, int]
