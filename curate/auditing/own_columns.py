"""The columns that a pool brings along: what its captions mention, script and language, country, size, shape, copies.

Each is made from the table of traits and the pool's rows alone, in one pass over them; near-duplicates and clusters
cost more (`curate.auditing.clusters`).
"""

# N samples of the pool, G groups

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curate.auditing.clusters import Clusters, Copies, embedding_clusters, near_duplicates
from curate.auditing.columns import UNKNOWN, Column, distinct_names, shown
from curate.auditing.metadata import country_column, shape_column, size_column
from curate.auditing.traits import MENTIONS, facts_of
from curate.scores import ids_to_array, unpack

COPIES: Final = "near-duplicates"
CLUSTERS: Final = "embedding cluster"
EMBEDDING: Final = "ref_image"
MOST_COMPARED: Final = 150_000  # samples whose hashes are compared pair by pair: a minute on one core
_SCRIPT: Final = (
    "Unicode script of the caption's letters; three quarters of them or more, else 'mixed'; 'undetermined' without "
    "letters"
)
_LANGUAGE: Final = (
    "language of the caption by script and function words, no model; short captions and names stay undetermined"
)
_DIGEST: Final = 32  # bytes


def own_columns(rows: pa.Table, traits: pa.Table) -> dict[str, Callable[[], Column | None]]:
    """Name -> what makes the column; None where the pool knows nothing of it. `traits` are those of the rows."""
    facts = facts_of(traits)
    makers: dict[str, Callable[[], Column | None]] = {
        name: _later(mention_column, traits, name, one) for name, one in facts.get("sets", {}).items()
    }
    return makers | {
        "caption script": lambda: _texts(traits["script"], "caption script", "script", _SCRIPT),
        "caption language": lambda: _texts(traits["language"], "caption language", "language", _LANGUAGE),
        "url country": lambda: _country(traits, facts.get("url", "url in the sample's json")),
        "image size": lambda: _sized(size_column, rows, traits),
        "image shape": lambda: _sized(shape_column, rows, traits),
    }


def mention_column(traits: pa.Table, name: str, facts: Mapping[str, Any]) -> Column:
    """The groups of one set of word lists, all of them, whether they occur or not."""
    listed = traits[MENTIONS + name].combine_chunks()
    groups = list(facts["groups"])
    members_NG = np.zeros((len(listed), len(groups)), bool)
    row_M = pc.list_parent_indices(listed).to_numpy()
    code_M = pc.index_in(pc.list_flatten(listed), value_set=pa.array(groups, pa.string())).to_numpy()
    members_NG[row_M, code_M] = True
    known_N = pc.is_valid(listed).to_numpy(zero_copy_only=False)
    return Column(
        shown(name), "mention", facts["provenance"], distinct_names(groups), members_NG=members_NG, known_N=known_N
    )


def copies_of(rows: pa.Table) -> tuple[Copies | None, str]:
    """Near-duplicates of the pool and a note, where the rows have image digests and hashes."""
    if "image_digest" not in rows.column_names or rows["image_digest"].null_count == len(rows):
        return None, "the pool has no image hashes: near-duplicates are counted as samples of their own"
    if "dhash" not in rows.column_names or rows["dhash"].null_count == len(rows):
        digest_N32, known_N = _bytes(rows["image_digest"]), pc.is_valid(rows["image_digest"]).to_numpy()
        copies = near_duplicates(digest_N32, digest_N32, known_N=known_N, bits=0)
        return copies, "the pool has digests of its images alone: only those with the same bytes are taken for copies"
    known_N = pc.is_valid(rows["dhash"]).to_numpy()
    digest_N32, dhash_N32 = (_bytes(rows[name]) for name in ("image_digest", "dhash"))
    if len(rows) <= MOST_COMPARED:
        return near_duplicates(digest_N32, dhash_N32, known_N=known_N), ""
    note = f"above {MOST_COMPARED:,} samples only images with the same bytes or the same hash are taken for copies"
    return near_duplicates(digest_N32, dhash_N32, known_N=known_N, bits=0), note


def clusters_of(rows: pa.Table, clusters: int | None, seed: int) -> tuple[Clusters | None, str]:
    """Clusters of the embeddings that the rows have, and a note where there are none."""
    if clusters == 0:
        return None, ""
    there = EMBEDDING in rows.column_names and pa.types.is_fixed_size_binary(rows[EMBEDDING].type)
    valid_N = pc.is_valid(rows[EMBEDDING]).to_numpy() if there else np.zeros(0, bool)
    row_M = np.flatnonzero(valid_N)
    if len(row_M) < 2:
        return None, "the pool has no embeddings of a reference: no clusters of images were made"
    half_MD = unpack(rows[EMBEDDING].filter(pa.array(valid_N)))
    return embedding_clusters(half_MD, rows_M=row_M, pool=len(rows), clusters=clusters, seed=seed), ""


def _later(
    make: Callable[[pa.Table, str, Mapping[str, Any]], Column], traits: pa.Table, name: str, one: Mapping[str, Any]
) -> Callable[[], Column]:
    return lambda: make(traits, name, one)


def _texts(column: pa.ChunkedArray, name: str, kind: str, provenance: str) -> Column | None:
    """Groups by text, sorted; null is unknown."""
    encoded = column.combine_chunks().dictionary_encode()
    values: list[str] = encoded.dictionary.to_pylist()
    order = sorted(range(len(values)), key=values.__getitem__)
    code_of = np.full(len(values) + 1, UNKNOWN, np.int32)  # the last for nulls
    code_of[order] = np.arange(len(values))
    codes_N = code_of[encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)]
    return Column(name, kind, provenance, tuple(values[one] for one in order), codes_N) if values else None


def _country(traits: pa.Table, source: str) -> Column | None:
    if "url" not in traits.column_names or traits["url"].null_count == len(traits):
        return None
    column = country_column(traits["url"].to_pylist(), source=source)
    return column if column.is_known.any() else None


def _sized(
    make: Callable[[NDArray[Any], NDArray[Any]], Column], rows: pa.Table, traits: pa.Table
) -> Column | None:  # fmt: skip
    names = ("width", "height")
    source = next((table for table in (rows, traits) if set(names) <= set(table.column_names)), None)
    if source is None:
        return None
    column = make(*(source[name].cast(pa.int64()).fill_null(0).to_numpy() for name in names))
    return column if column.is_known.any() else None


def _bytes(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    return ids_to_array(column.fill_null(pa.scalar(bytes(_DIGEST), column.type)))
