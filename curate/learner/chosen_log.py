"""Which samples each step trained on, in parquet segments under RUN/_curate/chosen: for replay, tee and audit.

A segment holds the steps between two states, and is written before the later of them; those after the state that a run
resumes from are removed. About 40 bytes for each pair trained on.
"""

# b sub-batch

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from curate.chosen import LOG_SCHEMA, segments
from curate.learner.choosing import Chosen
from curate.learner.dataset import Places
from curate.scores import safe_text
from curate.storage import make_directory, remove, replace_file


class ChosenLog:
    """Collects steps in memory; `flush` writes them as one segment."""

    def __init__(self, directory: Path, places: Places) -> None:
        self._directory, self._places = directory, places
        self._steps: list[tuple[int, NDArray[np.int64], Chosen]] = []

    def add(self, step: int, row_b: NDArray[np.int64], chosen: Chosen) -> None:
        """Step `step` (counted from 1) trained on these rows of the pair source, in the order drawn."""
        self._steps.append((step, row_b, chosen))

    def flush(self) -> None:
        """Write what was collected. Errors: StorageError."""
        if not self._steps:
            return
        make_directory(self._directory)
        sink = io.BytesIO()
        pq.write_table(pa.concat_tables(self._table(*one) for one in self._steps), sink, compression="zstd")
        first, last = self._steps[0][0], self._steps[-1][0]
        replace_file(self._directory / f"{first:08d}-{last:08d}.parquet", sink.getvalue())
        self._steps = []

    def _table(self, step: int, row_b: NDArray[np.int64], chosen: Chosen) -> pa.Table:
        places, b = self._places, len(row_b)
        columns = [
            np.full(b, step),
            np.arange(b),
            chosen.chunk_b,
            chosen.logit_b,
            [identifier.tobytes() for identifier in places.id_N16[row_b]],
            places.shard_N[row_b],
            places.row_N[row_b],
            [safe_text(places.key_N[row]) for row in row_b.tolist()],
        ]
        arrays = [pa.array(values, f.type) for values, f in zip(columns, LOG_SCHEMA, strict=True)]
        return pa.Table.from_arrays(arrays, schema=LOG_SCHEMA)


def cut_back(directory: Path, step: int) -> None:
    """Remove segments of later steps than `step`."""
    for _, last, path in segments(directory):
        if last > step:
            remove(path)
