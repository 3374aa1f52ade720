"""The arms of the study, by name: what differs from joint selection at gain 100 in 16 chunks, 128 pairs from 640."""

from __future__ import annotations

from typing import Any, Final

UNIFORM: Final = {"criterion": "uniform"}
EASY: Final = {"criterion": "easy-reference"}
WARM: Final = {"warmup": 0.02}  # 20 steps of a thousand; the others take 100
FROM_1280: Final = {"filter_ratio": 0.9}
SHARP: Final = {**WARM, **FROM_1280, "gain": 10.0}

CONVNET: Final[dict[str, dict[str, Any]]] = {
    "uniform": UNIFORM,
    "uniform-lr-3e-3": {**UNIFORM, "lr": 3e-3},
    "uniform-lr-3e-4": {**UNIFORM, "lr": 3e-4},
    "uniform-warm-20": {**UNIFORM, **WARM},
    "jest": {},
    "jest-lr-3e-3": {"lr": 3e-3},
    "jest-gain-1": {"gain": 1.0},
    "jest-gain-10": {"gain": 10.0},
    "jest-4-chunks": {"chunks": 4},
    "jest-warm-20": WARM,
    "jest-from-1280-warm-20": SHARP,
    "independent": {"chunks": 1},  # one chunk: every pair by its own score
    "independent-gain-1": {"chunks": 1, "gain": 1.0},
    "independent-gain-10": {"chunks": 1, "gain": 10.0},
    "easy-reference": EASY,
    "easy-reference-warm-20": {**EASY, **WARM},
    "easy-reference-from-1280-warm-20": {**EASY, **WARM, **FROM_1280},
    "hard-learner": {"criterion": "hard-learner"},
    "alignment": {"criterion": "alignment", "gain": None},
    "handover": {"handover": "auto"},
    "handover-warm-20": {"handover": "auto", **WARM},
    "flexi": {"scoring": "flexi"},
    "flexi-warm-20": {"scoring": "flexi", **WARM},
    "flexi-from-1280-warm-20": {"scoring": "flexi", **SHARP},
    "flexi-handover": {"scoring": "flexi", "handover": "auto"},
    "lag-8": {"lag": 8},
}
TRANSFORMER: Final = (
    "uniform", "uniform-lr-3e-3", "uniform-lr-3e-4", "uniform-warm-20", "jest", "jest-warm-20", "flexi-warm-20",
    "jest-from-1280-warm-20", "flexi-from-1280-warm-20", "easy-reference-warm-20", "easy-reference-from-1280-warm-20",
)  # fmt: skip
ARMS: Final[dict[str, dict[str, Any]]] = {
    **CONVNET,
    **{f"{tower}-{arm}": {**CONVNET[arm], "tower": tower} for tower in ("vit", "vit-fff") for arm in TRANSFORMER},
}
