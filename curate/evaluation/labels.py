"""What the classes of labelled shards are called, and which class a sample has.

Two layouts. CLIP_benchmark's: KEY.cls holds the number of the class, and beside the shards, or one folder up, lie
classnames.txt and zeroshot_classification_templates.txt with a line per class and per prompt. Or a field of KEY.json
whose distinct values are the classes; finding them takes one pass over the json members, images unread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from curate.errors import UsageError
from curate.evaluation.streaming import Rejected
from curate.inspection import printable
from curate.shards.captions import read_json
from curate.shards.samples import SampleEntry, group_samples
from curate.shards.sources import ShardSource, expand_shards, open_shard
from curate.shards.tarindex import index_tar

CLASS_FILE: Final = "classnames.txt"
TEMPLATE_FILE: Final = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATES: Final = ("a photo of a {c}.",)
MOST_CLASSES: Final = 100_000
_LONGEST_NUMBER: Final = 20


@dataclass(frozen=True, slots=True)
class Labels:
    """The class of each sample. `names` in the order of their numbers; `field` None means the `cls` member.

    `numbers` maps the values of the field to classes; integers that are not in it count as numbers of classes.
    """

    names: tuple[str, ...]
    field: str | None = None
    numbers: dict[Any, int] | None = None

    def read(self, data: memoryview, entry: SampleEntry) -> int | Rejected:
        """The class of a sample, or "label-missing" or "label-unreadable".

        Errors: UsageError, naming the sample, for a class that the names do not have: they belong to other shards.
        """
        if self.field is None:
            return self._numbered(entry, _class_number(data, entry))
        value = _field_value(data, entry, self.field)
        number = value if isinstance(value, Rejected) else (self.numbers or {}).get(value)
        if number is None and isinstance(value, str):
            raise UsageError(
                f"sample {entry.key!r}: {self.field} is {value!r}, which is none of the {len(self.names)} class names; "
                "give the --classes that belong to these shards, or none"
            )
        return self._numbered(entry, value if number is None else number)

    def _numbered(self, entry: SampleEntry, number: Any) -> int | Rejected:
        if isinstance(number, Rejected):
            return number
        if not 0 <= number < len(self.names):
            raise UsageError(
                f"sample {entry.key!r} has class {number}, but there are {len(self.names)} class names (0 to "
                f"{len(self.names) - 1}); give the --classes that belong to these shards"
            )
        return int(number)


def find_labels(sources: Sequence[ShardSource], *, classes: Path | None = None, field: str | None = None) -> Labels:
    """The classes of labelled shards. Errors: UsageError where there are none, and what to give."""
    if field is None:
        return Labels(read_classes(sources, classes))
    if classes is not None:
        names = read_classes(sources, classes)
        return Labels(names, field, {name: number for number, name in enumerate(names)})
    values = _distinct(sources, field)
    return Labels(tuple(map(str, values)), field, {value: number for number, value in enumerate(values)})


def read_classes(sources: Sequence[ShardSource], given: Path | None) -> tuple[str, ...]:
    """The lines of a class file: `given`, or the one beside the shards. Errors: UsageError for none, or a gap."""
    lines = _lines(sources, given, CLASS_FILE)
    if lines is None:
        raise UsageError(
            f"no {CLASS_FILE} beside {sources[0].url} or one folder up; give --classes FILE with a name in each line, "
            "or --label FIELD to take the classes from the json"
        )
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1} of it" if lines else "it"
        raise UsageError(f"{given or CLASS_FILE}: {where} is empty; every line names the class of its number")
    return lines


def read_templates(sources: Sequence[ShardSource], given: Path | None) -> tuple[str, ...]:
    """The prompts: `given`, or the file beside the shards, or "a photo of a {c}.".

    Errors: UsageError for a line without a place for the name.
    """
    lines = _lines(sources, given, TEMPLATE_FILE)
    if lines is None:
        return DEFAULT_TEMPLATES
    lines = tuple(line for line in lines if line)
    wrong = next((line for line in lines if fill(line, "\0") == line), None)
    if wrong is not None or not lines:
        what = "it holds no prompt" if wrong is None else f"{wrong!r} has no place for the name"
        raise UsageError(f"{given or TEMPLATE_FILE}: {what}; write {{c}} or {{}} where the name goes")
    return lines


def fill(template: str, name: str) -> str:
    """Put a name into a prompt; nothing else of it is read as a format. `fill("a {c}.", "cat")` is "a cat."."""
    return template.replace("{c}", name) if "{c}" in template else template.replace("{}", name)


def _lines(sources: Sequence[ShardSource], given: Path | None, name: str) -> tuple[str, ...] | None:
    """The stripped lines of the given file or of the one beside the shards, which has to be the same for all."""
    if given is not None:
        found = {str(given)}
    else:
        found = {path for folder in sorted({_folder(source.url) for source in sources}) for path in _near(folder, name)}
    if len(found) > 1:
        raise UsageError(f"these shards have different {name} ({', '.join(sorted(found))}); evaluate them one by one")
    return _read_lines(found.pop()) if found else None


def _near(folder: str, name: str) -> list[str]:
    """The file in a folder, or else in the one above."""
    for place in (folder, _folder(folder)):
        path = f"{place}/{name}"
        if ("://" in path and _is_there(path)) or ("://" not in path and Path(path).is_file()):
            return [path]
    return []


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _is_there(url: str) -> bool:
    try:
        return bool(expand_shards(url))
    except UsageError:
        return False


def _read_lines(path: str) -> tuple[str, ...]:
    try:
        text = _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    return tuple(line.strip() for line in text.removeprefix("\ufeff").rstrip().split("\n")) if text.strip() else ()


def _read_bytes(path: str) -> bytes:
    if "://" in path:
        with open_shard(expand_shards(path)[0]) as data:
            return bytes(data)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _class_number(data: memoryview, entry: SampleEntry) -> int | Rejected:
    member = entry.member("cls")
    if member is None:
        return Rejected("label-missing")
    text = bytes(data[member.offset : member.offset + min(member.size, _LONGEST_NUMBER)]).strip()
    return int(text) if text.isdigit() else Rejected("label-unreadable")


def _field_value(data: memoryview, entry: SampleEntry, field: str) -> Any:
    record = read_json(data, entry)
    value = None if record is None else record.get(field)
    if value is None:
        return Rejected("label-missing")
    return value if isinstance(value, str | int) and value != "" else Rejected("label-unreadable")


def _distinct(sources: Sequence[ShardSource], field: str) -> list[Any]:
    """The values of a field, sorted as they are spelled. Errors: UsageError where they make no classes."""
    values: set[Any] = set()
    fields: Counter[str] = Counter()
    for source in sources:
        with open_shard(source) as data:
            for entry in group_samples(index_tar(data), ""):
                if entry.reason is None:
                    fields.update(list(read_json(data, entry) or {})[:100])
                    value = _field_value(data, entry, field)
                    values |= set() if isinstance(value, Rejected) else {value}
            if len(values) > MOST_CLASSES:
                raise UsageError(f"--label {field}: more than {MOST_CLASSES:,} distinct values are no classes")
    if len(values) < 2:
        there = ", ".join(printable(name) for name, _ in fields.most_common(40)) or "no json at all"
        what = f"only the value {values.pop()!r}" if values else "nothing"
        raise UsageError(f"--label {field}: the samples have {what} there; their fields are {there}")
    return sorted(values, key=lambda value: (str(value), type(value).__name__))
