"""Joint example selection on CIFAR-10 with false captions: every arm, seed and noise with curate's own trainer.

    python study.py cifar10.parquet RUNS --noise 0.8 --seeds 0 1 2 --arms uniform jest handover --steps 1000

One run takes one to three minutes on one core (uniform 24 ms a step, joint 60 ms). Runs that are there are left alone,
interrupted ones are taken up again; `collect.py` makes the table and the figures from RUNS.
"""

# N pairs, D width, C channels, H, W height and width, T tokens

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import ARMS
from pool import CAPTIONS, Cifar, pairs_of, read_cifar, split_rows
from torch import Tensor
from towers import CONFIG, build

from curate.costs.ledger import CostLedger
from curate.learner.candidates import Candidates, Reference, all_of
from curate.learner.dataset import CachedPairs
from curate.learner.engine import Progress
from curate.learner.files import RunFiles
from curate.learner.fitting import fit
from curate.learner.problem import LearnerProblem
from curate.learner.running import Extras
from curate.learner.scoring_pass import Scorer
from curate.learner.settings import TrainSettings, parse_settings
from curate.learner.start import Start
from curate.learner.trust import Trusted
from curate.learner.work import PassCosts
from curate.models.build import tokenizer_of
from curate.models.preprocess import Preprocess
from curate.models.spec import parse_spec

REFERENCE_STEPS = 200  # of 128 pairs: ten epochs of 2,500
TESTED = 5_000  # test images of each measurement


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share: images, captions, splits."""

    cifar: Cifar
    token_10T: Tensor
    rows: tuple[Any, Any, Any]
    tokenizer: Any


def bench(parquet: Path) -> Bench:
    """Decode CIFAR-10 and tokenise its ten captions."""
    tokenizer = tokenizer_of(parse_spec("curate-tiny"))
    return Bench(read_cifar(parquet), tokenizer(list(CAPTIONS))[:, :12], split_rows(), tokenizer)


def started(tower: str, seed: int, at: Bench) -> Start:
    module: Any = build(tower, seed)
    return Start(module, CONFIG, at.tokenizer, Preprocess.from_config(module.visual.preprocess_cfg))


def scorer_of(module: Any) -> Scorer:
    return Scorer(LearnerProblem(module, distinct=True), lambda token_BT: token_BT, torch.device("cpu"), 64)


def accuracy(start: Start, at: Bench) -> Callable[[], dict[str, Any]]:
    """Zero-shot accuracy on the first test images, as a measure of the trainer."""
    image_NCHW, label_N = at.cifar.test_NCHW[:TESTED], torch.from_numpy(at.cifar.test_N[:TESTED])

    def measure() -> dict[str, Any]:
        pairs = scorer_of(start.module)(image_NCHW, at.token_10T)
        right = (pairs.image_BD @ pairs.text_BD.T).argmax(1) == label_N
        found = {"samples": TESTED, "classes": 10, "accuracy": float(right.float().mean())}
        return {"retrieval": None, "zeroshot": found}

    return measure


def fitted_reference(at: Bench, seed: int, runs: Path) -> Start:
    """The small model of the study, fitted uniformly on its clean pairs; kept as a run like any other."""
    start = started("convnet", 1000 + seed, at)
    pairs = pairs_of(at.cifar, at.rows[0], at.token_10T)
    settings = TrainSettings(batch=128, steps=REFERENCE_STEPS, lr=1e-3, seed=seed, checkpoint_every=REFERENCE_STEPS)
    fit(start, all_of(pairs), settings, Extras(RunFiles(runs / f"reference-{seed}"), accuracy(start, at)))
    return start


def looked_at(start: Start, pairs: CachedPairs) -> Reference:
    """The reference's embeddings of pairs, as the score tables keep them."""
    seen = scorer_of(start.module)(pairs.image_NCHW, pairs.token_NT)
    known_N = np.ones(len(pairs), bool)
    return Reference(
        seen.image_BD.numpy().astype(np.float16), seen.text_BD.numpy().astype(np.float16), known_N,
        seen.scale, seen.bias, "sigmoid",
    )  # fmt: skip


def settings_of(arm: str, seed: int, steps: int, eval_every: int) -> TrainSettings:
    """One arm's settings; `reference` only names it."""
    given = {name: value for name, value in ARMS[arm].items() if name != "tower"}
    common = {
        "model": ARMS[arm].get("tower", "convnet"), "criterion": "learnability", "reference": "reference",
        "handover": "off", "batch": 128, "filter_ratio": 0.8, "gain": 100.0, "steps": steps, "lr": 1e-3,
        "seed": seed, "eval_every": eval_every, "checkpoint_every": 500, "trusted": ("trusted",), "label": "clean",
    }  # fmt: skip
    return parse_settings({**common, **given})


def run(
    arm: str, seed: int, noise: float, at: Bench, runs: Path, *, steps: int, eval_every: int, until: int | None = None
) -> None:
    """Train one arm, unless it is there; `until` ends it early, on the schedule of all its steps."""
    files = RunFiles(runs / f"{arm}-noise-{noise:g}-seed-{seed}")
    if (files.root / "done").exists():
        return
    files.own.mkdir(parents=True, exist_ok=True)
    settings = settings_of(arm, seed, steps, eval_every)
    pairs = pairs_of(at.cifar, at.rows[2], at.token_10T, noise, seed)
    trusted = pairs_of(at.cifar, at.rows[1], at.token_10T)
    reference, ledger = None, CostLedger()
    if settings.uses_reference:
        model = fitted_reference(at, seed, runs)
        reference = looked_at(model, pairs)
        each = PassCosts(model.module, distinct=True).forward(1, at.token_10T[:1])
        ledger = ledger.add("reference", samples=len(pairs), flops=each * len(pairs))
    candidates: Candidates = all_of(pairs, reference, clean=("true",))
    start = started(settings.model, seed, at)
    watched = Trusted(trusted.image_NCHW, trusted.token_NT, None if reference is None else looked_at(model, trusted))
    extras = Extras(files, accuracy(start, at), watched, ledger, progress=_told(arm, seed, noise, until))
    with suppress(KeyboardInterrupt if until else ()):
        fit(start, candidates, settings, extras)
    (files.root / "done").touch()


def _told(arm: str, seed: int, noise: float, until: int | None) -> Callable[[Progress], None]:
    def tell(state: Progress) -> None:
        if state.step == until:
            raise KeyboardInterrupt
        if state.step % 250 == 0:
            rate = f"{state.samples_per_second:,.0f}/s"
            print(f"{arm} noise {noise:g} seed {seed}: {state.step}/{state.steps} {rate} {state.note}", flush=True)

    return tell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--arms", nargs="+", default=["uniform", "jest", "handover"], choices=ARMS)
    parser.add_argument("--noise", nargs="+", type=float, default=[0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--until", type=int, help="stop at this step of the schedule, for arms of the second rank")
    parser.add_argument("--eval-every", type=int, default=25)
    args = parser.parse_args()
    at = bench(args.parquet)
    for seed in args.seeds:
        for noise in args.noise:
            for arm in args.arms:
                run(arm, seed, noise, at, args.runs, steps=args.steps, eval_every=args.eval_every, until=args.until)


if __name__ == "__main__":
    main()
