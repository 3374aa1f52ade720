"""SubBatches and SelectionView over a finished run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

import curate
from curate.errors import ShardError, UsageError, VerificationError
from curate.loaders.subbatches import SubBatches
from curate.loaders.view import SelectionView


def to_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())


def members(batches: Any) -> list[tuple[int, list[str]]]:
    return [(batch.sub_batch, list(batch.captions)) for batch in batches]


def expected(output: Any, size: int = 6) -> list[tuple[int, list[str]]]:
    return [(at // size, output.captions[at : at + size]) for at in range(0, len(output.captions), size)]


def as_is(batch: Any) -> Any:
    return batch


@pytest.fixture
def copied(output: Any, tmp_path: Path) -> Path:
    """A copy of the run's output that a test may damage."""
    return Path(shutil.copytree(output.out, tmp_path / "out"))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_sub_batches_come_as_selected(output: Any, names_its_colour: Callable[..., bool], workers: int) -> None:
    """Every sub-batch arrives once, whole, in selection order, with any number of workers, across shard borders."""
    batches = list(DataLoader(SubBatches(output.out, transform=to_tensor), batch_size=None, num_workers=workers))
    assert members(batches) == expected(output)
    assert [key for batch in batches for key in batch.keys][:2] == ["000000000", "000000001"]
    assert [score for batch in batches for score in batch.scores.tolist()] == pytest.approx(
        [row.score for row in output.selected]
    )
    for batch in batches:
        assert batch.images.shape == (6, 32, 40, 3)
        assert all(names_its_colour(image, text) for image, text in zip(batch.images, batch.captions, strict=True))


@pytest.mark.parametrize(("world_size", "workers"), [(3, 0), (3, 2)])
def test_ranks_share_the_sub_batches(output: Any, world_size: int, workers: int) -> None:
    """Ranks get disjoint sub-batches that together are all of them; `even` gives each rank the same number."""
    ranks = [SubBatches(output.out, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [members(DataLoader(rank, batch_size=None, num_workers=workers, collate_fn=as_is)) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(each) for each in seen] == [3, 3, 2]
    assert sorted(batch for each in seen for batch in each) == expected(output)
    even = [SubBatches(output.out, rank=rank, world_size=world_size, even=True) for rank in range(world_size)]
    assert [len(rank) for rank in even] == [2, 2, 2]


def test_ranks_share_the_samples_of_each_sub_batch(output: Any) -> None:
    """With share="samples" the ranks' rows of a sub-batch make up exactly that sub-batch."""
    ranks = [list(SubBatches(output.out, rank=rank, world_size=2, share="samples")) for rank in (0, 1)]
    for left, right, (number, captions) in zip(*ranks, expected(output), strict=True):
        assert left.sub_batch == right.sub_batch == number
        assert [text for pair in zip(left.captions, right.captions, strict=True) for text in pair] == captions


def test_encoded_images_are_the_original_bytes(output: Any) -> None:
    """decode=False yields the bytes of the input shard."""
    images = [image for batch in SubBatches(output.out, decode=False) for image in batch.images]
    assert images == [row.sample.image for row in output.selected]


def test_tokenizer_gets_the_captions_of_a_sub_batch(output: Any) -> None:
    """Captions become whatever the tokenizer makes of the list."""
    batch = next(iter(SubBatches(output.out, tokenizer=lambda texts: torch.tensor([[len(text)] for text in texts]))))
    assert batch.captions.tolist() == [[len(text)] for text in output.captions[:6]]


def test_unfinished_run_is_refused(copied: Path) -> None:
    """Without SUCCESS.json the loaders refuse and say how to go on; allow_unfinished reads what is complete."""
    (copied / "_curate" / "SUCCESS.json").unlink()
    with pytest.raises(UsageError, match=r"has not finished.*same command again"):
        SubBatches(copied)
    with pytest.raises(UsageError, match="has not finished"):
        SelectionView(copied, copied)
    (copied / "00003.parquet").unlink()
    assert len(SubBatches(copied, allow_unfinished=True)) == 6


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """A folder that no run wrote is refused by name."""
    with pytest.raises(UsageError, match="not an output of curate"):
        SubBatches(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [{"rank": 2, "world_size": 2}, {"decode": False, "transform": to_tensor}, {"share": "rows"}],
)
def test_impossible_arguments_are_refused(output: Any, arguments: dict[str, Any]) -> None:
    """Arguments that cannot be met are UsageErrors."""
    with pytest.raises(UsageError):
        SubBatches(output.out, **arguments)


def test_changed_order_is_noticed(copied: Path) -> None:
    """A sidecar whose ranks no longer count up is refused, naming shard and sub-batch."""
    table = pq.read_table(copied / "00001.parquet")
    pq.write_table(table.take(pa.array([1, 0, *range(2, 12)])), copied / "00001.parquet")
    with pytest.raises(VerificationError, match=r"00001\.parquet.*not in the order drawn"):
        SubBatches(copied)


def test_sample_missing_from_the_tar_is_noticed(copied: Path) -> None:
    """A sidecar row without its tar member is an error that names shard and sample."""
    shutil.copy(copied / "00001.tar", copied / "00000.tar")
    with pytest.raises(VerificationError, match=r"00000\.tar, sample '000000000'"):
        list(SubBatches(copied))


def test_view_reads_the_selected_of_the_original_shards(output: Any, names_its_colour: Callable[..., bool]) -> None:
    """Items come in selection order from the input shards, each with its own caption, json and image."""
    view = SelectionView(output.inputs, output.out, decode=True, open_shards=1)
    assert [item["caption"] for item in view] == output.captions
    for row in output.selected[::5]:
        item = view[output.selected.index(row)]
        assert (item["key"], item["sample_id"], item["rank"]) == (row.sample.key, row.sample_id, row.rank)
        assert item["json"] == {"caption": row.sample.caption, "uid": row.sample.uid}
        assert names_its_colour(item["image"], item["caption"])
    assert view[-1]["caption"] == output.captions[-1]
    with pytest.raises(IndexError):
        view[len(view)]


def test_view_works_in_a_shuffling_loader(output: Any) -> None:
    """A shuffling DataLoader with workers sees every selected sample once, bytes unchanged."""
    view = SelectionView(output.inputs, output.out)
    view.check()
    loader = DataLoader(view, batch_size=5, shuffle=True, num_workers=2, collate_fn=default_collate)
    seen = {text: image for batch in loader for text, image in zip(batch["caption"], batch["image"], strict=True)}
    assert seen == {row.sample.caption: row.sample.image for row in output.selected}
    view.close()
    assert view[0]["caption"] == output.captions[0]


def test_view_starts_in_spawned_workers(output: Any) -> None:
    """A view with open shards pickles without them."""
    view = SelectionView(output.inputs, output.out)
    assert view[0]["caption"] == output.captions[0]
    loader = DataLoader(view, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [item["caption"] for item in loader] == output.captions


def test_view_that_was_never_closed_ends_in_silence(output: Any) -> None:
    """A script may end while a view holds shards open, and nothing is printed about it."""
    code = f"import curate; view = curate.SelectionView({str(output.inputs[0].parent)!r}, {str(output.out)!r}); view[0]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_view_finds_moved_shards(output: Any, tmp_path: Path) -> None:
    """Shards at another path are matched by base name, and by content where two share one."""
    moved, decoy = tmp_path / "moved", tmp_path / "decoy"
    shutil.copytree(output.inputs[0].parent, moved)
    decoy.mkdir()
    shutil.copy(output.inputs[1], decoy / "00000.tar")
    view = SelectionView([decoy, moved], output.out)
    assert [item["caption"] for item in view] == output.captions


def test_view_refuses_a_changed_shard(output: Any, tmp_path: Path) -> None:
    """A shard whose content changed since it was scored is refused by name."""
    moved = Path(shutil.copytree(output.inputs[0].parent, tmp_path / "moved"))
    content = bytearray((moved / "00001.tar").read_bytes())
    content[600] ^= 1
    (moved / "00001.tar").write_bytes(content)
    view = SelectionView(moved, output.out)
    with pytest.raises(ShardError, match=r"moved/00001\.tar.*not that of"):
        view.check()
    with pytest.raises(ShardError, match=r"moved/00001\.tar"):
        list(view)


def test_view_refuses_a_missing_shard(output: Any) -> None:
    """A shard of the ledger that is not given is asked for by name."""
    with pytest.raises(UsageError, match=r"00001\.tar.*add its path"):
        SelectionView(output.inputs[0], output.out)


def test_loaders_read_a_real_run(output: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What `curate.score` wrote comes back alike from the new shards and from the original ones."""
    folder = output.inputs[0].parent
    choice = {"super_batch": 40, "sub_batch": 8, "criterion": "easy-reference", "samples_per_shard": 12}
    curate.score([folder], tmp_path / "out", reference=str(tiny_checkpoint), **choice)
    batches = list(SubBatches(tmp_path / "out", decode=False))
    view = list(SelectionView(folder, tmp_path / "out"))
    assert [len(batch) for batch in batches] == [8, 8]
    assert [row["caption"] for row in view] == [text for batch in batches for text in batch.captions]
    assert [row["image"] for row in view] == [image for batch in batches for image in batch.images]
    assert [row["score"] for row in view] == [score for batch in batches for score in batch.scores.tolist()]


def test_shared_run_is_untouched(output: Any) -> None:
    """The tests above left the shared run as it was."""
    assert json.loads((output.out / "sizes.json").read_text()) == dict.fromkeys(output.shards, 12)
