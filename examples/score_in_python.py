"""The main job from Python: fit a small reference, score, select, write, verify, and ask why.

    python examples/score_in_python.py CLEAN_SHARD POOL_SHARDS...

Each call is the twin of a verb of the command line. Takes a minute on a few hundred samples; the result is in
./filtered.
"""

from __future__ import annotations

import argparse

import curate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clean", help="shard that the reference is fitted to")
    parser.add_argument("pool", nargs="+", help="shards to filter")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    reference = curate.train([args.clean], "reference", model="curate-tiny", steps=args.steps, batch=32)
    result = curate.score(args.pool, "filtered", reference=str(reference.path), keep=0.25)
    print(f"{result.counts['kept']} of {result.counts['in']} samples kept, in {len(result.shards)} shards")
    print("verified" if curate.verify(result.output).ok else "NOT verified")
    for sentence in curate.explain(result.output, "000000000")[0].sentences:
        print(sentence)


if __name__ == "__main__":
    main()
