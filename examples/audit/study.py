"""Who is left out of real pools, and what a policy changes: emoji in twelve languages, of people, textbook figures.

    python examples/audit/study.py DATA RUNS multilingual --seeds 0 1 2
    python examples/audit/study.py DATA RUNS copies --seeds 0 1 2
    python examples/audit/study.py DATA RUNS people --seeds 0 1 2
    python examples/audit/study.py DATA RUNS openstax --seeds 0 1 2
    python examples/audit/study.py DATA RUNS training --seeds 0

Each part trains its small reference, scores its pool, keeps 20 %, audits what was kept, draws again under the policies
beside this file and audits that. All through curate's own verbs; what is there is left as it is, so a second call only
reads. Minutes a seed on one slow core. What the tables and figures are made of goes to results.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pools
import torch
from found import Results, agreement, audited, certified
from tables import FLOORS

import curate
from curate.learner.report.history import read_history

POLICIES: Final = Path(__file__).parent / "policies"
KEEP: Final = 0.2
ONE: Final[dict[str, Any]] = {"workers": 1, "engine": "inline"}


@dataclass(frozen=True, slots=True)
class Bench:
    """Where things are, and how long models are trained: `steps` for a reference, a fifth of it for a learner."""

    data: Path
    runs: Path
    seed: int
    steps: int
    results: Results

    def pool(self, name: str) -> Path:
        """A folder of shards with its labels."""
        return self.runs / "pools" / name

    def run(self, name: str) -> Path:
        """The place of a run of this seed."""
        return self.runs / f"{name}-{self.seed}"


def reference(at: Bench, held: str) -> str:
    """A curate-tiny fitted on held-out emoji or figures; its recall on a shard of a pool is among the results."""
    path, tested = at.run(f"reference-{held}"), "openstax" if held == "openstax" else "english"
    batch = min(64, 8 * at.steps)
    run = curate.train(
        [at.pool(f"held-{held}")], path, model="curate-tiny", steps=at.steps, batch=batch, seed=at.seed,
        eval_shards=[str(at.pool(tested) / "00000.tar")],
    )  # fmt: skip
    found = read_history(path).evals[-1]["retrieval"]
    recall = {way: found[way] for way in ("image_to_text", "text_to_image")}
    at.results.add("references", f"{held}/{at.seed}", recall | {"pairs": found["pairs"], "of": found["pool"]})
    return str(run.path)


def scored(at: Bench, pool: str, held: str, **options: Any) -> Path:
    """The pool scored by a reference, a fifth of it selected and written."""
    path = at.run(f"{pool.rpartition('-')[0] or pool}-by-{held}")
    curate.score([at.pool(pool)], path, reference=reference(at, held), keep=KEEP, seed=at.seed, **options, **ONE)
    return path


def look(at: Bench, output: Path, pool: str | None, key: str, *, policy: str | None = None, **options: Any) -> None:
    """Audit `output` with the labels of `pool` and remember what was found under `key`."""
    if at.results.has("audits", f"{key}/{at.seed}"):
        return
    found = curate.audit(
        output, labels=None if pool is None else at.pool(pool) / "labels.csv", seed=at.seed, clusters=0,
        policy=None if policy is None else POLICIES / policy, **options, **ONE,
    )  # fmt: skip
    at.results.add("audits", f"{key}/{at.seed}", audited(found))
    print(f"{key}/{at.seed}: {found.audit.flags} flags", flush=True)
    for line in found.findings:
        print(f"  {line}", flush=True)


def drawn(at: Bench, output: Path, pool: str, key: str, policy: Path) -> Path:
    """Draw again from the same scores under a policy; its certificate is among the results."""
    target = at.run(key.replace("/", "-"))
    if not at.results.has("certificates", f"{key}/{at.seed}"):
        labels = at.pool(pool) / "labels.csv"
        found = curate.select(output, to=target, policy=policy, labels=labels, **ONE)
        at.results.add("certificates", f"{key}/{at.seed}", certified(found.certificate))
    return target


def floored(at: Bench, name: str, floor: str) -> Path:
    """A policy of ours with another floor."""
    path = at.runs / "policies" / f"{name}-{floor}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((POLICIES / f"{name}.yaml").read_text().replace("min_ratio: 0.8", f"min_ratio: {floor}"))
    return path


def multilingual(at: Bench) -> None:
    """Captions of twelve locales, a reference of English: by learnability and by easy-reference, then with floors."""
    pool = f"multilingual-{at.seed}"
    learnable = _scored(at, pool)
    easy = at.run("multilingual-easy")
    if not at.results.has("audits", f"multilingual/easy-reference/{at.seed}"):
        curate.select(learnable, to=easy, criterion="easy-reference", **ONE)
    columns = ("english", "locale", "caption script", "style", "tone", "near-duplicates")
    for criterion, output in (("learnability", learnable), ("easy-reference", easy)):
        key = f"multilingual/{criterion}"
        look(at, output, pool, key, policy="locales.yaml", columns=columns)
        for floor in FLOORS:
            held = drawn(at, output, pool, f"{key}/floor-{floor}", floored(at, "locales", floor))
            if floor == "0.8":
                look(at, held, pool, f"{key}/floor-{floor}", policy="locales.yaml", columns=columns)


def _scored(at: Bench, pool: str) -> Path:
    """The multilingual pool, scored by learnability with a learner that has hardly begun."""
    learner = curate.train([at.pool(pool)], at.run("learner"), model="curate-tiny", seed=100 + at.seed,
                           steps=max(1, at.steps // 5), batch=min(64, 8 * at.steps)).path  # fmt: skip
    return scored(at, pool, "english", learner=str(learner))


def copies(at: Bench) -> None:
    """The multilingual pool without near-duplicates: who is taken for a copy of whom?"""
    pool, target = f"multilingual-{at.seed}", at.run("copies")
    output, key = _scored(at, pool), "copies/near"
    if not at.results.has("audits", f"{key}/{at.seed}"):
        curate.select(output, to=target, criterion="easy-reference", deduplicate="near", **ONE)
    look(at, target, pool, key, columns=("tone", "near-duplicates", "style", "english"))


def people(at: Bench) -> None:
    """English captions; references that saw every style, and only styles without skin tones."""
    options: dict[str, Any] = {"columns": ("tone", "gender", "style", "subject", "default")}
    for held in ("english", "toneless"):
        output = scored(at, "english", held)
        look(at, output, "english", f"people/{held}", policy="tones.yaml", intersect=("tone,gender",), **options)
        look(at, output, None, f"people/{held}/mentions", columns=("gender", "age", "identity"))
        at.results.add("agreement", held, agreement(output, at.pool("english") / "labels.csv"))
        target = drawn(at, output, "english", f"people/{held}/floor-0.8", POLICIES / "tones.yaml")
    look(at, target, "english", "people/toneless/floor-0.8", policy="tones.yaml", **options)


def openstax(at: Bench) -> None:
    """Textbook figures by subject and by kind; captions of very different lengths."""
    output = scored(at, "openstax", "openstax")
    columns = ("book", "kind", "image size", "image shape")
    look(at, output, "openstax", "openstax", policy="books.yaml", columns=columns, intersect=("book,kind",))
    target = drawn(at, output, "openstax", "openstax/floor-0.8", POLICIES / "books.yaml")
    look(at, target, "openstax", "openstax/floor-0.8", policy="books.yaml", columns=columns)


def training(at: Bench) -> None:
    """A learner trained jointly on the multilingual pool, with and without the floor for languages."""
    pool = f"multilingual-{at.seed}"
    model = reference(at, "english")
    cache = _scored(at, pool)
    for key, policy in (("training/plain", None), ("training/floor-0.8", POLICIES / "locales.yaml")):
        run = at.run(key.replace("/", "-"))
        given = {} if policy is None else {"policy": policy, "labels": at.pool(pool) / "labels.csv"}
        curate.train(
            [at.pool(pool)], run, model="curate-tiny", reference=model, reference_cache=cache, handover="off",
            criterion="learnability", batch=min(64, 8 * at.steps), steps=max(2, at.steps // 5), seed=at.seed,
            **given, **ONE,
        )  # fmt: skip
        if policy is not None:
            found = json.loads((run / "certificate.json").read_text())
            at.results.add("certificates", f"{key}/{at.seed}", certified(found))
        look(at, run, pool, key, policy="locales.yaml", columns=("english", "locale", "style"))


PARTS: Final[dict[str, Callable[[Bench], None]]] = {
    "multilingual": multilingual, "copies": copies, "people": people, "openstax": openstax, "training": training,
}  # fmt: skip


def machine() -> dict[str, str]:
    """Versions that the figures depend on; the hardware is described by hand in the README."""
    return {"curate": curate.__version__, "torch": torch.__version__, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300, help="of a reference")
    parser.add_argument("--samples", type=int, help="of each pool, for a trial; all of them unless given")
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.results)
    results.add("made with", "versions", machine())
    for seed in args.seeds:
        pools.build(args.data, args.runs / "pools", seed, args.samples)
        for part in args.parts:
            PARTS[part](Bench(args.data, args.runs, seed, args.steps, results))


if __name__ == "__main__":
    main()
