"""The settings of a run: one schema for the command line, Python, environment and `RUN.json`.

`ScoreSettings` decides what the stored scores are, `SelectSettings` what is drawn from them, `WriteSettings` how it is
written; a receipt depends on exactly the group of its pass, so a change in a later group never repeats an earlier pass.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from curate.errors import UsageError
from curate.formats.img2dataset import SAMPLES_PER_SHARD
from curate.selection.criteria import AnyCriterion, default_gain
from curate.selection.criteria import LossName as Loss

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Deduplicate = Literal["off", "exact", "near"]

T = TypeVar("T", bound=BaseModel)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScoreSettings(_Settings):
    """What the stored scores depend on."""

    reference: str
    learner: str | None = None
    precision: Precision = "auto"
    batch_size: int = Field(default=64, ge=1, le=65_536)
    max_pixels: int = Field(default=64_000_000, ge=1)
    max_caption_bytes: int = Field(default=65_536, ge=1)
    trusted: tuple[str, ...] | None = None  # sha256 of each trusted shard, sorted; None: no alignment scores
    trusted_size: int | None = Field(default=None, ge=2, le=65_536)


class PolicySettings(_Settings):
    """The policy that draws keep to, word for word, and the file of labels that its groups come from."""

    text: str
    labels: str | None = None  # sha256 of the file
    on: Literal["key", "uid", "sample_id"] = "key"


class SelectSettings(_Settings):
    """What is drawn from the scores (names and defaults as in Evans et al. 2024, arXiv 2406.17711)."""

    keep: float = Field(default=0.2, gt=0, le=1)
    sub_batch: int | None = Field(default=None, ge=1)
    super_batch: int = Field(default=20_480, ge=1)
    chunks: int = Field(default=16, ge=1)
    criterion: AnyCriterion
    loss: Loss
    gain: float = Field(default=100.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)
    deduplicate: Deduplicate = "exact"
    policy: PolicySettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_gain(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values | {"gain": default_gain(values.get("criterion", ""))} if values.get("gain") is None else values

    @model_validator(mode="after")
    def _sub_batch_fits(self) -> SelectSettings:
        if self.sub_batch is not None and self.sub_batch > self.super_batch:
            raise ValueError(f"--sub-batch {self.sub_batch} is larger than --super-batch {self.super_batch}")
        return self

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a policy as before there were any: records and receipts of earlier versions still fit."""
        values: dict[str, Any] = serialize(self)
        return values if self.policy is not None else {k: v for k, v in values.items() if k != "policy"}


class WriteSettings(_Settings):
    """How the selection is written."""

    samples_per_shard: int | None = Field(default=None, ge=1, le=SAMPLES_PER_SHARD)


class RunSettings(_Settings):
    """Everything that `RUN.json` pins."""

    score: ScoreSettings
    select: SelectSettings | None
    write: WriteSettings = WriteSettings()


def checked(schema: type[T], values: dict[str, Any]) -> T:
    """Build `schema`, turning pydantic's report into one UsageError that names every field."""
    try:
        return schema(**values)
    except ValidationError as error:
        problems = "; ".join(_problem(item) for item in error.errors())
        raise UsageError(problems) from None


def _problem(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"]).replace("_", "-")
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"--{field} {item['input']!r}: {message}" if field else message
