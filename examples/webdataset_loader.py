"""Read the shards of a run with webdataset, 0.2.x or 1.x, as any other shards.

    python examples/webdataset_loader.py OUT

Prints one line per batch and the number of samples. Shuffling by sample undoes the composition of the sub-batches; to
train on exactly those, see torch_loop.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import webdataset as wds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output directory of `curate score`")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()

    shards = sorted(map(str, args.out.glob("[0-9]*.tar")))
    data = (
        wds.WebDataset(shards, shardshuffle=False)
        .decode("pil")
        .to_tuple("__key__", "jpg;jpeg;png;webp", "txt")
        .batched(args.batch)
    )
    samples = 0
    for keys, images, captions in data:
        samples += len(keys)
        print(f"{keys[0]} .. {keys[-1]}: {len(images)} images, first caption {captions[0]!r}")
    print(f"{samples} samples in {len(shards)} shards")


if __name__ == "__main__":
    main()
