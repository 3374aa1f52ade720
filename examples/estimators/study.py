"""What gradient estimators cost and what they learn, beside backprop. Three parts; results go to results.json at once.

    python examples/estimators/study.py curves                   learning on drawn scenes, in equal processor time
    python examples/estimators/study.py curves SHARDS...         the same on pairs of your own
    python examples/estimators/study.py memory                   peak of one step against depth
    python examples/estimators/study.py time --width 512         time of one step against backprop's

Times are processor time of one thread, so that other programs on the machine count for little. A run that is in
--results already is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from task import FEW, Task, noise, problem_of, read_task
from torch import nn

from curate.estimators.local import heads_of
from curate.estimators.memory import peak_bytes
from curate.estimators.names import make_estimator
from curate.estimators.problem import DualEncoderProblem
from curate.estimators.report import GradientEstimator
from curate.estimators.swapping import only_trainable

EXACT_RATES, NOISY_RATES = (5e-4, 2e-3, 8e-3), (1e-4, 5e-4, 2e-3)
HEADS = "logit_*:exact,visual.ln_post.*:exact,visual.proj:exact,ln_final.*:exact,text_projection:exact"


@dataclass(frozen=True, slots=True)
class Arm:
    """An estimator with its options; `fast` with fast feedforward layers; `only` trains nothing but heads or leaves."""

    estimator: str
    rates: tuple[float, ...] = NOISY_RATES
    tangents: int = 1
    rules: str = ""
    fast: bool = False
    only: str = ""

    def make(self) -> GradientEstimator:
        """The estimator itself."""
        return make_estimator(self.estimator, tangents=self.tangents, rules=self.rules)


ARMS = {
    "backprop": Arm("backprop", EXACT_RATES),
    "backprop-checkpoint": Arm("backprop-checkpoint", EXACT_RATES),
    "forward-local": Arm("forward-local", EXACT_RATES),
    "local-backprop": Arm("local-backprop", EXACT_RATES),
    "heads-only": Arm("backprop", EXACT_RATES, only="heads"),
    "forward": Arm("forward"),
    "forward, K = 8": Arm("forward", tangents=8),
    "forward-dense": Arm("forward-dense"),
    "forward-activity": Arm("forward-activity"),
    "zeroth-order": Arm("zeroth-order"),
    "hybrid, heads exact": Arm("hybrid", rules=f"{HEADS},*:forward"),
    "fff backprop": Arm("backprop", EXACT_RATES, fast=True),
    "fff hybrid, leaves forward": Arm("hybrid", EXACT_RATES, rules="*.mlp.*:forward,*:backprop", fast=True),
}
TIMED = {
    **{name: arm for name, arm in ARMS.items() if arm.tangents == 1 and not arm.fast},
    "fff backprop": Arm("backprop", fast=True),
    "fff forward": Arm("forward", fast=True),
    "fff forward-local": Arm("forward-local", fast=True),
    "fff leaves alone, backprop": Arm("backprop", fast=True, only="leaves"),
    "fff leaves alone, forward": Arm("forward", fast=True, only="leaves"),
}
WEIGHED = ("backprop", "backprop-checkpoint", "forward", "forward-dense", "forward-activity", "forward-local",
           "local-backprop", "zeroth-order")  # fmt: skip


@contextlib.contextmanager
def limited(problem: DualEncoderProblem, arm: Arm, batch: Any) -> Iterator[None]:
    """Freeze what the arm does not train."""
    named = dict(problem.module.named_parameters())
    wanted: Any = named
    if arm.only == "heads":
        wanted = heads_of(problem, batch)
    elif arm.only == "leaves":
        wanted = [name for name in named if ".mlp." in name]
    with only_trainable(problem.module, wanted):
        yield


def rate_at(done: float) -> float:
    """Share of the full rate: up over a tenth of the time, then down along a cosine; `done` is from 0 to 1."""
    return max(done / 0.1, 0.01) if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (min(done, 1) - 0.1) / 0.9))


def learn(arm: Arm, rate: float, task: Task, *, seconds: float, batch: int, points: int) -> dict[str, list[float]]:
    """Train for so much processor time; loss and recall of the held-out pairs at equal distances in time."""
    problem, estimator = problem_of(64, 3, task.words, fast=arm.fast, active=32), arm.make()
    log: dict[str, list[float]] = {"seconds": [], "steps": [], "loss": [], "recall": []}
    with limited(problem, arm, task.batch(batch, 0)):
        learning = [p for p in problem.module.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(learning, lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
        spent, step = 0.0, 0
        while True:
            if spent >= len(log["loss"]) * seconds / points:
                found = (spent, step, *task.measure(problem))
                for name, value in zip(log, found, strict=True):
                    log[name].append(round(value, 4))
            if spent >= seconds or not math.isfinite(log["loss"][-1]):
                return log
            started = time.process_time()
            for group in optimiser.param_groups:
                group["lr"] = rate * rate_at(spent / seconds)
            estimator.estimate(problem, task.batch(batch, step), seed=0, step=step)
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimiser.step()
            spent, step = spent + time.process_time() - started, step + 1


def curves(args: argparse.Namespace, results: Results) -> None:
    """Every arm at each of its rates."""
    task = read_task(args.shards, args.samples, args.held)
    for name in args.arms or ARMS:
        for rate in args.rates or ARMS[name].rates:
            key = f"{name}/{rate:g}"
            if key not in results.part("curves"):
                log = learn(ARMS[name], rate, task, seconds=args.seconds, batch=args.batch or 64, points=args.points)
                results.add("curves", key, log)
                print(f"{key}: {log['steps'][-1]:.0f} steps, loss {log['loss'][-1]:.3f}, "
                      f"recall {log['recall'][-1]:.3f}", flush=True)  # fmt: skip


def memory(args: argparse.Namespace, results: Results) -> None:
    """MiB at the peak of one step, for every depth."""
    for depth in args.depths:
        for name in args.arms or WEIGHED:
            key = f"{name}/{depth}"
            if key not in results.part("memory"):
                problem, batch = problem_of(args.width, depth, FEW), noise(args.batch or 64)
                _step(ARMS[name], problem, batch)
                for parameter in problem.module.parameters():
                    parameter.grad = None
                peak = peak_bytes(lambda: _step(ARMS[name], problem, batch), torch.device("cpu")) / 2**20  # noqa: B023
                results.add("memory", key, {"mib": round(peak, 2)})
                print(f"{key}: {peak:.1f} MiB", flush=True)


def times(args: argparse.Namespace, results: Results) -> None:
    """Milliseconds of one step in rounds over all arms; ratios are medians of the ratios within a round."""
    arms = {name: TIMED[name] for name in args.arms or TIMED}
    batch = noise(args.batch or 16)
    problems = {fast: problem_of(args.width, args.layers, FEW, fast=fast) for fast in {a.fast for a in arms.values()}}
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(args.rounds + 1):
        for name, arm in arms.items():
            with limited(problems[arm.fast], arm, batch):
                started = time.process_time()
                _step(arm, problems[arm.fast], batch)
                if turn:  # the first warms up
                    taken[name].append(time.process_time() - started)
            for parameter in problems[arm.fast].module.parameters():
                parameter.grad = None
    for name, own in taken.items():
        ratio = statistics.median(a / b for a, b in zip(own, taken["backprop"], strict=True))
        milliseconds = 1000 * statistics.median(own)
        results.add("time", f"{name}/{args.width}", {"ms": round(milliseconds, 1), "ratio": round(ratio, 3)})
        print(f"{name} at width {args.width}: {milliseconds:.0f} ms, {ratio:.3f} of backprop", flush=True)


def _step(arm: Arm, problem: DualEncoderProblem, batch: Any) -> None:
    arm.make().estimate(problem, batch, seed=0, step=0)


@dataclass(frozen=True, slots=True)
class Results:
    """The file with everything found so far: part, then run."""

    path: Path

    def part(self, name: str) -> dict[str, Any]:
        """The runs of one part."""
        found: dict[str, Any] = json.loads(self.path.read_text()).get(name, {}) if self.path.exists() else {}
        return found

    def add(self, part: str, key: str, value: dict[str, Any]) -> None:
        """Write one more run; the file is under its name only when complete."""
        every = json.loads(self.path.read_text()) if self.path.exists() else {}
        every.setdefault(part, {})[key] = value
        lines = [f'"{name}": {{\n' + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in runs.items()) + "\n}"
                 for name, runs in every.items()]  # fmt: skip
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(partial, self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("curves", "memory", "time"))
    parser.add_argument("shards", nargs="*", help="pairs to learn from; without any, scenes are drawn")
    parser.add_argument("--arms", nargs="+", choices=sorted({*ARMS, *TIMED}), metavar="ARM")
    parser.add_argument("--rates", type=float, nargs="+", help="in place of three for each arm")
    parser.add_argument("--samples", type=int, default=4_000, help="scenes to draw")
    parser.add_argument("--held", type=int, default=500, help="pairs that are held out")
    parser.add_argument("--seconds", type=float, default=40, help="processor time of a run")
    parser.add_argument("--points", type=int, default=10, help="measurements of a run")
    parser.add_argument("--batch", type=int, help="pairs in a step; 64, for times 16")
    parser.add_argument("--depths", type=int, nargs="+", default=(4, 8, 12, 24))
    parser.add_argument("--width", type=int, default=64, help="of both towers, for memory and time")
    parser.add_argument("--layers", type=int, default=3, help="of both towers, for time")
    parser.add_argument("--rounds", type=int, default=3, help="of steps, for time, after one to warm up")
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"curves": curves, "memory": memory, "time": times}[args.part](args, Results(args.results))


if __name__ == "__main__":
    main()
