"""The Triton kernels on a GPU, one by one, against their floors and against the matrix products they compete with.

    python -m tests.bench.bench_on_gpu [--tokens 1 64 3200 12800] [--candidates 163840]

The ceilings are measured first: bandwidth of a copy (bytes read plus written) and the rate of a bf16 product. Times are
medians of replays of a CUDA graph (`eager`: of plain calls, which for few tokens is the time to launch). A kernel's
floor is the larger of its bytes over the one and its operations over the other. Every time is preceded by a comparison
with the oracle on the same tensors, on random data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from triton.testing import do_bench, do_bench_cudagraph

from curate.kernels.fff import Leaves, on_gpu, plain
from curate.kernels.selection import Loss, Side
from curate.kernels.selection.on_gpu import GpuPairs
from curate.kernels.selection.plain import PlainPairs
from tests.bench.machine import conditions

# T tokens, D width, L leaves of H neurons; B candidates, c newly chosen
WIDTH, HIDDEN, LEAVES, NEURONS = 768, 3072, 32, 96
CHOSEN = 2048
DTYPE = torch.bfloat16


def replayed(work: Callable[[], object]) -> float:
    """Milliseconds of one replay."""
    return float(do_bench_cudagraph(work, rep=100, return_mode="median"))


def eager(work: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    return float(do_bench(work, warmup=50, rep=200, return_mode="median"))


def ceilings() -> tuple[float, float]:
    """(bytes, operations) per millisecond, of a 2 GiB copy and of a bf16 product of 8,192^3."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    copied, multiplied = eager(lambda: target.copy_(source)), eager(lambda: a @ b)
    print(
        f"copy {2 * source.nbytes / copied / 1e9:.2f} TB/s, bf16 product {2 * 8192**3 / multiplied / 1e9:.0f} TFLOP/s"
    )
    return 2 * source.nbytes / copied, 2 * 8192**3 / multiplied


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def leaf(T: int, bandwidth: float, rate: float) -> None:
    """Forward and backward of the leaf variant, beside a dense layer of width 3,072."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").div_(shape[-2] ** 0.5 if len(shape) > 2 else 1).to(DTYPE)

    x, grad, gate, index = draw(T, WIDTH), draw(T, WIDTH), draw(T), torch.randint(LEAVES, (T,), device="cuda")
    w = Leaves(*(draw(LEAVES, *s) for s in ((WIDTH, NEURONS), (NEURONS,), (NEURONS, WIDTH), (WIDTH,))))
    y, pre = on_gpu.leaf_forward(x, index, gate, w, "gelu")
    few = slice(0, min(T, 512))
    wanted = plain.leaf_forward(x[few], index[few], gate[few], w, "gelu")[0]
    assert error(y[few], wanted) < 1e-2, f"wrong at {T} tokens: {error(y[few], wanted):.1e}"
    dense = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)).to("cuda", DTYPE)
    touched = min(T, LEAVES) * 2 * WIDTH * NEURONS
    bytes_ = 2 * (T * (2 * WIDTH + 2 * NEURONS) + touched)
    floor = max(bytes_ / bandwidth, 4 * T * WIDTH * NEURONS / rate)
    with torch.no_grad():
        forward = lambda: on_gpu.leaf_forward(x, index, gate, w, "gelu")  # noqa: E731
        backward = lambda: on_gpu.leaf_backward(grad, x, index, gate, pre, w, "gelu")  # noqa: E731
        rows = {
            "forward": replayed(forward),
            "backward": replayed(backward),
            "dense forward": replayed(lambda: dense(x)),
        }
        rows |= {"forward, eager": eager(forward), "dense forward, eager": eager(lambda: dense(x))}
    shown = ", ".join(f"{name} {1e3 * ms:.1f} us" for name, ms in rows.items())
    ratio = rows["dense forward"] / rows["forward"]
    print(f"leaf {T} tokens: {shown}; floor {1e3 * floor:.1f} us; dense / leaf {ratio:.2f}")


def pairs(B: int, loss: Loss, rate: float) -> None:
    """One update with 2,048 chosen, beside the bare products of the same sizes."""
    sides = [Side(*(normalize(torch.randn(B, WIDTH, device="cuda"), dim=1).to(DTYPE) for _ in range(2)), s, -8.0, w)
             for s, w in ((50.0, -1.0), (40.0, 1.0))]  # fmt: skip
    few = [Side(side.image_BD[:600].cpu(), side.text_BD[:600].cpu(), side.scale, -8.0, side.weight) for side in sides]
    ours, oracle = (
        GpuPairs(few, loss, torch.arange(600), device="cuda"),
        PlainPairs(few, loss, torch.arange(600), dtype=torch.float64),
    )
    for kernel in (ours, oracle):
        kernel.update(torch.arange(200))
    assert error(ours.scores(), oracle.scores()) < 1e-5, "wrong scores"
    kernel = GpuPairs(sides, loss, torch.arange(B, device="cuda"))
    chunks = torch.randperm(B, device="cuda").split(CHOSEN)
    times = []
    for chosen_c in chunks[: min(8, B // CHOSEN - 1)]:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        kernel.update(chosen_c)
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    a_BD, b_cD = sides[0].image_BD, sides[0].text_BD[:CHOSEN]
    bare, work = 4 * eager(lambda: a_BD @ b_cD.T), 8 * B * CHOSEN * WIDTH
    ms = sorted(times[1:])[len(times[1:]) // 2]
    print(f"{loss}, {B} candidates x {CHOSEN}: {ms:.2f} ms, {work / ms / 1e9:.0f} TFLOP/s; the four bare products "
          f"(which store B x c) {bare:.2f} ms; floor {work / rate:.2f} ms")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 64, 512, 3200, 12800, 102400])
    parser.add_argument("--candidates", type=int, nargs="*", default=[16384, 163840])
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(conditions(), torch.cuda.get_device_name())
    bandwidth, rate = ceilings()
    for T in options.tokens:
        leaf(T, bandwidth, rate)
    for B in options.candidates:
        for loss in ("sigmoid", "softmax"):
            pairs(B, loss, rate)


if __name__ == "__main__":
    main()
