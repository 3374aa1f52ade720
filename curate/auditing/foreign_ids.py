"""The ids of a selection that other tools made: DataComp's uids, a list of lines, or a column of a parquet.

Keys are text as they stand; uids are 32 hexadecimal digits in either case, with or without hyphens.
"""

# M selected ids, N rows of the pool

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.auditing.columns import shown
from curate.errors import UsageError
from curate.formats.datacomp import from_npy, uid_strings

IDS: Final = ("uid", "key")
_UID: Final = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True, slots=True)
class Selected:
    """The ids [M] as text, repeats included, and what they are (`on`: "uid" or "key"). `name` is the file's."""

    name: str
    on: str
    ids: pa.Array


def read_selected(file: Path, there: Sequence[str], on: str | None = None) -> Selected:
    """The selected ids, to be found in one of the pool's columns `there` (uid, key).

    Errors: UsageError for a file that holds none, or ids of a kind that the pool does not have.
    """
    if on is not None and on not in IDS:
        raise UsageError(f"--on {on}: the selected of a pool are found by {' or '.join(IDS)}")
    try:
        kind, ids = _read(file, there, on)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 text at byte {error.start:,}") from error
    except pa.ArrowException as error:
        raise UsageError(f"{file}: {str(error).splitlines()[0]}") from error
    if kind not in there:
        raise UsageError(f"{file} lists {kind}s, and the pool has no column {kind!r}; it has {', '.join(there)}")
    if not len(ids) - ids.null_count:
        raise UsageError(f"{file}: it lists no {kind}; nothing was selected, and nothing can be compared")
    if ids.null_count:
        raise UsageError(f"{file}: {ids.null_count:,} rows have no {kind}; leave them out")
    return Selected(file.name, kind, ids)


def ids_of(column: pa.ChunkedArray | pa.Array, kind: str) -> pa.Array:
    """Ids as they are compared: text without outer white space, uids in lower case and without hyphens; blank is null.

    Errors: UsageError for a column of anything but text and whole numbers.
    """
    if not (pa.types.is_integer(column.type) or _is_text(column.type)):
        raise UsageError(f"the column {kind!r} holds {column.type}; ids are text or whole numbers")
    text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    if kind == "uid":
        text = pc.replace_substring(pc.utf8_lower(text), "-", "")
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.large_string()), text)
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text


def _read(file: Path, there: Sequence[str], on: str | None) -> tuple[str, pa.Array]:
    with open(file, "rb") as opened:
        start = opened.read(6)
    if start == b"\x93NUMPY":
        if on == "key":
            raise UsageError(f"{file}: it holds uids; leave --on key out")
        return "uid", ids_of(pa.array(_of_npy(file), pa.string()), "uid")
    if start[:4] == b"PAR1":
        return _of_parquet(file, there, on)
    if file.suffix.lower() not in (".txt", ".csv", ".lst", ""):
        raise UsageError(f"{file}: the selected are a .npy of DataComp uids, a .txt of ids line by line, or a parquet")
    return _of_lines(file, there, on)


def _of_npy(file: Path) -> list[str]:
    try:
        return list(uid_strings(from_npy(file.read_bytes())))
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _of_parquet(file: Path, there: Sequence[str], on: str | None) -> tuple[str, pa.Array]:
    names = pq.read_schema(file).names
    kind = on or next((one for one in IDS if one in names and one in there), None)
    if kind is None or kind not in names:
        raise UsageError(
            f"{file}: no column {on or ' or '.join(there)}; there are: {', '.join(map(shown, names[:20]))}"
        )
    return kind, ids_of(pq.read_table(file, columns=[kind])[kind], kind)


def _of_lines(file: Path, there: Sequence[str], on: str | None) -> tuple[str, pa.Array]:
    """Lines; blank ones are none. They are uids where the pool has such a column and each looks like one."""
    stripped = (line.strip() for line in file.read_text("utf-8-sig").split("\n"))
    lines = [line for line in stripped if line]
    uids = "uid" in there and all(_UID.fullmatch(line.replace("-", "")) for line in lines)
    kind = on or ("uid" if uids else "key")
    return kind, ids_of(pa.array(lines, pa.string()), kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
