"""Rates of the reading floor on this machine: `python -m tests.bench.bench_reading [SHARD.tar]` in the checkout."""

from __future__ import annotations

import io
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from curate.images.decode import decode_rgb, read_header
from curate.images.signals import signals
from curate.inspection import inspect_shards
from curate.shards.captions import read_caption
from curate.shards.samples import group_samples
from curate.shards.sources import expand_shards, open_shard, shard_digest
from curate.shards.tarindex import index_tar
from curate.shards.tarwriter import tar_member
from tests.making import Sample, make_image, make_pixels, make_tar


def seconds(call: Callable[[], object], repeats: int = 9) -> float:
    """The best of several calls: the least disturbed one on a shared machine."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def line(what: str, rate: float, unit: str) -> None:
    print(f"{what:<44} {rate:>12,.0f} {unit}")


def bench_tar(path: Path) -> None:
    source = expand_shards([path])[0]
    with open_shard(source) as view:
        index = index_tar(view)
        entries = group_samples(index, "00" * 32)
        taken = seconds(lambda: index_tar(view))
        line("index, page cache", len(index.members) / taken, "members/s")
        line("index, page cache", source.size / taken / 1e6, "MB/s of shard")
        line("group", len(entries) / seconds(lambda: group_samples(index, "00" * 32)), "samples/s")
        line("captions", len(entries) / seconds(lambda: [read_caption(view, one) for one in entries]), "captions/s")
        line("sha256", source.size / seconds(lambda: shard_digest(view), 3) / 1e6, "MB/s")
    line("inspect (headers only)", len(entries) / seconds(lambda: inspect_shards([path]), 5), "samples/s")


def bench_decode(side: int, min_side: int) -> None:
    data = [make_image("jpeg", side, side, seed=seed, quality=90) for seed in range(24)]

    def pillow(reduced: bool) -> None:
        for one in data:
            image = Image.open(io.BytesIO(one))
            if reduced:
                image.draft("RGB", (min_side, min_side))
            np.asarray(image.convert("RGB"))

    def per_second(call: Callable[[], object]) -> float:
        return len(data) / seconds(call)

    line(f"header, JPEG {side}", per_second(lambda: [read_header(one) for one in data]), "img/s")
    line(f"decode_rgb, JPEG {side}", per_second(lambda: [decode_rgb(one) for one in data]), "img/s")
    reduced = f"JPEG {side}, min_side {min_side}"
    line(f"decode_rgb, {reduced}", per_second(lambda: [decode_rgb(one, min_side=min_side) for one in data]), "img/s")
    line(f"Pillow, JPEG {side}", per_second(lambda: pillow(False)), "img/s")
    line(f"Pillow draft, {reduced}", per_second(lambda: pillow(True)), "img/s")


def main() -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in ("simplejpeg", "pillow", "numpy")))
    with TemporaryDirectory() as folder:
        image = make_image("jpeg", 256, 256, quality=90)
        samples: list[Sample] = [
            (f"{n:09d}", {"jpg": image, "txt": b"a picture of something", "json": b"{}"}) for n in range(2000)
        ]
        bench_tar(Path(sys.argv[1]) if len(sys.argv) > 1 else make_tar(Path(folder) / "00000.tar", samples))
    payload = bytes(8192)
    line(
        "tar_member",
        1000 / seconds(lambda: [list(tar_member("000000000.jpg", payload)) for _ in range(1000)]),
        "members/s",
    )
    bench_decode(256, 128)
    bench_decode(640, 224)
    pixels = make_pixels(256, 256)
    line("signals, 256 px", 100 / seconds(lambda: [signals(pixels) for _ in range(100)]), "img/s")


if __name__ == "__main__":
    main()
