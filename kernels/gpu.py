"""Whether Triton can run here. Only this module asks; it imports Triton when it must, and needs no GPU to be imported.

Triton raises at launch where there is neither a GPU nor its interpreter (`TRITON_INTERPRET=1`, read when triton is
first imported), so whoever chooses a kernel looks at the tensor first.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_AMPERE = (8, 0)  # the first with bfloat16 and asynchronous copies


def usable(x: Tensor) -> bool:
    """Whether a Triton kernel can take this tensor: a dtype of `DTYPES`, and a GPU that holds it or the interpreter."""
    if x.dtype not in DTYPES or not _installed():
        return False
    if x.is_cuda:
        return torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= _AMPERE
    return x.device.type == "cpu" and interpreting()


def interpreting() -> bool:
    """Whether Triton was imported, or would be, as an interpreter on the processor."""
    if not os.environ.get("TRITON_INTERPRET") or not _installed():
        return False
    import triton

    # triton's own functions were decorated when it was imported: setting the variable later mixes the two
    return bool(triton.knobs.runtime.interpret) and not isinstance(triton.language.sum, triton.JITFunction)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
