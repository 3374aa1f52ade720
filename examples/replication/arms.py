"""The arms of the study, by name: what differs from joint selection at gain 100 in 16 chunks."""

from __future__ import annotations

from typing import Any, Final

UNIFORM: Final = {"criterion": "uniform"}
ARMS: Final[dict[str, dict[str, Any]]] = {
    "uniform": UNIFORM,
    "uniform-lr-3e-3": {**UNIFORM, "lr": 3e-3},
    "uniform-lr-3e-4": {**UNIFORM, "lr": 3e-4},
    "jest": {},
    "jest-lr-3e-3": {"lr": 3e-3},
    "handover": {"handover": "auto"},
    "uniform-warm-20": {**UNIFORM, "warmup": 0.02},  # steps of a thousand; the others take 100
    "jest-warm-20": {"warmup": 0.02},
    "flexi-warm-20": {"scoring": "flexi", "warmup": 0.02},
    "handover-warm-20": {"handover": "auto", "warmup": 0.02},
    "easy-reference": {"criterion": "easy-reference"},
    "hard-learner": {"criterion": "hard-learner"},
    "independent": {"chunks": 1},  # one chunk: every pair by its own score
    "jest-gain-1": {"gain": 1.0},
    "jest-gain-10": {"gain": 10.0},
    "jest-4-chunks": {"chunks": 4},
    "flexi": {"scoring": "flexi"},
    "flexi-handover": {"scoring": "flexi", "handover": "auto"},
    "lag-8": {"lag": 8},
    "alignment": {"criterion": "alignment", "gain": None},
    "vit-uniform": {**UNIFORM, "tower": "vit"},
    "vit-jest": {"tower": "vit"},
    "vit-fff-uniform": {**UNIFORM, "tower": "vit-fff"},
    "vit-fff-jest": {"tower": "vit-fff"},
}
