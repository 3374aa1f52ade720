"""Criteria, the models that they need, and every argument that a draw refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from curate.errors import UsageError
from curate.selection.criteria import check_loss, require_models, weights
from curate.selection.joint import Pairs, chunk_sizes, draw_joint


@pytest.mark.parametrize(
    ("criterion", "conditional", "softmax"),
    [
        ("learnability", (-1.0, 1.0), (1.0, -1.0)),
        ("easy-reference", (-1.0, 0.0), (1.0, 0.0)),
        ("hard-learner", (0.0, 1.0), (0.0, -1.0)),
    ],
)
def test_signs_of_each_criterion(
    criterion: str, conditional: tuple[float, float], softmax: tuple[float, float]
) -> None:
    """Learner's loss counts up, reference's down; a softmax similarity counts against its loss."""
    assert weights(criterion).conditional() == conditional == weights(criterion).unconditional("sigmoid")
    assert weights(criterion).unconditional("softmax") == softmax


def test_unknown_names_are_refused_with_the_choices() -> None:
    """A misspelt criterion or loss is a UsageError that lists what there is."""
    with pytest.raises(UsageError, match="'easy' is unknown; choose one of learnability, easy-reference, hard-learner"):
        weights("easy")
    with pytest.raises(UsageError, match="'cosine' is unknown; choose one of sigmoid, softmax"):
        check_loss("cosine")


@pytest.mark.parametrize(
    ("criterion", "reference", "learner", "message"),
    [
        ("learnability", True, False, "needs a learner"),
        ("learnability", False, True, "needs a reference model"),
        ("easy-reference", False, True, "needs a reference model"),
        ("hard-learner", True, False, "needs a learner"),
    ],
)
def test_a_missing_model_is_refused(criterion: str, reference: bool, learner: bool, message: str) -> None:
    """A criterion that weighs a model which is not there is a UsageError that names the model."""
    with pytest.raises(UsageError, match=message):
        require_models(criterion, reference=reference, learner=learner)


def example(**change: Any) -> Any:
    eye = torch.eye(4)
    arguments: dict[str, Any] = {
        "reference": Pairs(eye, eye, 10.0, -5.0),
        "learner": Pairs(eye, eye.flip(0), 10.0, -5.0),
        "sample_ids": np.arange(64, dtype=np.uint8).reshape(4, 16),
        "size": 2,
        "loss": "sigmoid",
    }
    arguments.update(change)
    return draw_joint(arguments.pop("reference"), arguments.pop("learner"), arguments.pop("sample_ids"), **arguments)


def spoiled(row: int, value: float) -> Pairs:
    image_BD = torch.eye(4)
    image_BD[row, 1] = value
    return Pairs(image_BD, torch.eye(4), 10.0, -5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "cannot draw 0 of 4 candidates; give a size from 1 to 4"),
        ({"size": 5}, "cannot draw 5 of 4"),
        ({"chunks": 0}, "chunks is 0"),
        ({"gain": float("nan")}, "gain is nan"),
        ({"gain": -1.0}, "gain is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"learner": None}, "needs a learner"),
        ({"criterion": "best"}, "'best' is unknown"),
        ({"loss": "hinge"}, "'hinge' is unknown"),
        ({"sample_ids": np.zeros((4, 16), dtype=np.uint8)}, "rows 0 and 1 have the same sample id 0{32}; deduplicate"),
        ({"sample_ids": np.zeros((4, 8), dtype=np.uint8)}, r"give uint8 \[B, 16\]"),
        ({"sample_ids": np.zeros((0, 16), dtype=np.uint8)}, "B at least 1"),
        ({"reference": spoiled(2, float("nan"))}, r"image embedding of row 2 \(sample 2021.*2f\) has NaN or inf"),
        ({"learner": spoiled(3, float("-inf"))}, "learner: the image embedding of row 3"),
        (
            {"reference": Pairs(torch.eye(4), torch.eye(3), 1.0, 0.0)},
            r"images \(4, 4\) and texts \(3, 3\) for 4 sample",
        ),
        ({"reference": Pairs(torch.eye(4).int(), torch.eye(4).int(), 1.0, 0.0)}, "give floating point"),
        ({"reference": Pairs(torch.eye(4), torch.eye(4), float("inf"), 0.0)}, "must be finite"),
        (
            {"learner": Pairs(torch.full((4, 4), 1e38), torch.full((4, 4), 1e38), 1e9, 0.0), "gain": 1e300},
            "overflows; L2-normalise",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(change: dict[str, Any], message: str) -> None:
    """Every argument that a draw cannot honour is a UsageError naming it, and the sample where there is one."""
    with pytest.raises(UsageError, match=message):
        example(**change)


def test_an_unused_model_may_be_missing_or_broken() -> None:
    """easy-reference never looks at the learner, hard-learner never at the reference."""
    broken = spoiled(0, float("nan"))
    assert len(example(learner=broken, criterion="easy-reference").index_b) == 2
    assert len(example(reference=broken, criterion="hard-learner").index_b) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype_and_embeddings_with_gradients_are_taken(dtype: torch.dtype) -> None:
    """Half, single and double precision draw, also straight from a graph that wants gradients."""
    eye = torch.eye(4, dtype=dtype)
    learner = Pairs(eye.clone().requires_grad_(), eye.flip(0), 10.0, -5.0)
    assert len(example(reference=Pairs(eye, eye, 10.0, -5.0), learner=learner, size=4, chunks=9).index_b) == 4


def test_large_finite_rows_are_not_taken_for_infinite() -> None:
    """A row whose sum overflows though its members are finite is not called NaN or inf."""
    with pytest.raises(UsageError, match="L2-normalise"):
        example(learner=replace(spoiled(0, 3e38), text_BD=torch.full((4, 4), 3e38)), gain=1e300)


def test_chunks_sum_to_the_size() -> None:
    """Chunk sizes add up to exactly the size, differ by at most one, and are never empty."""
    assert chunk_sizes(32768, 16) == [2048] * 16
    assert chunk_sizes(10, 4) == [3, 3, 2, 2]
    assert chunk_sizes(3, 16) == [1, 1, 1]


def test_a_lone_candidate_is_drawn() -> None:
    """B = 1 and size = 1 work."""
    one = Pairs(torch.ones(1, 1), torch.ones(1, 1), 1.0, 0.0)
    draw = draw_joint(one, one, np.zeros((1, 16), dtype=np.uint8), size=1, loss="softmax")
    assert draw.index_b.tolist() == [0]
