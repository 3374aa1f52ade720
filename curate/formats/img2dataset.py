"""What img2dataset writes beside a shard: names, nine-digit keys, the sidecar's columns and the stats file.

Columns and keys were read in img2dataset's `downloader.py` and `logger.py`; the columns after `sha256` are ours.
Tools that count samples (DataComp's resharder) read `successes` from the stats.
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from curate.errors import UsageError

SAMPLES_PER_SHARD: Final = 10_000

SIDECAR_SCHEMA: Final = pa.schema(
    [
        # img2dataset's own
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
        # where the sample came from
        ("original_key", pa.string()),
        ("original_shard", pa.string()),
        ("sample_id", pa.binary(16)),
        ("uid", pa.string()),
        # why it was selected
        ("sub_batch", pa.int32()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("reference_similarity", pa.float32()),
        ("learner_similarity", pa.float32()),
    ]
)


def shard_stem(shard: int) -> str:
    """Base name of output shard number `shard` without its extension: 7 -> "00007"."""
    return f"{shard:05d}"


def output_key(shard: int, index: int) -> str:
    """Key of sample `index` of output shard `shard`: shard * 10^4 + index in nine digits.

    >>> output_key(7, 42)
    '000070042'

    Raises `UsageError` outside 0 <= index < 10,000, where two shards would share a key.
    """
    if shard < 0 or not 0 <= index < SAMPLES_PER_SHARD:
        raise UsageError(
            f"no key for sample {index} of shard {shard}: a shard holds samples 0..{SAMPLES_PER_SHARD - 1}; "
            "write more, smaller shards"
        )
    return f"{shard_stem(shard)}{index:04d}"


def stats(samples: int) -> dict[str, Any]:
    """Content of `00000_stats.json` for a shard of `samples` samples, with img2dataset's eight keys.

    Only successes reach an output shard, so `count` equals `successes`. The three times are zero: they would be the
    only bytes that differ between two runs over the same inputs (the run's real times stand in its receipts).

    >>> stats(3)["successes"], stats(3)["status_dict"]
    (3, {'success': 3})
    """
    return {
        "count": samples,
        "successes": samples,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": samples} if samples else {},
    }
