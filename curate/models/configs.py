"""Small model configurations of our own, for machines without a GPU: plain open_clip classes, open_clip's tokenizer.

`curate-tiny` learns synthetic scenes on two slow cores in about half a minute (`curate demo`); `curate-small` is a
reference for a few thousand real pairs in minutes. Both have a convolutional image tower, which needs far fewer pairs
than a vision transformer does, and a narrow text tower, because the vocabulary of 49,408 tokens is fixed. The sigmoid
form is the default; `with_loss(config, "softmax")` gives the other.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, Final, Literal

Loss = Literal["sigmoid", "softmax"]

# SigLIP starts at scale 10 and bias -10, for batches of 32,768 (arXiv 2303.15343, section 3.2). The bias that makes
# one pair of a row of B likely is -log(B - 1), about -5 for the batches of a hundred that such small models see:
# measured on 160 steps of synthetic scenes, recall at one of 100 rises from 0.41 to 0.59
# (the softmax form reaches 0.81 in the same steps).
SIGMOID_START: Final = {"init_logit_scale": math.log(10.0), "init_logit_bias": -5.0}

CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "curate-tiny": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
        **SIGMOID_START,
    },
    "curate-small": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 96, "layers": [1, 1, 2, 1], "width": 32, "head_width": 64},
        "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 192, "heads": 6, "layers": 3},
        **SIGMOID_START,
    },
}

# The whole image, squashed to a square: a centre crop would cut objects that captions name.
PREPROCESS: Final[dict[str, Any]] = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def with_loss(config: dict[str, Any], loss: Loss) -> dict[str, Any]:
    """A copy of a model configuration that starts with the scale and bias of the named loss."""
    copy = {k: deepcopy(v) for k, v in config.items() if k not in SIGMOID_START}
    return {**copy, **SIGMOID_START} if loss == "sigmoid" else copy
