"""Read the caption of a sample strictly: UTF-8 text with something to see in it, or a reason why not.

One rule each:
- a `txt` member decides where there is one; else the string under "caption", else under "text", of a `json` member;
- the size limit holds before anything is copied; a UTF-8 byte order mark is dropped; outer white space is dropped;
- bytes that are not UTF-8, lone surrogates and NUL are "caption-encoding"; nothing but white space, control and format
  characters is "caption-empty";
- JSON counts only if it parses strictly: no NaN or infinity, no repeated key, no number of thousands of digits, no
  nesting beyond what the parser holds, at most 1 MiB. Anything else is opaque, and then the caption is missing.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any, Final

from curate.shards.samples import SampleEntry

MAX_JSON_BYTES: Final = 1024 * 1024
_CAPTION_FIELDS: Final = ("caption", "text")


def read_caption(data: memoryview, entry: SampleEntry, *, max_bytes: int = 65536) -> tuple[str | None, str | None]:
    """(caption, None), or (None, reason) with a reason of `curate.reasons`. `max_bytes` counts UTF-8 bytes.

    Example: a `txt` member b"a red cube\\n" gives ("a red cube", None); b"\\xff" gives (None, "caption-encoding").
    """
    member = entry.member("txt")
    if member is None:
        return _from_json(data, entry, max_bytes)
    if member.size > max_bytes:
        return None, "caption-too-long"
    try:
        text = str(data[member.offset : member.offset + member.size], "utf-8")
    except UnicodeDecodeError:
        return None, "caption-encoding"
    return _judge(text)


def read_json(data: memoryview, entry: SampleEntry) -> dict[str, Any] | None:
    """The sample's `json` member as a dictionary if it parses strictly, else None."""
    member = entry.member("json")
    if member is None or member.size > MAX_JSON_BYTES:
        return None
    try:
        value = strict_json(bytes(data[member.offset : member.offset + member.size]))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def strict_json(payload: bytes) -> Any:
    """Parse JSON by RFC 8259 plus: no repeated key, no number that overflows. Raises ValueError, and only that.

    >>> strict_json(b'{"a": NaN}')
    Traceback (most recent call last):
    ValueError: NaN is not JSON
    """
    try:
        return json.loads(
            payload.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def _from_json(data: memoryview, entry: SampleEntry, max_bytes: int) -> tuple[str | None, str | None]:
    record = read_json(data, entry) or {}
    text = next((record[name] for name in _CAPTION_FIELDS if isinstance(record.get(name), str)), None)
    if text is None:
        return None, "caption-missing"
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return None, "caption-encoding"
    return (None, "caption-too-long") if size > max_bytes else _judge(text)


def _judge(text: str) -> tuple[str | None, str | None]:
    text = text.removeprefix("\ufeff").strip()
    if "\0" in text:
        return None, "caption-encoding"
    if not any(_visible(character) for character in text):
        return None, "caption-empty"
    return text, None


def _visible(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character)[0] not in "CZ"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated key")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number overflows")
    return value
