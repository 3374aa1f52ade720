"""The shard index of `wids` (webdataset up to 0.2.x): one JSON file that gives random access over shards.

webdataset 1.0 removed the package; the file costs a few bytes per shard and older readers still load it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class WidsShard:
    """One line of the index: a url relative to the index file, the shard's md5, its samples and bytes."""

    url: str
    md5sum: str
    nsamples: int
    filesize: int


def wids_index(shards: Iterable[WidsShard], *, name: str) -> dict[str, Any]:
    """Content of `shardindex.json`.

    >>> wids_index([WidsShard("00000.tar", "d41d8cd98f00b204e9800998ecf8427e", 3, 10240)], name="kept")["wids_version"]
    1
    """
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": name,
        "shardlist": [
            {"url": shard.url, "md5sum": shard.md5sum, "nsamples": shard.nsamples, "filesize": shard.filesize}
            for shard in shards
        ],
    }
