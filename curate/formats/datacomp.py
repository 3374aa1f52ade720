"""DataComp's unique ids: 32 hexadecimal digits in a sample's json, a sorted array of 128-bit pairs in a subset file.

A subset file is a `.npy` of `np.dtype("u8,u8")`: (high 64 bits, low 64 bits), sorted. A uid that occurs n times asks
the resharder for the sample n times, so duplicates are kept. 16 bytes per sample.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from curate.errors import UsageError
from curate.shards.captions import strict_json

UID_DTYPE: Final = np.dtype("u8,u8")
_UID: Final = re.compile(r"[0-9a-f]{32}")


def uid_of(json_bytes: bytes | memoryview) -> str | None:
    """The sample's uid, or None where its json has none.

    A uid counts only if the bytes are a strict JSON object whose "uid" is a string of 32 lower-case hexadecimal digits.
    Bytes that never mention "uid" are not parsed.

    >>> uid_of(b'{"uid": "000102030405060708090a0b0c0d0e0f"}')
    '000102030405060708090a0b0c0d0e0f'
    >>> uid_of(b'{"uid": 7}') is None
    True
    """
    payload = bytes(json_bytes)
    if b'"uid"' not in payload:
        return None
    try:
        fields = strict_json(payload)
    except ValueError:
        return None
    return checked_uid(fields.get("uid")) if isinstance(fields, dict) else None


def checked_uid(value: Any) -> str | None:
    """The value if it is a uid, else None."""
    return value if isinstance(value, str) and _UID.fullmatch(value) else None


def uid_array(uids: Iterable[str]) -> NDArray[Any]:
    """Sorted [n] array of `UID_DTYPE`; duplicates stay. Raises `UsageError` for anything but 32 hexadecimal digits.

    >>> uid_array(["f" * 32, "0" * 31 + "1"]).tolist()
    [(0, 1), (18446744073709551615, 18446744073709551615)]
    """
    pairs = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in map(_checked, uids)]
    uid_n = np.array(pairs, dtype=UID_DTYPE)
    # sorted as two columns: np.sort on a structured dtype compares field by field in Python-like speed
    return uid_n[np.lexsort((uid_n["f1"], uid_n["f0"]))]


def uid_strings(uid_n: NDArray[Any]) -> list[str]:
    """The 32 digits of each row."""
    return [f"{int(high):016x}{int(low):016x}" for high, low in uid_n.tolist()]


def to_npy(uid_n: NDArray[Any]) -> bytes:
    """Content of a subset file (`sample_ids.npy`)."""
    buffer = io.BytesIO()
    np.save(buffer, uid_n.astype(UID_DTYPE, copy=False), allow_pickle=False)
    return buffer.getvalue()


def from_npy(content: bytes) -> NDArray[Any]:
    """Rows of a subset file; raises `UsageError` if it is not one."""
    try:
        uid_n = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UsageError(f"not a DataComp subset file: {error}") from error
    if not isinstance(uid_n, np.ndarray) or uid_n.dtype != UID_DTYPE or uid_n.ndim != 1:
        raise UsageError("not a DataComp subset file: it must be one array of np.dtype('u8,u8')")
    return uid_n


def _checked(uid: str) -> str:
    if not _UID.fullmatch(uid):
        raise UsageError(f"{uid!r} is not a DataComp uid: 32 lower-case hexadecimal digits")
    return uid
