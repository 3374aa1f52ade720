"""Score shards end to end, against open_clip's own fp32 data pipeline plus forward; both sides run in turn.

    python -m tests.bench.bench_scoring SHARDS... --model ViT-S-32-alt [--rounds 3]

open_clip's side is its evaluation pipeline (webdataset, Pillow, its tokenizer) with the fastest of 0, 1 and 2 loader
workers (each tried twice over all the shards), and `encode_image` / `encode_text` in float32 under inference mode; ours
is `curate.score(..., scores_only=True)` as a user calls it, engine start, digests, quality signals and synced parquet
included. Model loading is outside on both sides. It refuses to print a ratio unless the similarities agree.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

import curate
from curate.formats.openclip import end_of_shard_fix
from curate.machine import cores
from curate.models.load import load_model
from curate.receipts import Store
from curate.scores import read_table
from curate.shards.sources import expand_shards
from tests.bench.machine import conditions

# Mean over samples: decoding at reduced scale moves a cosine by less, another pairing by ten times more.
AGREEMENT = 0.005


def open_clip_side(module: Any, tokenizer: Any, transform: Any, shards: list[str], workers: int) -> tuple[float, Any]:
    """(seconds, similarities in shard order) of open_clip's pipeline and model."""
    from open_clip_train import data, params

    arguments = ["--val-data", "::".join(shards), "--val-num-samples", "1", "--dataset-type", "webdataset"]
    args = params.parse_args([*arguments, "--batch-size", "64", "--model", "ViT-B-32"])
    args.distributed, args.world_size, args.rank, args.workers = False, 1, 0, workers
    started, found = time.perf_counter(), []
    with end_of_shard_fix(), torch.inference_mode():
        info = data.get_wds_dataset(args, transform, is_train=False, tokenizer=tokenizer)
        for images, texts in info.dataloader:
            pair = module.encode_image(images), module.encode_text(texts)
            image_BD, text_BD = (torch.nn.functional.normalize(features, dim=-1) for features in pair)
            found.append((image_BD * text_BD).sum(1))
    return time.perf_counter() - started, np.sort(torch.cat(found).numpy())


def curate_side(model: str, shards: list[str], directory: Path) -> tuple[float, Any]:
    """(seconds, similarities) of `curate.score` with scores only."""
    started = time.perf_counter()
    curate.score(shards, directory, reference=model, scores_only=True, tolerance=1)
    seconds = time.perf_counter() - started
    store = Store.of(directory)
    paths = [store.locate(receipt.outputs[0]) for receipt in store.receipts("score")]
    columns = [read_table(path, ["reference_similarity"]).column(0).drop_null() for path in paths if path]
    return seconds, np.sort(np.concatenate([column.to_numpy() for column in columns]))


def model_only(model: str, tokens: int, seconds: float = 4.0) -> float:
    """Samples per second of the model alone, fed from memory by one thread per core."""
    encoder = load_model(model)
    image_BCHW = torch.randint(0, 256, (64, 3, encoder.rule.height, encoder.rule.width), dtype=torch.uint8)
    token_BT = encoder.tokenize([" ".join(["word"] * max(1, tokens - 2))] * 64)

    def work(_: int) -> int:
        stop, done = time.perf_counter() + seconds, 0
        while time.perf_counter() < stop:
            encoder.embed_images(image_BCHW)
            encoder.embed_texts(token_BT)
            done += 64
        return done

    count = cores().usable
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started = time.perf_counter()
        return sum(pool.map(work, range(count))) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(conditions())
    shards = [source.url for source in expand_shards(arguments.shards)]
    print(f"{len(shards)} shards: {', '.join(Path(shard).parent.parent.name for shard in shards)}")
    for model in arguments.model:
        compare(model, shards, arguments.rounds)


def compare(model: str, shards: list[str], rounds: int) -> None:
    """Print both rates, their ratio and our share of the model-only rate."""
    encoder = load_model(model)
    exact = load_model(model, precision="fp32")
    module = copy.deepcopy(exact.module).to(memory_format=torch.contiguous_format)  # as open_clip makes it
    transform = image_transform_v2(PreprocessCfg(**module.visual.preprocess_cfg), is_train=False)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        trials = [
            min(open_clip_side(module, exact.tokenizer, transform, shards, workers)[0] for _ in range(2))
            for workers in (0, 1, 2)
        ]
        workers = trials.index(min(trials))
        for number in range(rounds):
            seconds, expected = open_clip_side(module, exact.tokenizer, transform, shards, workers)
            theirs.append(seconds)
            seconds, found = curate_side(model, shards, Path(folder) / str(number))
            ours.append(seconds)
    if len(found) != len(expected):
        raise SystemExit(f"{model}: {len(found)} samples here, {len(expected)} there; no ratio is reported")
    error_N = np.abs(found - expected)
    if error_N.mean() > AGREEMENT:
        raise SystemExit(f"{model}: similarities differ by {error_N.mean():.4f} on average; no ratio is reported")
    samples = len(found)
    ratio = statistics.median(their / our for their, our in zip(theirs, ours, strict=True))
    tokens = 20
    alone = model_only(model, tokens)
    rate = samples / statistics.median(ours)
    theirs_rate = samples / statistics.median(theirs)
    print(f"{model}: {samples} samples, {encoder.identity.precision}")
    print(f"  open_clip fp32, {workers} workers  {theirs_rate:.0f}/s")
    print(f"  curate                   {rate:.0f}/s, ratio {ratio:.2f} (median of {rounds}, in turn)")
    print(f"  model alone              {alone:.0f}/s at {tokens} tokens: curate reaches {rate / alone:.0%} of it")
    print(f"  similarities differ by   {error_N.mean():.4f} on average, {error_N.max():.4f} at most")


if __name__ == "__main__":
    main()
