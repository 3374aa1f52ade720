"""Choose the arithmetic of a model: bfloat16 where the machine computes it natively, float32 elsewhere.

bfloat16 on a CPU without AVX512_BF16 or AMX is emulated and slower than float32, so "auto" never picks it there.
What bfloat16 costs in accuracy is measured when the model is loaded: the largest change of a cosine on a probe batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import torch

from curate.errors import UsageError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
NativePrecision = Literal["fp32", "bf16", "fp16"]
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Matched and mismatched pairs of a trained CLIP lie about 0.1 apart; a tenth of it for rounding is the most we accept.
COSINE_BOUND: Final = 0.01
_CPU_FLAGS: Final = ("avx512_bf16", "amx_bf16", "bf16")


def choose_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is cuda where there is one. Errors: UsageError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {device!r} is not available here ({str(error).splitlines()[0]}); use auto or cpu"
        ) from error
    return chosen


def choose_precision(precision: Precision, device: torch.device) -> NativePrecision:
    """Resolve "auto". Errors: UsageError for an unknown name."""
    if precision == "auto":
        return "bf16" if has_native_bf16(device) else "fp32"
    if precision not in DTYPES:
        raise UsageError(f"precision {precision!r} is unknown; choose auto, fp32, bf16 or fp16")
    return precision


def has_native_bf16(device: torch.device) -> bool:
    """Does this device compute bfloat16 products in hardware?"""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and any(flag in _CPU_FLAGS for flag in _cpu_flags(Path("/proc/cpuinfo")))


def _cpu_flags(cpuinfo: Path) -> list[str]:
    if not cpuinfo.is_file():
        return []
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return value.split()
    return []
