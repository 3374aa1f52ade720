"""Yield the sub-batches of a finished run exactly as the sampler drew them: same members, same order, nothing else.

Shuffling the shards again would undo half of the selection, since the sampler scores a *batch*, not its samples one by
one. Reading costs one memory map and one index per shard, and one decode per image.
"""

# b sub-batch

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from curate.errors import UsageError, VerificationError
from curate.images.decode import ImageRejected, decode_rgb
from curate.loaders.output import Planned, Span, finished_output, plan_sub_batches, read_rows, shard_stems
from curate.shards.samples import IMAGE_EXTENSIONS, group_samples
from curate.shards.sources import ShardSource, open_shard
from curate.shards.tarindex import index_tar

Share = Literal["sub-batches", "samples"]


@dataclass(frozen=True, slots=True)
class SubBatch:
    """One sub-batch, rows in the order drawn.

    images: Tensor [b, ...] if `transform` returned tensors of one shape, else a list of b (encoded bytes with
    `decode=False`, RGB PIL images without a transform). captions: list of b strings, or what the tokenizer made of
    them. scores: fp32 [b], the logit with which each row was drawn; NaN where it was drawn uniformly.
    """

    sub_batch: int
    keys: list[str]
    images: Any
    captions: Any
    scores: Tensor

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class _Row:
    key: str
    image: bytes
    caption: str
    score: float


class SubBatches(IterableDataset[SubBatch]):
    """The sub-batches that a run selected, in selection order, for `torch.utils.data.DataLoader(..., batch_size=None)`.

    decode: decode to an RGB PIL image by curate's rules (EXIF applied, transparency on white), then apply `transform`
    (open_clip's and torchvision's take PIL images). `tokenizer` is called with the list of captions of a sub-batch.

    Workers and ranks take turns, so a loader yields the same order with any number of workers, and nothing is lost or
    repeated. With `share="sub-batches"` each rank gets every `world_size`-th sub-batch; their numbers may differ by one
    (`even=True` leaves the surplus out). With `share="samples"` each rank gets its rows of *every* sub-batch, which
    keeps the global batch of a contrastive loss exactly the one drawn.

    Raises `UsageError` if the run has not finished, `VerificationError` if the files contradict each other.

    >>> for batch in DataLoader(curate.SubBatches("out", transform=preprocess, tokenizer=tokenizer),
    ...                         batch_size=None, num_workers=4):                              # doctest: +SKIP
    ...     loss = clip_loss(model(batch.images, batch.captions))
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        *,
        decode: bool = True,
        transform: Callable[[Image.Image], Any] | None = None,
        tokenizer: Callable[[list[str]], Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        share: Share = "sub-batches",
        even: bool = False,
        allow_unfinished: bool = False,
    ) -> None:
        super().__init__()
        if transform is not None and not decode:
            raise UsageError("decode=False yields encoded bytes, so transform would get none; drop one of the two")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not one of the {world_size} ranks 0..{world_size - 1}")
        if share not in ("sub-batches", "samples"):
            raise UsageError(f"share={share!r}: ranks share 'sub-batches' or 'samples'")
        self._out = finished_output(out_dir, allow_unfinished=allow_unfinished)
        self._stems = shard_stems(self._out)
        self._decode, self._transform, self._tokenizer = decode, transform, tokenizer
        planned = plan_sub_batches(self._out, self._stems)
        if share == "samples":
            self._mine, self._rows = planned, slice(rank, None, world_size)
        else:
            whole = len(planned) - len(planned) % world_size if even else len(planned)
            self._mine, self._rows = planned[rank:whole:world_size], slice(None)

    def __len__(self) -> int:
        """Sub-batches that this rank yields."""
        return len(self._mine)

    def __iter__(self) -> Iterator[SubBatch]:
        worker = get_worker_info()
        mine = self._mine if worker is None else self._mine[worker.id :: worker.num_workers]
        reader = _ShardReader(self._out, self._stems)
        for planned in mine:
            yield self._assemble(planned, reader)

    def _assemble(self, planned: Planned, reader: _ShardReader) -> SubBatch:
        rows = [row for span in planned.spans for row in reader.rows(span)][self._rows]
        captions = [row.caption for row in rows]
        return SubBatch(
            planned.sub_batch,
            [row.key for row in rows],
            self._images(rows),
            self._tokenizer(captions) if self._tokenizer else captions,
            torch.tensor([row.score for row in rows], dtype=torch.float32),
        )

    def _images(self, rows: Sequence[_Row]) -> Any:
        if not self._decode:
            return [row.image for row in rows]
        images = [decode_pil(row.image, f"{self._out}, sample {row.key!r}") for row in rows]
        return _stacked([self._transform(image) for image in images] if self._transform else images)


class _ShardReader:
    """Reads spans of rows; remembers the members of the shard it read last, since spans come shard after shard."""

    def __init__(self, out: Path, stems: Sequence[str]) -> None:
        self._out, self._stems = out, stems
        self._shard = -1
        self._rows: list[tuple[str, str, float]] = []
        self._places: dict[str, tuple[int, int]] = {}

    def rows(self, span: Span) -> Iterator[_Row]:
        tar = self._out / f"{self._stems[span.shard]}.tar"
        with open_shard(ShardSource(str(tar.absolute()), tar.stat().st_size, "")) as data:
            if span.shard != self._shard:
                self._load(span.shard, data)
            for key, caption, score in self._rows[span.start : span.stop]:
                if key not in self._places:
                    raise VerificationError(
                        f"{tar}, sample {key!r}: in the sidecar, not in the tar (curate verify OUT)"
                    )
                offset, size = self._places[key]
                yield _Row(key, bytes(data[offset : offset + size]), caption, score)

    def _load(self, shard: int, data: memoryview) -> None:
        table = read_rows(self._out / f"{self._stems[shard]}.parquet", ["key", "caption", "score"])
        table = table.set_column(2, "score", pc.fill_null(table["score"], math.nan))
        self._rows = list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
        entries = group_samples(index_tar(data), "00")  # the digest only makes sample ids, which nobody reads here
        images = ((entry.key, entry.member(*IMAGE_EXTENSIONS)) for entry in entries)
        self._places = {key: (image.offset, image.size) for key, image in images if image is not None}
        self._shard = shard


def decode_pil(image: bytes, where: str) -> Image.Image:
    """An RGB PIL image by curate's rules; `VerificationError` names `where` if the bytes do not decode."""
    try:
        rgb_HWC, _ = decode_rgb(image)
    except ImageRejected as error:
        raise VerificationError(f"{where}: its image no longer decodes ({error}); see `curate verify`") from error
    return Image.fromarray(np.ascontiguousarray(rgb_HWC))


def _stacked(images: list[Any]) -> Any:
    """Tensor [b, ...] if all are tensors of one shape, else the list."""
    if images and all(isinstance(image, Tensor) and image.shape == images[0].shape for image in images):
        return torch.stack(images)
    return images
