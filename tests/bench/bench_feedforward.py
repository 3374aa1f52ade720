"""Fast feedforward layers against dense ones: every case of the table in kernels/fff/README.md, both sides in turn.

    python -m tests.bench.bench_feedforward [--only 3200] [--rounds 15] [--threads 2]

The dense side is Linear-GELU-Linear, 768 -> 3,072 -> 768, of the same dtype, the best of plain and chunked (256 tokens
at a time). Every call gets tokens that no earlier call had, weights are initialised, and ratios are medians over rounds
in which both sides run one after the other. Single tokens come
in a row, 200 of them (20 through a stack of layers), after as many untimed ones, so that each side finds in the caches
what its own calls leave there. Beside each stands the dense layer of equal active width, the baseline of quality, and
the distance from the roofline: the larger of FLOPs over the measured matrix rate and bytes (of weights touched once, of
activations read and written) over the measured bandwidth. Nothing is printed unless the kernels equal the oracle first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.kernels.fff import dispatch
from tests.bench.machine import conditions
from tests.oracle.fff_cases import TOLERANCE, leaf_case, leaf_errors, path_case, path_errors

WIDTH, HIDDEN, CHUNK = 768, 3072, 256


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `sizes` is (depth, leaf width), or (trees, depth) of the path variant; `stack` layers in a row."""

    tokens: int
    variant: str
    sizes: tuple[int, int]
    dtype: torch.dtype
    backward: bool = False
    stack: int = 1
    device: str = "cpu"

    @property
    def name(self) -> str:
        shape = "path {}x{}" if self.variant == "path" else "leaf depth {} x {}"
        extra = f", stack of {self.stack}" if self.stack > 1 else ""
        kind = ", forward + backward" if self.backward else ""
        return f"{self.device} {self.tokens} tokens, {shape.format(*self.sizes)}, {str(self.dtype)[6:]}{kind}{extra}"

    @property
    def active(self) -> int:
        return self.sizes[0] * (self.sizes[1] + 1) if self.variant == "path" else self.sizes[1]


FP32, BF16 = torch.float32, torch.bfloat16
CPU_CASES = [
    Case(1, "leaf", (5, 96), FP32),
    Case(1, "leaf", (5, 96), FP32, stack=12),
    Case(1, "path", (1, 11), FP32),
    Case(1, "path", (1, 11), FP32, stack=12),
    *(Case(50, "leaf", (6, 64), dtype) for dtype in (FP32, BF16)),
    *(Case(3200, "leaf", (5, 96), dtype) for dtype in (FP32, BF16)),
    Case(3200, "path", (1, 11), FP32),
    Case(12800, "leaf", (5, 96), BF16),
    *(Case(1600, "leaf", (5, 96), dtype, backward=True) for dtype in (FP32, BF16)),
]
GPU_CASES = [Case(12800, "leaf", (5, 128), BF16, backward=backward, device="cuda") for backward in (False, True)]


def dense(width: int, case: Case) -> nn.Module:
    layers = (nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, WIDTH))
    return nn.Sequential(*layers).to(device=case.device, dtype=case.dtype)


def fast(case: Case) -> nn.Module:
    made: dict[str, object] = {"device": case.device, "dtype": case.dtype}
    if case.variant == "path":
        return PathFeedforward(WIDTH, trees=case.sizes[0], depth=case.sizes[1], **made)  # type: ignore[arg-type]
    return FastFeedforward(WIDTH, depth=case.sizes[0], leaf_width=case.sizes[1], **made)  # type: ignore[arg-type]


def in_chunks(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x_TD: torch.cat([layer(part) for part in x_TD.split(CHUNK)])


def side(
    layers: list[nn.Module], call: Callable[[nn.Module], Callable[[Tensor], Tensor]], case: Case
) -> Callable[[Tensor], None]:
    """What is timed: all layers on the same tokens, one after the other, with their backward where asked."""
    calls = [call(layer) for layer in layers]

    def inference(x_TD: Tensor) -> None:
        for one in calls:
            one(x_TD)

    def training(x_TD: Tensor) -> None:
        x_TD = x_TD.requires_grad_()
        for layer, one in zip(layers, calls, strict=True):
            layer.zero_grad(set_to_none=True)
            y_TE = one(x_TD)
            y_TE.backward(x_TD.detach())
        x_TD.grad = None

    return training if case.backward else inference


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds per layer of every side, and the median of the ratio to the better dense one."""
    torch.manual_seed(0)
    full, active = ([dense(width, case) for _ in range(case.stack)] for width in (HIDDEN, case.active))
    layers = [fast(case) for _ in range(case.stack)]
    sides = {
        "fast": side(layers, lambda layer: layer, case),
        "dense": side(full, lambda layer: layer, case),
        "chunked": side(full, in_chunks, case),
        "active": side(active, lambda layer: layer, case),
    }
    if case.tokens <= CHUNK:
        del sides["chunked"]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    repeats = 1 if case.tokens > 1 else 200 if case.stack == 1 else 20
    with torch.inference_mode(not case.backward):
        for round_ in range(rounds + 2):
            for name, call in sides.items():
                batches = torch.randn(2 * repeats, case.tokens, WIDTH, device=case.device).to(case.dtype).unbind(0)
                for x_TD in batches[repeats:] if repeats > 1 else ():
                    call(x_TD)
                if case.device == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                for x_TD in batches[:repeats]:
                    call(x_TD)
                if case.device == "cuda":
                    torch.cuda.synchronize()
                if round_ >= 2:
                    seconds[name].append((time.perf_counter() - began) / repeats / case.stack)
    best = [
        min(pair) for pair in zip(*(seconds[name] for name in ("dense", "chunked") if name in seconds), strict=True)
    ]
    found = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = sorted(slow / quick for slow, quick in zip(best, seconds["fast"], strict=True))
    found |= {
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 10],
        "high": ratios[-1 - len(ratios) // 10],
    }
    found["roof"] = roof(case, layers[0])
    return found


def roof(case: Case, layer: nn.Module) -> float:
    """Seconds that the arithmetic or the bytes of a forward pass need at the measured rates; thrice with backward."""
    size = torch.empty(0, dtype=case.dtype).element_size()
    if case.variant == "path":
        flops, touched = case.tokens * case.active * 4 * WIDTH, case.active * min(case.tokens, 340) * 2 * WIDTH
        inner = 0
    else:
        depth, width = case.sizes
        flops = case.tokens * (4 * WIDTH * width + 2 * WIDTH * depth)
        x_TD = torch.randn(case.tokens, WIDTH, device=case.device).to(case.dtype)
        leaves = len(layer.leaf_indices(x_TD).unique())  # type: ignore[operator]
        touched, inner = leaves * 2 * WIDTH * width + (2**depth - 1) * WIDTH, case.tokens * width
    moved = (touched + case.tokens * 2 * WIDTH + inner) * size
    rate, bandwidth = rates(case.device, case.dtype)
    return max(flops / rate, moved / bandwidth) * (3 if case.backward else 1)


_rates: dict[tuple[str, torch.dtype], tuple[float, float]] = {}


def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large product, bytes/s of reading 200 MB) as torch reaches them here, best of five."""
    if (device, dtype) not in _rates:
        side_ = 1536 if device == "cpu" else 8192
        a, b = (torch.randn(side_, side_, device=device).to(dtype) for _ in range(2))
        long = torch.zeros(50_000_000, device=device)

        def best(call: Callable[[], object]) -> float:
            taken = []
            for _ in range(5):
                began = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - began)
            return min(taken)

        flops = 2 * side_**3 / best(lambda: a @ b)
        if device == "cpu" and dtype == BF16:  # where bf16 is emulated, the machine's rate is that of fp32
            flops = max(flops, rates(device, FP32)[0])
        _rates[device, dtype] = (flops, long.numel() * 4 / best(long.sum))
    return _rates[device, dtype]


def end_to_end(rounds: int, batch: int = 64) -> None:
    """A ViT-B/32 image tower with dense blocks against the same with leaf depth 5 x 96 in every block."""
    import open_clip

    from curate.feedforward.surgery import FeedforwardConfig, replace_feedforward

    towers = {}
    for name in ("dense", "fast"):
        model = open_clip.create_model("ViT-B-32").eval()
        if name == "fast":
            replace_feedforward(model, FeedforwardConfig(depth=5, leaf_width=96), where="vision")
        towers[name] = model.visual
    seconds: dict[str, list[float]] = {name: [] for name in towers}
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            image_BCHW = torch.randn(batch, 3, 224, 224)
            for name, tower in towers.items():
                began = time.perf_counter()
                tower(image_BCHW)
                if round_:
                    seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(slow / quick for slow, quick in zip(seconds["dense"], seconds["fast"], strict=True))
    times = "  ".join(f"{name} {1e3 * statistics.median(found):.0f} ms" for name, found in seconds.items())
    print(f"| ViT-B/32 image tower, batch {batch}, float32 | {ratio:.2f}x | {times} |")


def oracle_agrees() -> bool:
    """The kernels that will be timed equal the plain one first."""
    for dtype in (FP32, BF16):
        case, trees = leaf_case("odd", dtype), path_case("odd", dtype)
        kernel = dispatch.leaf_kernel(case.x, case.leaves)
        worst = max(leaf_errors(kernel, case, "gelu").values())
        if dtype == FP32:
            worst = max(worst, *path_errors(dispatch.path_kernel(trees.x), trees, "gelu").values())
        if worst > TOLERANCE[dtype]:
            print(f"oracle: {dtype} is off by {worst:.1e}", file=sys.stderr)
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{conditions()}, {arguments.threads} threads")
    if not oracle_agrees():
        return 1
    print("oracle agrees")
    cases = CPU_CASES + (GPU_CASES if torch.cuda.is_available() else [])
    print("| case | over best dense (10-90 %) | fast | dense | equal active width | roofline | share of it |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        if arguments.only in case.name:
            found = measure(case, arguments.rounds)
            best = min(found[name] for name in ("dense", "chunked") if name in found)
            cells = [f"{found['ratio']:.1f}x ({found['low']:.1f}-{found['high']:.1f})"]
            cells += [shown(seconds) for seconds in (found["fast"], best, found["active"], found["roof"])]
            print(f"| {case.name} | {' | '.join(cells)} | {found['roof'] / found['fast']:.0%} |", flush=True)
    if arguments.only in "ViT-B/32 end to end":
        end_to_end(arguments.rounds)
    if not torch.cuda.is_available():
        print("GPU cases: not measured, no GPU here")
    return 0


def shown(seconds: float) -> str:
    unit, name = next(pair for pair in ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= pair[0] or pair[1] == "us")
    return f"{seconds / unit:.3g} {name}"


if __name__ == "__main__":
    sys.exit(main())
