"""What a run writes, loaded by the tools that users have: each test counts samples and looks for mixed pairs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from curate.formats import datacomp, openclip

# Prints one json line per sample of OUT, read by whichever webdataset the path puts first.
READ_WEBDATASET = """
import json, sys, webdataset as wds
print(wds.__version__, file=sys.stderr)
data = wds.WebDataset(sys.argv[1], shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "txt", "json")
for key, image, text, fields in data:
    print(json.dumps([key, image.reshape(-1, 3).mean(0).tolist(), text, fields["caption"]]))
"""
READ_WIDS = """
import json, os, sys, wids
data = wids.ShardListDataset(sys.argv[1], cache_dir=os.path.dirname(sys.argv[1]), keep=True, transformations="PIL")
for at in reversed(range(len(data))):
    row = data[at]
    colour = list(row[".jpg"].convert("RGB").resize((1, 1)).getpixel((0, 0)))
    print(json.dumps([row["__key__"], colour, row[".txt"], row[".json"]["caption"]]))
"""


def run_reader(code: str, argument: str, extra_path: str = "") -> list[Any]:
    env = {**os.environ, "PYTHONPATH": extra_path}
    done = subprocess.run(
        [sys.executable, "-c", code, argument], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def webdataset_path(generation: str) -> str:
    """What to put on the path for webdataset "0.2" or "1"; nothing for the installed one."""
    if metadata.version("webdataset").startswith(f"{generation}."):
        return ""
    folder = os.environ.get("CURATE_OTHER_WEBDATASET") or str(Path(sys.prefix) / "webdataset-1")
    if not list(Path(folder).glob(f"webdataset-{generation}.*.dist-info")):
        pytest.skip(f"webdataset {generation} is neither installed nor in {folder} (CURATE_OTHER_WEBDATASET)")
    return folder


@pytest.fixture
def webdataset_02() -> str:
    """Where webdataset 0.2 is, the generation that open_clip's trainer works with."""
    return webdataset_path("0.2")


def check_rows(rows: list[Any], output: Any, names_its_colour: Any) -> None:
    assert [text for _, _, text, _ in rows] == output.captions
    assert [key for key, _, _, _ in rows] == [
        f"{shard:05d}{index:04d}" for shard in range(len(output.shards)) for index in range(12)
    ]
    for _, colour, text, caption in rows:
        assert text == caption
        assert names_its_colour([[colour]], text)


@pytest.mark.parametrize("generation", ["0.2", "1"])
def test_webdataset_reads_all(output: Any, names_its_colour: Any, generation: str) -> None:
    """Both generations of webdataset read every sample in order, no pair mixed."""
    check_rows(run_reader(READ_WEBDATASET, output.pattern, webdataset_path(generation)), output, names_its_colour)


def test_wids_reads_by_index(output: Any, names_its_colour: Any, webdataset_02: str) -> None:
    """wids reaches every sample by its number through shardindex.json."""
    rows = run_reader(READ_WIDS, str(output.out / "shardindex.json"), webdataset_02)
    check_rows(rows[::-1], output, names_its_colour)


def open_clip_batches(command: str, monkeypatch: pytest.MonkeyPatch, cwd: Path) -> tuple[Any, list[Any]]:
    """One epoch of open_clip's own training loader under the arguments of `command`; texts stay code points."""
    params = pytest.importorskip("open_clip_train.params")
    data = pytest.importorskip("open_clip_train.data")
    monkeypatch.chdir(cwd)
    args = params.parse_args(shlex.split(command)[3:])
    args.distributed, args.world_size, args.workers = False, 1, 2
    with openclip.end_of_shard_fix():
        info = data.get_data(args, (to_tensor, to_tensor), tokenizer=code_points)
        return info["train"].dataloader, list(info["train"].dataloader)


def to_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())


def code_points(text: str) -> torch.Tensor:
    return torch.tensor([[*map(ord, text)] + [0] * (64 - len(text))])


def text_of(codes: torch.Tensor) -> str:
    return "".join(map(chr, codes[codes > 0].tolist()))


def test_open_clip_pipeline_trains_on_the_printed_command(
    output: Any, names_its_colour: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """open_clip's loader, given the command that a run prints, yields every sample once per epoch, no pair mixed."""
    command = openclip.train_command(output.out, output.shards, len(output.selected), "ViT-S-32-alt")
    loader, batches = open_clip_batches(command, monkeypatch, tmp_path)
    pairs = [(image, text_of(text)) for images, texts in batches for image, text in zip(images, texts, strict=True)]
    assert loader.num_samples == len(output.selected)
    assert sorted(text for _, text in pairs) == sorted(output.captions)
    assert all(names_its_colour(image, text) for image, text in pairs)


@pytest.mark.slow
def test_open_clip_trainer_runs_the_printed_command(make_output: Any, webdataset_02: str, tmp_path: Path) -> None:
    """The very command that a run prints trains open_clip for an epoch under the webdataset that open_clip pins."""
    small = make_output(tmp_path, samples=16, kept=8, sub_batch=4, per_shard=4)
    words = shlex.split(openclip.train_command(small.out, small.shards, len(small.selected), "ViT-S-32-alt"))
    extra = [
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--epochs",
        "1",
        "--warmup",
        "1",
        "--logs",
        str(tmp_path / "logs"),
    ]
    env = {**os.environ, "PYTHONPATH": webdataset_02, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words[1:], *extra],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[8/8 (100%)]" in done.stderr


def test_open_clip_finds_sizes_json(output: Any) -> None:
    """Without --train-num-samples open_clip takes the count from sizes.json."""
    data = pytest.importorskip("open_clip_train.data")
    assert data.get_dataset_size(output.pattern) == (len(output.selected), len(output.shards))


@pytest.mark.parametrize("streaming", [True, False])
def test_hf_datasets_reads_all(
    output: Any, names_its_colour: Any, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face datasets loads the shards by its webdataset builder, streaming and materialised."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    files = [str(output.out / shard) for shard in output.shards]
    rows = datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    seen = [(row["jpg"], row["txt"], row["json"]["caption"]) for row in rows]
    assert [text for _, text, _ in seen] == output.captions
    assert all(text == caption and names_its_colour(image, text) for image, text, caption in seen)


def test_dali_index_points_at_the_payloads(output: Any) -> None:
    """Each field of the DALI index names the bytes of its member."""
    shard = output.shards[0]
    lines = (output.out / shard).with_suffix(".idx").read_text().splitlines()
    data = (output.out / shard).read_bytes()
    assert lines[0] == "v1.2 12"
    for line, row in zip(lines[1:], output.selected, strict=False):
        fields = line.split(" ")
        parts = {
            fields[at]: data[int(fields[at + 1]) : int(fields[at + 1]) + int(fields[at + 2])]
            for at in range(0, len(fields), 4)
        }
        assert parts["jpg"] == row.sample.image
        assert parts["txt"] == row.sample.caption.encode()


def test_datacomp_subset_names_the_selected(output: Any) -> None:
    """The subset file holds the uids of the selection, sorted, and reads back as DataComp reads it."""
    uid_n = np.load(output.out / "sample_ids.npy", mmap_mode="r")
    assert uid_n.dtype == np.dtype("u8,u8")
    assert datacomp.uid_strings(uid_n) == sorted(row.sample.uid for row in output.selected)


def test_resharder_finds_successes(output: Any) -> None:
    """DataComp's resharder reads the size of a shard from `successes`."""
    stats = [json.loads((output.out / f"{Path(shard).stem}_stats.json").read_text()) for shard in output.shards]
    assert sum(each["successes"] for each in stats) == len(output.selected)
