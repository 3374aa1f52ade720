"""Read the selected subset of the original shards, without a second copy of them on disk.

    python examples/selection_view.py OUT SHARDS...

`SelectionView` is a map-style dataset in selection order; the shards may lie elsewhere than when they were scored, and
a shard whose bytes have changed since is refused. Prints the first samples and how much was left unread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch.utils.data import DataLoader

import curate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output directory of `curate score`")
    parser.add_argument("shards", nargs="+", help="the shards that were scored")
    args = parser.parse_args()

    view = curate.SelectionView(args.shards, args.out, decode=True)
    for sample in (view[index] for index in range(min(3, len(view)))):
        print(f"{sample['key']}: {sample['image'].size[0]} x {sample['image'].size[1]}, {sample['caption']!r}")

    loader = DataLoader(view, batch_size=8, collate_fn=list)
    pixels = sum(sample["image"].size[0] * sample["image"].size[1] for batch in loader for sample in batch)
    print(f"{len(view)} selected samples of the original shards, {pixels:,} pixels")


if __name__ == "__main__":
    main()
