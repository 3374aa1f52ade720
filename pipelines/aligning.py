"""Alignment in the score pass: a trusted gradient made once by the driver, and a score per candidate along it.

The gradient is a file that units read, one fp32 number per weight of the learner. A candidate's scoring batch is fixed
by its shard and the batch size alone: the shard's rows are cut evenly into groups of whole batches, of at most 256 rows
(or one batch, if that is more), and those of a group that can be read are scored together. So the pixels of one group
are held per thread. A score sums over the foreign captions and images of its group; in shards of fewer rows there are
fewer. Three forward passes of the learner per candidate, in fp32.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from curate.errors import CurateWarning, UsageError
from curate.models.embed import DualEncoder
from curate.models.load import load_model
from curate.reading import ReadLimits, read_sample
from curate.receipts import Attempt, Store, Unit
from curate.selection.alignment import Derivatives, moving, trusted_gradient
from curate.settings import ScoreSettings
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import ShardSource, open_shard, shard_digest
from curate.shards.tarindex import index_tar

# B pairs, M scored together, C channels, H, W height and width

GROUP_ROWS = 256
T = TypeVar("T")


def trusted_settings(sources: Sequence[ShardSource], size: int) -> dict[str, Any]:
    """What `RUN.json` pins of the trusted shards: their digests, in an order of their own, and how many pairs."""
    if not sources:
        return {}
    digests = set()
    for source in sources:
        with open_shard(source) as data:
            digests.add(shard_digest(data))
    return {"trusted": tuple(sorted(digests)), "trusted_size": size}


def make_direction(
    output: Path, settings: ScoreSettings, sources: Sequence[ShardSource], identity: dict[str, Any]
) -> Path:
    """The file of the learner's gradient on the trusted pairs; made if it is not there. `identity` is the learner's.

    Errors: UsageError where fewer than two of the pairs can be read, or the gradient is not finite.
    """
    kept = settings.model_dump(exclude={"reference", "learner", "precision"})
    unit = Unit("direction", {"settings": kept, "learner": identity})
    store = Store.of(output)
    receipt = store.commit(unit, functools.partial(_make_direction, settings, sources))
    path = store.locate(receipt.outputs[0])
    assert path is not None, "commit returns receipts whose files are there"
    return path


def _make_direction(settings: ScoreSettings, sources: Sequence[ShardSource], attempt: Attempt) -> dict[str, Any]:
    learner = aligned_learner(settings)
    image_BCHW, token_BT = read_trusted(settings, sources, learner)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in units: the same bits whatever runs beside it
    try:
        batch = image_BCHW.to(learner.device), token_BT.to(learner.device)
        direction = trusted_gradient(learner.module, batch, micro_batch=settings.batch_size)
    finally:
        torch.set_num_threads(threads)
    with attempt.open(".safetensors") as file:
        file.write(save({name: slope.cpu().contiguous() for name, slope in direction.items()}))
    return {"pairs": len(token_BT)}


def aligned_learner(settings: ScoreSettings) -> DualEncoder:
    """The learner in fp32, which tangents need; the loaded one where it is that already."""
    assert settings.learner is not None, "checked when the models were chosen"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurateWarning)  # said already when the run chose its models
        loaded = load_model(settings.learner, precision=settings.precision)
        return loaded if loaded.identity.precision == "fp32" else load_model(settings.learner, precision="fp32")


def read_trusted(
    settings: ScoreSettings, sources: Sequence[ShardSource], learner: DualEncoder
) -> tuple[Tensor, Tensor]:
    """At most `trusted_size` pairs: images [B, C, H, W] and token ids. Those with the smallest ids, a fair sample.

    (An id is a hash of the shard's bytes and the ordinal, so neither order nor names of the shards matter.)
    """
    limits = ReadLimits(settings.max_pixels, settings.max_caption_bytes, learner.min_side)
    pixels, captions = [], []
    with ExitStack() as stack:
        entries: dict[bytes, tuple[memoryview, SampleEntry]] = {}
        for source in sources:
            data = stack.enter_context(open_shard(source))
            grouped = group_samples(index_tar(data), shard_digest(data))
            entries |= {entry.sample_id: (data, entry) for entry in grouped if entry.reason is None}
        for _, (data, entry) in sorted(entries.items()):
            sample = read_sample(data, entry, limits)
            if sample.rgb_HWC is not None and sample.caption is not None:
                pixels.append(learner.preprocess(sample.rgb_HWC))
                captions.append(sample.caption)
            if len(captions) == settings.trusted_size:
                break
    if len(captions) < 2:
        names = ", ".join(source.url for source in sources[:3])
        raise UsageError(f"--trusted {names}: {len(captions)} readable pairs, at least two are needed")
    return torch.from_numpy(np.stack(pixels)), learner.tokenize(captions)


@dataclass(frozen=True, slots=True)
class Aligner:
    """Scores the readable samples of one group. Threads may share it."""

    learner: DualEncoder
    derivatives: Derivatives
    batch_size: int

    def __call__(self, pixels: Sequence[Tensor], captions: Sequence[str]) -> NDArray[np.float32]:
        """[M] from images [., C, H, W] of the batches of a group and its M captions."""
        if not captions:
            return np.zeros(0, np.float32)
        device = self.learner.device
        candidates = torch.cat(list(pixels)).to(device), self.learner.tokenize(captions).to(device)
        return self.derivatives(candidates, micro_batch=self.batch_size).cpu().numpy()


@contextlib.contextmanager
def open_aligner(settings: ScoreSettings, direction: Path | None) -> Iterator[Aligner | None]:
    """An aligner along the gradient in `direction`; None without one."""
    if direction is None:
        yield None
        return
    learner = aligned_learner(settings)
    with moving(learner.module, _direction(direction, str(learner.device))) as derivatives:
        yield Aligner(learner, derivatives, settings.batch_size)


@functools.lru_cache(maxsize=1)
def _direction(path: Path, device: str) -> dict[str, Tensor]:
    return load_file(path, device=device)


def evenly(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Consecutive parts of at most `most`, whose lengths differ by at most one: 9 items by 4 are 3, 3 and 3."""
    count = -(-len(items) // most)
    return [items[part * len(items) // count : (part + 1) * len(items) // count] for part in range(count)]
