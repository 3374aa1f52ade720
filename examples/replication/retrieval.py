"""The same question on textbook figures and emoji: does joint selection reach a recall sooner than uniform draws?

    python retrieval.py DATA RUNS --seeds 0 1 2 --noise 0 0.5 --arms uniform jest handover

DATA holds openstax, emoji-noto, emoji-openmoji and emoji-blob as WebDataset shards. The reference (curate-tiny, 150
steps) is fitted on the first openstax shard and on emoji-blob; the pool is the rest of openstax/train, emoji-noto and
emoji-openmoji, of which a share `noise` gets the caption of another, random pair of its shard. Recall at 1 among 100 on
openstax/val and emoji-noto/val. All through `curate.train`, 1 to 3 minutes a run on one core; prints a table from logs.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import curate
from curate.learner.report.history import read_history, score_of

ARMS: Final[dict[str, dict[str, Any]]] = {
    "uniform": {"criterion": "uniform"},
    "jest": {"criterion": "learnability", "handover": "off"},
    "handover": {"criterion": "learnability", "handover": "auto"},
}
STEPS: Final = 200


def noisy(source: Path, target: Path, noise: float) -> None:
    """Copy a shard; a share of its captions change places. Its json says "clean": true or false."""
    dice = random.Random(source.name)
    with tarfile.open(source) as tar:
        members = [(one.name, tar.extractfile(one).read()) for one in tar if one.isfile()]  # type: ignore[union-attr]
    keys = sorted({name.rpartition(".")[0] for name, _ in members})
    wrong = dice.sample(keys, round(noise * len(keys)))
    captions = {name.rpartition(".")[0]: data for name, data in members if name.endswith(".txt")}
    moved = dict(zip(wrong, [captions[key] for key in wrong[1:] + wrong[:1]], strict=True))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            key, _, extension = name.rpartition(".")
            if extension == "txt":
                data = moved.get(key, data)
            elif extension == "json":
                data = json.dumps({**json.loads(data), "clean": key not in moved}).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def prepared(data: Path, runs: Path, noise: float) -> tuple[list[Path], list[Path]]:
    """The reference's clean shards, and the pool's with their false captions."""
    first, *rest = sorted((data / "openstax/train").glob("*.tar"))
    emoji = [
        path for name in ("emoji-noto", "emoji-openmoji") for path in sorted((data / name / "train").glob("*.tar"))
    ]
    pool = []
    for path in (*rest, *emoji):
        target = runs / f"pool-{noise:g}" / f"{path.parts[-3]}-{path.name}"
        if not target.exists():
            noisy(path, target, noise)
        pool.append(target)
    return [first, *sorted((data / "emoji-blob/train").glob("*.tar"))], pool


def run(arm: str, seed: int, noise: float, data: Path, runs: Path, steps: int, fitted: int) -> Path:
    """One run; what is there is left as it is, or taken up again."""
    clean, pool = prepared(data, runs, noise)
    reference = curate.train(clean, runs / "reference", steps=fitted, batch=64).path
    output = runs / f"{arm}-{noise:g}-{seed}"
    curate.train(
        pool, output, **ARMS[arm], reference=str(reference), batch=64, steps=steps, lr=1e-3, seed=seed, label="clean",
        trusted=[data / "openstax/test", data / "emoji-noto/test"],
        eval_shards=[data / "openstax/val", data / "emoji-noto/val"], eval_every=max(1, steps // 10),
        watch_every=max(1, steps // 10),
    )  # fmt: skip
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--reference-steps", type=int, default=150)
    args = parser.parse_args()
    for noise in args.noise:
        for arm in args.arms:
            common = (noise, args.data, args.runs, args.steps, args.reference_steps)
            histories = [read_history(run(arm, seed, *common)) for seed in args.seeds]
            evals = zip(*(history.evals for history in histories), strict=True)
            levels = [f"{100 * fmean(score_of(one, 'recall') or 0.0 for one in at):.1f}" for at in evals]
            flops = fmean(history.evals[-1]["flops"] for history in histories)
            print(f"| {noise:g} | {arm} | {len(args.seeds)} | {' | '.join(levels)} | {flops:.3g} |", flush=True)


if __name__ == "__main__":
    main()
