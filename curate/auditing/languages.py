"""What can honestly be said of a caption's language without a model: often nothing, and then it says so.

Some scripts have one language of note (kana, Hangul, Thai). In Latin letters and Devanagari function words decide
("with", "und", "avec", "है"), against lists of neighbouring languages that are there only to be told apart; a letter
that a language does not have speaks against it. Han alone is Chinese if the Japanese standard set lacks one of its
characters, Japanese if the Chinese ones do, and undetermined if both have them all. Names and titles stay undetermined.
"""

# N captions

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from curate.auditing.columns import Column
from curate.auditing.folding import fold, words_of
from curate.auditing.scripts import UNDETERMINED, dominant, grouped, script_counts

# Scripts that are all but one language's. Not here: Cyrillic, Arabic, Hebrew, Bengali, Ethiopic, Myanmar, Tibetan.
BY_SCRIPT: Final = {
    "Japanese": "ja", "Korean": "ko", "Thai": "th", "Greek": "el", "Tamil": "ta", "Telugu": "te", "Kannada": "kn",
    "Malayalam": "ml", "Gujarati": "gu", "Gurmukhi": "pa", "Oriya": "or", "Sinhala": "si", "Lao": "lo", "Khmer": "km",
    "Armenian": "hy", "Georgian": "ka", "Cherokee": "chr", "Thaana": "dv",
}  # fmt: skip
FUNCTION_WORDS: Final = {
    "en": (
        "the a an of and with in on is are to for at by from this that his her their its it was were has have as "
        "or not who which while you your we my into over under near up out he she they be one two some there "
        "what when how all"
    ),
    "es": (
        "el la los las un una unos unas de del y con en es son para por al su sus que se no a o pero como más muy "
        "está están sobre entre sin desde hasta este esta ese esa lo le nos mi tu e ha han ser fue hay cuando "
        "donde también"
    ),
    "fr": (
        "le la les un une des de du et avec dans est sont pour par au aux sur son sa ses qui que se ne pas à ou "
        "mais très ce cette ces en il elle ils leur leurs nous vous sans sous entre chez a ont été où d l qu "
        "comme"
    ),
    "de": (
        "der die das ein eine einen einem einer eines und mit in im ist sind auf von vom zu zum zur den dem des "
        "für bei an am aus nicht sich auch als wie wird werden ihr ihre sein seine über unter vor nach durch oder "
        "aber es er sie wir ich haben kein keine was kann können"
    ),
}
# Only to be told apart from the four above.
NEIGHBOURS: Final = {
    "it": (
        "il lo la i gli le un una uno di del della dei delle e con in è sono per da al alla su che si non a o ma "
        "come nel nella dal sul più questo questa"
    ),
    "pt": (
        "o a os as um uma de do da dos das e com em é são para por ao no na nos nas que se não ou mas como mais "
        "seu sua este esta pelo pela"
    ),
    "ca": "el la els les un una de del dels i amb en és són per al que es no a o però com més seu seva d l",
    "ro": "un o de la cu în pe și si este sunt pentru din care nu a al ale",
    "nl": (
        "de het een en met in op is zijn van voor te aan bij uit niet ook als door over naar dat die er was of "
        "hij zij ze om onder onze"
    ),
    "sv": "en ett och med i på är av för till som den det de att från inte om under över vid",
    "da": "en et og med i på er af for til som den det de at fra ikke om under over ved der",
    "nb": "en et ei og med i på er av for til som den det de at fra ikke om under over ved",
    "pl": "i z w na jest są do od dla po o się nie to ten ta a że",
    "cs": "a s v na je jsou do od pro po o se že to ten ta",
    "hu": "a az és egy van nem hogy is ez",
    "fi": "ja on ei se että kanssa tai",
    "et": "ja on ei see et koos või",
    "tr": "ve bir ile için bu da de ne",
    "id": "dan yang di dengan untuk dari ini itu pada adalah",
    "vi": "và của có là một trong cho với",
    "lt": "ir su yra iš į ant",
    "xh": "le la e ne",
    "ms": "dan yang di dengan untuk dari",
    "lb": "an de den dat mat eng e vun op ass",
}
# Told apart from a far larger neighbour by a word more only: what reads as either is taken for the larger one.
YIELDING: Final = ("ca", "lb")
# Letters beyond a to z, after folding (ß is ss, œ is oe).
LETTERS: Final = {"en": "éèêëïçñöüâîôà", "es": "áéíóúüñ", "fr": "àâæçéèêëîïôùûüÿ", "de": "äöüéèàç"}
HINDI: Final = "है हैं का की के में और से को पर ने यह वह साथ लिए था थी थे थीं नहीं रहा रही रहे हुए हुआ हुई इस उस ये वे भी या तो"
DEVANAGARI_NEIGHBOURS: Final = (
    "आहे आहेत आणि चा ची चे च्या मध्ये असलेला छ छन् मा हरू गर्दै भएको रको आसा आनी"  # Marathi, Nepali, Konkani
)
CHINESE: Final = frozenset("的了是们們这這吗嗎个")
_TELLING: Final = 3  # letters of a word that decides alone


class Guess(NamedTuple):
    """`language` or "undetermined"; the scripts of the caption's letters, most first.

    `candidates`: where two function words or more, none of one letter, speak for several languages alike, those
    languages; the caption is hardly in any other.
    """

    language: str
    scripts: tuple[str, ...]
    candidates: tuple[str, ...] = ()


class Guesser:
    """Guesses with the six languages' words and those of added lists: language -> function words, in Latin letters."""

    __slots__ = ("_owners", "words")

    def __init__(self, added: Mapping[str, Sequence[str]] | None = None) -> None:
        own = {language: frozenset(words.split()) for language, words in FUNCTION_WORDS.items()}
        own |= {language: frozenset(words) for language, words in (added or {}).items()}
        self.words: Mapping[str, frozenset[str]] = own
        neighbours = {language: words.split() for language, words in NEIGHBOURS.items() if language not in own}
        owners: dict[str, list[str]] = {}
        for language, words in {**own, **neighbours}.items():
            for word in words:
                owners.setdefault(word, []).append(language)
        self._owners = owners

    def guess(self, caption: str, words: Sequence[str]) -> Guess:
        """The guess for a caption and its `words`, as `curate.auditing.folding.words_of` cuts them.

        Example: "una mujer con sombrero" is "es", "mujer" is undetermined, and so is "uma mulher com chapéu".
        """
        if caption.isascii():
            return self._latin(words, ("Latin",)) if caption.lower() != caption.upper() else Guess(UNDETERMINED, ())
        counts = script_counts(caption)
        script, scripts = dominant(counts), tuple(name for name, _ in counts.most_common())
        if script in BY_SCRIPT:
            return Guess(BY_SCRIPT[script], scripts)
        if script == "Latin":
            return self._latin(words, scripts)
        if script == "Devanagari":
            return Guess(_devanagari(words), scripts)
        return Guess(_han(caption) if script == "Han" else UNDETERMINED, scripts)

    def _latin(self, words: Sequence[str], scripts: tuple[str, ...]) -> Guess:
        hits: dict[str, int] = {}
        telling: set[str] = set()
        for word in set(words):
            owners = self._owners.get(word, ())
            for language in owners:
                hits[language] = hits.get(language, 0) + 1
            if len(owners) == 1 and len(word) >= _TELLING:
                telling.add(owners[0])
        most = max(hits.values(), default=0)
        best = tuple(language for language, count in hits.items() if count == most and _can_spell(language, words))
        best = tuple(language for language in best if language not in YIELDING) or best
        if len(best) == 1 and best[0] in self.words and (most > 1 or best[0] in telling):
            return Guess(best[0], scripts)
        firm = sum(len(word) > 1 and best[0] in self._owners.get(word, ()) for word in set(words)) if best else 0
        return Guess(UNDETERMINED, scripts, best if firm > 1 else ())


def language_column(captions_N: Sequence[str | None]) -> Column:
    """The language of each caption as far as it can be told; "undetermined" is a group, a missing caption unknown."""
    guesser = Guesser()
    found = [None if one is None else guesser.guess(one, words_of(fold(one))).language for one in captions_N]
    provenance = (
        "language of the caption by script and function words, no model; short captions and names stay undetermined"
    )
    return grouped("caption language", "language", provenance, found)


def _can_spell(language: str, words: Sequence[str]) -> bool:
    letters = LETTERS.get(language)
    return letters is None or all(
        one.isascii() or not one.isalpha() or one in letters for word in words if not word.isascii() for one in word
    )


def _devanagari(words: Sequence[str]) -> str:
    hindi, neighbours = _devanagari_words()
    if any("ळ" in word for word in words):  # a letter of Marathi, Konkani and others
        return UNDETERMINED
    ours = sum(word in hindi for word in words)
    return "hi" if ours and ours > sum(word in neighbours for word in words) else UNDETERMINED


@lru_cache(maxsize=1)
def _devanagari_words() -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(fold(HINDI).split()), frozenset(fold(DEVANAGARI_NEIGHBOURS).split())


def _han(caption: str) -> str:
    """Chinese or Japanese by what the standard character sets hold."""
    if not CHINESE.isdisjoint(caption):
        return "zh"
    han = [one for one in caption if one >= "\u3400" and one.isalpha()]
    chinese = any(not _holds("shift_jis", one) for one in han)
    japanese = any(not _holds("gb2312", one) and not _holds("big5", one) for one in han)
    return UNDETERMINED if chinese == japanese else ("zh" if chinese else "ja")


@lru_cache(maxsize=1 << 16)
def _holds(codec: str, character: str) -> bool:
    try:
        character.encode(codec)
    except UnicodeEncodeError:
        return False
    return True
