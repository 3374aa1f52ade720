"""Peak memory of a call: what torch's allocator held beyond what it held before, in bytes.

On a GPU from torch's own counter. On a CPU from the profiler's record of every allocation and release, summed in time
order: temporaries inside operators and tensors saved for a backward pass are counted alike, scratch space that oneDNN
and our C++ kernels take from the system is not. The call runs several times slower meanwhile, so time it apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Run `call` once. Example: `peak_bytes(lambda: torch.zeros(1024), torch.device("cpu"))` is 4096."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    results = record.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
