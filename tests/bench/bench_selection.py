"""How fast the sampler is, against bare matrix products and against the paper's pseudo-code.

    python tests/bench/bench_selection.py [--quick] [--only big|kernels|literal|precision]

big        a super-batch of the paper's size, by the kernel that `draw_joint` takes; in bf16 too where the processor
           multiplies it
kernels    one update by each kernel for each storage, on one core: GFLOP/s and ratios to torch.mm
literal    B = 8,192 against the published pseudo-code
precision  members in common with the fp64 oracle: `arithmetic` on the embeddings as stored, `with storage` where the
           oracle sees them before they were rounded

The sides of every ratio run in turn on the same inputs, in a process of their own; all repetitions are printed. No
ratio is printed unless the sampler first agrees with a plain fp64 kernel, member by member in fp64, and each kernel's
scores in fp32 to 3e-6 of the largest. `--quick` is smaller.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from curate.kernels.selection import Loss, PairKernel, Side, native
from curate.kernels.selection.native import NativePairs
from curate.kernels.selection.plain import PlainPairs
from curate.kernels.selection.tiled import TiledPairs
from curate.selection.joint import Draw, Pairs, canonical_order, draw_joint, draw_with
from curate.selection.noise import gumbel

# B candidates, b drawn, c one chunk of those, D width
CHUNKS, WIDTH, GAIN = 16, 512, 100.0
LOSSES: tuple[Loss, ...] = get_args(Loss)
STORAGES = (torch.float32, torch.float16, torch.bfloat16)


def corpus(size: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Pairs, Pairs, np.ndarray]:
    """(reference, learner, ids): matched pairs with noise, the learner's noisier; scales and biases as trained."""
    generator = torch.Generator().manual_seed(0)

    def tower(content_BD: Tensor, signal: float) -> Tensor:
        noise_BD = torch.empty(size, width).normal_(generator=generator)
        return normalize(noise_BD.add_(content_BD, alpha=signal), dim=1).to(dtype)

    content_BD = torch.empty(size, width).normal_(generator=generator)
    reference = Pairs(tower(content_BD, 0.5), tower(content_BD, 0.5), 50.0, -8.0)
    learner = Pairs(tower(content_BD, 0.3), tower(content_BD, 0.3), 40.0, -7.0)
    return reference, learner, np.random.default_rng(0).integers(0, 256, (size, 16), dtype=np.uint8)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds; processor time counts all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def literal(reference: Pairs, learner: Pairs, ids: np.ndarray, size: int) -> Tensor:
    """Algorithm 2 line by line in fp32 torch: labels and masks from identity matrices, masked sums of the whole matrix.

    Only the draw differs from the paper: Gumbel-top-k on shared noise, since exp overflows at gain 100.
    """
    B = len(ids)

    def losses(pairs: Pairs) -> Tensor:
        logits_BB = pairs.image_BD @ pairs.text_BD.T * pairs.scale + pairs.bias
        label_BB = 2 * torch.eye(B) - torch.ones(B, B)
        return -torch.nn.functional.logsigmoid(label_BB * logits_BB)

    score_BB = GAIN * (losses(learner) - losses(reference))
    own_B = torch.diag(score_BB)
    drawn_b = (own_B + torch.from_numpy(gumbel(ids, seed=0, step=0, chunk=0))).topk(size // CHUNKS).indices
    for chunk in range(1, CHUNKS):
        sampled_B = torch.eye(B)[drawn_b].sum(0)
        logit_B = own_B + (score_BB * sampled_B.view(B, 1)).sum(0) + (score_BB * sampled_B.view(1, B)).sum(1)
        noisy_B = logit_B - sampled_B * 1e8 + torch.from_numpy(gumbel(ids, seed=0, step=0, chunk=chunk))
        drawn_b = torch.cat([drawn_b, noisy_B.topk(size // CHUNKS).indices])
    return drawn_b


def tuned_full_matrix(reference: Pairs, learner: Pairs, ids: np.ndarray, size: int) -> Tensor:
    """The same by a careful hand: in place, one softplus, a mask made without the identity matrix."""

    def losses(pairs: Pairs) -> Tensor:
        logits_BB = (pairs.image_BD @ pairs.text_BD.T).mul_(pairs.scale).add_(pairs.bias)
        logits_BB.diagonal().neg_()
        return softplus(logits_BB)

    score_BB = losses(learner).sub_(losses(reference)).mul_(GAIN)
    own_B = score_BB.diagonal()
    logit_B, drawn_b = own_B, torch.empty(0, dtype=torch.int64)
    for chunk in range(CHUNKS):
        if chunk:
            mask_B = torch.zeros(len(ids)).index_fill_(0, drawn_b, 1.0)
            logit_B = own_B + (score_BB * mask_B[:, None]).sum(0) + (score_BB * mask_B[None, :]).sum(1) - 1e8 * mask_B
        noise_B = torch.from_numpy(gumbel(ids, seed=0, step=0, chunk=chunk))
        drawn_b = torch.cat([drawn_b, (logit_B + noise_B).topk(size // CHUNKS).indices])
    return drawn_b


def sides_of(reference: Pairs, learner: Pairs, dtype: torch.dtype) -> list[Side]:
    """What a kernel takes, for the criterion `learnability`."""
    return [
        Side(pairs.image_BD.to(dtype), pairs.text_BD.to(dtype), pairs.scale, pairs.bias, weight)
        for pairs, weight in ((learner, 1.0), (reference, -1.0))
    ]


def kernel_types() -> dict[str, Callable[..., PairKernel]]:
    """The kernels that this machine has."""
    return {"native": NativePairs, "tiled": TiledPairs} if native.why_not() is None else {"tiled": TiledPairs}


def plain_draw(reference: Pairs, learner: Pairs, ids: np.ndarray, size: int, loss: Loss) -> Draw:
    """The oracle's draw: plain kernel, fp64."""
    sides = sides_of(reference, learner, torch.float64)
    kernel = PlainPairs(sides, loss, torch.from_numpy(canonical_order(ids)))
    return draw_with(kernel, ids, size=size, chunks=CHUNKS, gain=GAIN, seed=0, step=0)


def overlap(one_b: np.ndarray, other_b: np.ndarray) -> float:
    return len(np.intersect1d(one_b, other_b)) / len(one_b)


def oracle_agrees() -> bool:
    """fp64 input, several tiles, both losses: the same members in the same order as the plain kernel."""
    reference, learner, ids = corpus(1500, 64, torch.float64)
    return all(
        np.array_equal(
            draw_joint(reference, learner, ids, size=608, loss=loss).index_b,
            plain_draw(reference, learner, ids, 608, loss).index_b,
        )
        for loss in ("sigmoid", "softmax")
    )


def kernels_agree() -> bool:
    """fp32, both losses, three updates: scores as those of the plain kernel in fp64."""
    reference, learner, _ = corpus(1500, 64)
    order_B = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for loss in LOSSES:
        kernels = [PlainPairs(sides_of(reference, learner, torch.float64), loss, order_B)]
        kernels += [
            make(sides_of(reference, learner, torch.float32), loss, order_B) for make in kernel_types().values()
        ]
        for rows_c in order_B[:608].split(203):
            for kernel in kernels:
                kernel.update(rows_c)
        exact_B = kernels[0].scores()
        worst = max(worst, *(float((one.scores() - exact_B).abs().max() / exact_B.abs().max()) for one in kernels[1:]))
    return worst < 3e-6


def products(reference: Pairs, learner: Pairs, chosen: int, share: float) -> None:
    """The matrix products of `share` of a draw and nothing else: torch.mm with all cores, each result overwritten."""
    rows = int(len(reference.image_BD) * share)
    out_Bc: dict[int, Tensor] = {}
    for start in range(0, chosen * (CHUNKS - 1) // CHUNKS, chosen // CHUNKS):
        stop = start + chosen // CHUNKS
        for pairs in (reference, learner):
            for many_BD, few_BD in ((pairs.image_BD, pairs.text_BD), (pairs.text_BD, pairs.image_BD)):
                for block_nD in many_BD[:rows].split(4096):
                    out_nc = out_Bc.setdefault(
                        len(block_nD), torch.empty(len(block_nD), stop - start, dtype=block_nD.dtype)
                    )
                    torch.mm(block_nD, few_BD[start:stop].T, out=out_nc)


def big(loss: Loss, quick: bool, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """(a): one super-batch of the paper's size against its bare matrix products; resident memory at its peak."""
    size, drawn = (163_840, 32_768) if not quick else (32_768, 6_554)
    drawn -= drawn % CHUNKS
    reference, learner, ids = corpus(size, WIDTH, dtype)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    slice_before = timed(lambda: products(reference, learner, drawn, 1 / 16))
    drawn_by: list[Draw] = []
    sampler = timed(lambda: drawn_by.append(draw_joint(reference, learner, ids, size=drawn, loss=loss)))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    slice_after = timed(lambda: products(reference, learner, drawn, 1 / 16))
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # without barriers, whose spinning counts as work where others use the machine
    lone = 16 * timed(lambda: products(reference, learner, drawn, 1 / 16))[1]
    torch.set_num_threads(cores)
    whole = timed(lambda: products(reference, learner, drawn, 1.0)) if not quick else None
    sliced = [8 * (one + other) for one, other in zip(slice_before, slice_after, strict=True)]  # 2/16 of the work
    bare = whole or sliced
    return {
        "B": size, "b": drawn, "loss": loss, "stored": str(dtype)[6:], "kernel": drawn_by[0].kernel,
        "sampler_s": sampler, "products_slice_x16_s": sliced, "products_whole_s": whole,
        "ratio_wall": sampler[0] / bare[0],
        "products_one_thread_processor_s": lone, "ratio_processor": sampler[1] / lone,
        "peak_rss_mb": peak_mb, "rss_before_mb": before_mb,
    }  # fmt: skip


def against_literal(quick: bool) -> dict[str, object]:
    """(b): B = 8,192 at filtering ratio 0.8 against the published pseudo-code, and against the same tuned by hand."""
    drawn = 1632  # 16 x 102, so that the pseudo-code's truncation changes nothing
    reference, learner, ids = corpus(8192, WIDTH)
    sides: dict[str, Callable[[], np.ndarray]] = {
        "literal": lambda: literal(reference, learner, ids, drawn).numpy(),
        "tuned": lambda: tuned_full_matrix(reference, learner, ids, drawn).numpy(),
        "sampler": lambda: draw_joint(reference, learner, ids, size=drawn, loss="sigmoid").index_b,
    }
    drawn_by: dict[str, np.ndarray] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(3 if quick else 7):
        for name, side in sides.items():
            seconds[name].append(timed(lambda name=name, side=side: drawn_by.__setitem__(name, side())))
    report: dict[str, object] = {f"{name}_s": found for name, found in seconds.items()}
    report["overlap"] = overlap(drawn_by["literal"], drawn_by["sampler"])
    for name in ("literal", "tuned"):
        pairs = list(zip(seconds[name], seconds["sampler"], strict=True))
        report[f"{name}_ratio_wall"] = statistics.median(their[0] / our[0] for their, our in pairs)
        report[f"{name}_ratio_processor"] = statistics.median(their[1] / our[1] for their, our in pairs)
    return report


def one_update(quick: bool) -> dict[str, object]:
    """(d): c = 2,048 newly chosen against the other candidates, one core, kernel by kernel and storage by storage.

    Processor seconds; rates are medians in GFLOP/s, counting the products of two models and both directions alone.
    """
    size, chosen = (8192 if quick else 16_384), 2048
    reference, learner, _ = corpus(size, WIDTH)
    order_B = torch.arange(size)
    torch.set_num_threads(1)
    found: dict[str, object] = {"B": size, "c": chosen}
    for dtype in STORAGES:
        sides = sides_of(reference, learner, dtype)
        by_mm = dtype == torch.float32 or (dtype == torch.bfloat16 and native.multiplies_bf16())
        for loss in LOSSES:
            seconds: dict[str, list[float]] = {}
            for _ in range(3 if quick else 5):
                for name, make in kernel_types().items():
                    kernel = make(sides, loss, order_B)
                    seconds.setdefault(name, []).append(timed(lambda kernel=kernel: kernel.update(order_B[:chosen]))[1])
                if by_mm:
                    seconds.setdefault("torch.mm", []).append(timed(lambda sides=sides: bare(sides, chosen))[1])
            flops = 2 * 4 * (size - chosen) * chosen * WIDTH
            for name, each in seconds.items():
                found[f"{loss} {str(dtype)[6:]} {name}"] = f"{flops / statistics.median(each) / 1e9:.1f} GFLOP/s"
                if by_mm and name != "torch.mm":
                    pairs = zip(each, seconds["torch.mm"], strict=True)
                    found[f"{loss} {str(dtype)[6:]} {name}/mm"] = statistics.median(our / mm for our, mm in pairs)
    return found


def bare(sides: list[Side], chosen: int) -> None:
    """The products of one update, each result overwritten."""
    out_nc = torch.empty(4096, chosen, dtype=sides[0].image_BD.dtype)
    for side in sides:
        for many_BD, few_BD in ((side.image_BD, side.text_BD), (side.text_BD, side.image_BD)):
            for block_nD in many_BD[chosen:].split(4096):
                torch.mm(block_nD, few_BD[:chosen].T, out=out_nc[: len(block_nD)])


def precision(quick: bool) -> dict[str, object]:
    """(c): members in common with the fp64 oracle at gain 100, by storage; `arithmetic` is the kernel's own share."""
    size = 2048 if quick else 8192
    reference, learner, ids = corpus(size, WIDTH)
    drawn, found = size // 5, {}
    for loss in LOSSES:
        unrounded = plain_draw(reference, learner, ids, drawn, loss).index_b
        for dtype in STORAGES:
            stored = [
                Pairs(pairs.image_BD.to(dtype), pairs.text_BD.to(dtype), pairs.scale, pairs.bias)
                for pairs in (reference, learner)
            ]
            draw = draw_joint(*stored, ids, size=drawn, loss=loss)
            rounded = plain_draw(*stored, ids, drawn, loss).index_b
            found[f"{loss} {str(dtype)[6:]} arithmetic"] = overlap(draw.index_b, rounded)
            found[f"{loss} {str(dtype)[6:]} with storage"] = overlap(draw.index_b, unrounded)
    return {"B": size, "b": drawn, "kernel": draw.kernel, **found}


def in_own_process(part: str, quick: bool) -> dict[str, object]:
    """A part in a fresh interpreter, so that its memory peak is its own."""
    command = [sys.executable, str(Path(__file__)), "--part", part, *(["--quick"] if quick else [])]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def hardware() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller problems, fewer repetitions")
    parser.add_argument("--only", choices=["big", "kernels", "literal", "precision"], help="one part of the four")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, object]]] = {
        "big-sigmoid": lambda: big("sigmoid", options.quick),
        "big-softmax": lambda: big("softmax", options.quick),
        "big-sigmoid-bf16": lambda: big("sigmoid", options.quick, torch.bfloat16),
        "big-softmax-bf16": lambda: big("softmax", options.quick, torch.bfloat16),
        "kernels": lambda: one_update(options.quick),
        "literal": lambda: against_literal(options.quick),
        "precision": lambda: precision(options.quick),
    }
    if options.part:
        print(json.dumps(parts[options.part]()))
        return 0
    print(f"hardware  {hardware()}, torch threads {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"versions  Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}")
    why = native.why_not()
    print(f"kernel    {f'no native one: {why}' if why else 'native'}")
    print(f"bf16      {'multiplied by the processor' if native.multiplies_bf16() else 'widened to fp32'}")
    if not (oracle_agrees() and kernels_agree()):
        print(
            "oracle    FAILS: the sampler does not draw what the plain kernel draws; no speed is reported",
            file=sys.stderr,
        )
        return 1
    print(
        "oracle    agrees (fp64, B = 1,500, b = 608, both losses, in draw order; fp32, scores of each kernel to 3e-6)"
    )
    print("times     (wall, processor) seconds\n")
    for part in parts:
        if part.endswith("bf16") and not native.multiplies_bf16():
            continue
        if options.only is None or part.startswith(options.only):
            for name, value in in_own_process(part, options.quick).items():
                print(f"{part:16s}  {name:32s} {shown(value)}")
    return 0


def shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(shown(item) if not isinstance(item, list) else f"({shown(item)})" for item in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
