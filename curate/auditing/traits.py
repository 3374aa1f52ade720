"""What an audit asks of a caption, read once and kept in a table: script, language, length in words, mentioned groups.

A trait is a fact of the sample alone, so the table can be made shard by shard and kept: labels, selections and policies
change, captions do not. About 20,000 captions of twelve words per second and core with three sets of word lists.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import regex

from curate.auditing.columns import shown
from curate.auditing.folding import MARKS, fold, words_of
from curate.auditing.lexicons import SETS, SHIPPED, Lexicon, read_lexicon, shipped_file
from curate.auditing.matching import Mention
from curate.auditing.mentions import MentionReader, guesser_of
from curate.auditing.scripts import UNDETERMINED, script_of
from curate.errors import UsageError

# N captions

MENTIONS: Final = "mentions:"  # before the name of a set of word lists: a column of lists of groups
FIELD: Final = "field:"  # before the name of a json field: its value, or the list of its values, as JSON text
MOST_LISTED: Final = 200  # groups of a field of lists: a byte for each and each sample
VERSION: Final = 2  # raised when a sample reads differently, so that no stored table is taken for a newer one
TEXT: Final = pa.large_string()  # 2 GiB of captions are 30 million
_SCALARS: Final = (str, int, float)  # true and false are int
_NO_SPACES: Final = regex.compile(
    r"[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}"
    r"\p{Script=Myanmar}]"
)


@dataclass(frozen=True, slots=True)
class WordList:
    """A file of terms: one of ours by its language (`path` None), or a user's. `sha256` is of its bytes."""

    name: str
    sha256: str
    path: Path | None = None

    @classmethod
    def shipped(cls, language: str) -> WordList:
        return cls(language, _digest(shipped_file(language)))

    @classmethod
    def of(cls, path: Path) -> WordList:
        return cls(shown(path.name), _digest(path), path.expanduser().absolute())

    def read(self) -> Lexicon:
        """Errors: UsageError for a file that is no list of terms, or that changed since it was named."""
        path = self.path or shipped_file(self.name)
        if _digest(path) != self.sha256:
            raise UsageError(f"{path} changed since the run began (sha256 {self.sha256[:12]}... then); start it again")
        return read_lexicon(path, source=self.name if self.path else f"curate's {self.name}")


@dataclass(frozen=True, slots=True)
class TraitSettings:
    """Which word lists, which of their sets, and which fields of the samples' json are read into the table."""

    lists: tuple[WordList, ...] = ()
    sets: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    @classmethod
    def default(cls) -> TraitSettings:
        """All lists that come along, in all three sets."""
        return cls(shipped_lists(), SETS)

    def lexicons(self) -> tuple[Lexicon, ...]:
        """The lists, read. Errors: as `WordList.read`."""
        return tuple(one.read() for one in self.lists)

    def as_json(self) -> dict[str, Any]:
        """All that the table depends on beside the captions; no path of this machine."""
        lists = [[one.name, one.sha256] for one in self.lists]
        return {"version": VERSION, "lists": lists, "sets": list(self.sets), "fields": list(self.fields)}


def shipped_lists() -> tuple[WordList, ...]:
    """The lists that come with curate."""
    return tuple(WordList.shipped(language) for language in SHIPPED)


def field_value(value: Any) -> Any:
    """What a group column can be made of in a json value: text, numbers, true, false; of a list, its different ones.

    None for anything else. Of more values than any column may have those beyond `MOST_LISTED` + 1 are left: enough to
    tell that there are too many. Example: ["a", {"b": 1}, "a"] is ["a"], and [{"b": 1}] is None.
    """
    if not isinstance(value, list):
        return value if isinstance(value, _SCALARS) else None
    found = {json.dumps(one): one for one in value if isinstance(one, _SCALARS)}  # 1 and true stay apart
    return list(found.values())[: MOST_LISTED + 1] if found or not value else None


class CaptionReader:
    """Reads captions for these settings. Building one takes a tenth of a second; `caption_reader` keeps the last."""

    def __init__(self, settings: TraitSettings) -> None:
        lists = settings.lexicons()
        self._readers = [MentionReader(lists, name) for name in settings.sets]
        self._guesser = guesser_of(lists)
        self.facts: dict[str, Any] = {
            "sets": {
                one.name: {"groups": list(one.groups), "provenance": one.provenance()} for one in self._readers
            }
        }  # fmt: skip

    def read(self, captions_N: Iterable[str | None]) -> pa.Table:
        """One row per caption: script, language, words, `mentions:SET`; all null where there is no caption.

        A list of groups is null where no word list is for the caption's language. Example: "a woman and her dog" is
        Latin, en, 5 words, and mentions:gender is ["female"].
        """
        read = [None if caption is None else self._read(caption) for caption in captions_N]
        columns = {
            "script": pa.array([one and one.script for one in read], pa.string()),
            "language": pa.array([one and one.language for one in read], pa.string()),
            "words": pa.array([None if one is None else one.words for one in read], pa.int32()),
        }
        for number, reader in enumerate(self._readers):
            groups = [None if one is None else one.groups[number] for one in read]
            columns[MENTIONS + reader.name] = pa.array(groups, pa.list_(pa.string()))
        return pa.table(columns)

    def _read(self, caption: str) -> _Traits:
        folded = fold(caption)
        words = words_of(folded)
        guess = self._guesser.guess(caption, words)
        script = (guess.scripts or (UNDETERMINED,))[0] if caption.isascii() else script_of(caption)
        found = [reader.find(folded, words, guess) for reader in self._readers]
        return _Traits(script, guess.language, word_count(folded, words), [_groups(one) for one in found])


class _Traits(NamedTuple):
    script: str
    language: str
    words: int
    groups: list[list[str] | None]  # per set


def _groups(found: Sequence[Mention] | None) -> list[str] | None:
    return None if found is None else list(dict.fromkeys(one.group for one in found if not one.negated))


def word_count(folded: str, words: Sequence[str]) -> int:
    """Words of a caption without its marks; where a script has no spaces, each of its letters counts.

    >>> word_count("ein hund, 犬", ["ein", "hund", ",", "犬"]), word_count("赤い犬", ["赤い犬"])
    (3, 3)
    """
    if not folded.isascii() and _NO_SPACES.search(folded):
        letters = len(_NO_SPACES.findall(folded))
        rest = _NO_SPACES.sub(" ", folded)
        return letters + sum(word not in MARKS and word[0].isalnum() for word in words_of(rest))
    return sum(word not in MARKS for word in words)


@functools.lru_cache(maxsize=2)
def caption_reader(settings: TraitSettings) -> CaptionReader:
    """The reader for these settings, kept for the next shard."""
    return CaptionReader(settings)


def with_facts(table: pa.Table, facts: dict[str, Any]) -> pa.Table:
    """The table with what its columns do not say: the groups of each set, where captions come from."""
    return table.replace_schema_metadata({b"curate": json.dumps(facts).encode()})


def facts_of(table: pa.Table) -> dict[str, Any]:
    """What `with_facts` gave it."""
    facts: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"curate", b"{}"))
    return facts


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; name a set ({', '.join(SETS)}) or a file") from error
