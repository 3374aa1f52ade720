"""Read a written output with the tools that its users have; `curate verify` asks that they load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SAMPLES = 256
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif")


def read_with_webdataset(output: Path, names: list[str]) -> tuple[int, str]:
    """Decode up to `SAMPLES` samples of the shards `names`; their number and the reader's version."""
    import webdataset

    urls = [str(output / name) for name in names]
    # only: webdataset's default decoders unpickle what is called .pkl
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgb", only=[*_IMAGES, "txt"])
    samples = 0
    for sample in data.to_tuple(";".join(_IMAGES), "txt;json"):
        samples += len(sample) == 2
        if samples == SAMPLES:
            break
    return samples, f"webdataset {webdataset.__version__}"


def read_with_open_clip(output: Path, names: list[str]) -> tuple[int, str]:
    """Run open_clip's own training data pipeline over the shards `names`; its samples and version.

    Its worker processes are left out, as they would only repeat the same code.
    """
    import open_clip
    from open_clip_train import data, params

    from curate.formats.openclip import end_of_shard_fix, shard_pattern, webdataset_note

    pattern = os.path.join(str(output), shard_pattern(names))
    arguments = ["--train-data", pattern, "--train-num-samples", str(SAMPLES), "--dataset-type", "webdataset"]
    args = params.parse_args([*arguments, "--workers", "1", "--batch-size", "1", "--model", "ViT-B-32"])
    args.distributed, args.world_size, args.rank, args.workers = False, 1, 0, 0
    with end_of_shard_fix():
        info = data.get_wds_dataset(args, _as_tensor, is_train=True, tokenizer=lambda text: [text])
        samples = sum(1 for _ in zip(info.dataloader, range(SAMPLES), strict=False))
    note = webdataset_note()
    return samples, f"open_clip {open_clip.__version__}" + (f"; {note}" if note else "")


def _as_tensor(image: Any) -> Any:
    import torch

    return torch.tensor(image.convert("RGB").size)
