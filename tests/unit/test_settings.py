"""Settings: defaults of the paper, limits, and messages that name the option."""

from __future__ import annotations

import json
from typing import Any

import pytest

from curate.errors import UsageError
from curate.settings import RunSettings, ScoreSettings, SelectSettings, WriteSettings, checked

DRAW: dict[str, Any] = {"criterion": "learnability", "loss": "sigmoid"}


def test_the_defaults_are_those_of_the_paper() -> None:
    """A fifth is kept, in 16 chunks, from super-batches of 20,480."""
    settings = checked(SelectSettings, DRAW)
    assert (settings.keep, settings.chunks, settings.super_batch, settings.gain) == (0.2, 16, 20_480, 100.0)


@pytest.mark.parametrize(
    ("schema", "values", "message"),
    [
        (SelectSettings, DRAW | {"keep": 0}, "--keep 0: .*greater than 0"),
        (SelectSettings, DRAW | {"keep": 1.5}, "--keep 1.5: .*less than or equal to 1"),
        (SelectSettings, DRAW | {"keep": float("nan")}, "--keep nan"),
        (SelectSettings, DRAW | {"gain": float("inf")}, "--gain inf: .*finite"),
        (SelectSettings, DRAW | {"gain": -1}, "--gain -1"),
        (SelectSettings, DRAW | {"chunks": 0}, "--chunks 0"),
        (SelectSettings, DRAW | {"super_batch": "many"}, "--super-batch 'many': .*integer"),
        (SelectSettings, DRAW | {"sub_batch": 9, "super_batch": 8}, "--sub-batch 9 is larger than --super-batch 8"),
        (SelectSettings, DRAW | {"criterion": "hardest"}, "--criterion 'hardest'"),
        (SelectSettings, DRAW | {"seed": 2**63}, "--seed"),
        (SelectSettings, DRAW | {"colour": 1}, "--colour 1"),
        (WriteSettings, {"samples_per_shard": 10_001}, "--samples-per-shard 10001: .*10000"),
        (ScoreSettings, {"reference": "r", "batch_size": 0}, "--batch-size 0"),
        (ScoreSettings, {"reference": "r", "precision": "int8"}, "--precision 'int8'"),
    ],
)
def test_what_cannot_be_met_is_named_as_the_option(schema: Any, values: dict[str, Any], message: str) -> None:
    """A value out of range is one UsageError with the option as it is typed, the value and the limit."""
    with pytest.raises(UsageError, match=message):
        checked(schema, values)


def test_all_problems_are_named_at_once() -> None:
    """Two wrong options give one message with both."""
    with pytest.raises(UsageError, match=r"--keep .*; --chunks "):
        checked(SelectSettings, DRAW | {"keep": 2, "chunks": -1})


def test_settings_survive_the_run_record() -> None:
    """Settings read back from JSON are equal to those that were written."""
    settings = RunSettings(
        score=ScoreSettings(reference="r", learner="l"),
        select=checked(SelectSettings, DRAW | {"sub_batch": 7, "super_batch": 30}),
        write=WriteSettings(samples_per_shard=100),
    )
    assert checked(RunSettings, json.loads(json.dumps(settings.model_dump()))) == settings


def test_settings_cannot_change() -> None:
    """A setting is fixed once it is checked."""
    with pytest.raises(Exception, match="frozen"):
        checked(SelectSettings, DRAW).keep = 0.5  # type: ignore[misc]
