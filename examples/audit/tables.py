"""The tables of README.md from results.json: prints them, or with --write puts them between their marks in the page.

    python examples/audit/tables.py --write

Each table stands between `<!-- NAME -->` and `<!-- end -->`. Figures over several seeds are means with their span.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

HERE: Final = Path(__file__).parent
SCRIPTS: Final = {
    "en": "Latin", "es": "Latin", "fr": "Latin", "de": "Latin", "vi": "Latin", "ru": "Cyrillic", "hi": "Devanagari",
    "bn": "Bengali", "th": "Thai", "zh": "Han", "ja": "Japanese", "ko": "Hangul",
}  # fmt: skip
FLOORS: Final = ("0.5", "0.8", "0.9", "1.0")
Results = dict[str, dict[str, Any]]


def seeds(results: Results, part: str, key: str) -> list[Any]:
    """The values of all seeds under `key`, in order of seed."""
    found = results.get(part, {})
    return [found[name] for name in sorted(found) if name.rpartition("/")[0] == key]


def groups(results: Results, key: str, column: str) -> dict[str, list[dict[str, Any]]]:
    """Group -> its row in each seed's audit."""
    audits = seeds(results, "audits", key)
    names = list(audits[0]["columns"][column]["groups"])
    return {name: [one["columns"][column]["groups"][name] for one in audits] for name in names}


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def span(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Mean, and least to most where there are several."""
    mean, least, most = (form.format(one) for one in (fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} [{least}, {most}]"


def ratio(value: Sequence[float | None] | None) -> str:
    """A ratio with its interval."""
    if value is None or value[0] is None:
        return "-"
    low, high = ("-" if end is None else f"{end:.2f}" for end in value[1:])
    return f"{value[0]:.2f} ({low}-{high})"


def sees(row: dict[str, Any]) -> str:
    """The ratio below which a disparity would have been seen."""
    return "none" if row["sees"][0] is None else f"{row['sees'][0]:.2f}"


def one_audit(results: Results, key: str, columns: Sequence[str], seed: int = 0) -> str:
    """A row for each group of one seed's audit."""
    found = results["audits"][f"{key}/{seed}"]["columns"]

    def rows() -> Iterator[Sequence[str]]:
        for column in columns:
            for name, row in found[column]["groups"].items():
                held = row["held"][0] if row["held"] else None
                within = "-" if held is None else f"{ratio(held[1])}, {held[2]}"
                q = "-" if row["q"] is None else f"{row['q']:.2g}"
                rate = "-" if row["rate"] is None else f"{100 * row['rate'][0]:.1f}"
                yield (f"{column}: {name}", f"{row['n']:,}", f"{row['kept']:,}", rate, ratio(row["ratio"]), within, q,
                       sees(row), row["level"])  # fmt: skip

    head = ("group", "n", "kept", "rate, %", "ratio to the rest", "at equal caption length, explains", "q",
            "sees below", "level")  # fmt: skip
    return table(head, rows())


def over_seeds(results: Results, keys: dict[str, str], column: str) -> str:
    """Ratio to the rest of each group over seeds, and in how many of them it was flagged, for several audits."""
    every = {title: groups(results, key, column) for title, key in keys.items()}
    names = list(next(iter(every.values())))

    def rows() -> Iterator[Sequence[str]]:
        for name in names:
            cells = []
            for found in every.values():
                own = found[name]
                flags = sum(row["level"] not in ("untested", "not detected") for row in own)
                values = [row["ratio"][0] for row in own if row["ratio"]]
                cells += [span(values) if values else "-", f"{flags} of {len(own)}"]
            n = span([row["n"] for row in next(iter(every.values()))[name]], "{:.0f}")
            yield (f"{column}: {name}", n, *cells)

    heads = [text for title in keys for text in (title, "flagged")]
    return table(("group", "n", *heads), rows())


def by_seed(results: Results, keys: dict[str, str], column: str) -> str:
    """The ratio of each group, seed by seed, for several audits; in bold where it was flagged."""
    every = [groups(results, key, column) for key in keys.values()]

    def rows() -> Iterator[Sequence[str]]:
        for name, own in every[0].items():
            rows = [found[name] for found in every]
            yield (name, f"{own[0]['n']:,}", *(", ".join(map(_marked, one)) for one in rows))

    return table((column, "n", *(f"{title}, by seed" for title in keys)), rows())


def _marked(row: dict[str, Any]) -> str:
    value = "-" if row["ratio"] is None else f"{row['ratio'][0]:.2f}"
    return value if row["level"] in ("untested", "not detected") else f"**{value}**"


def prices(results: Results, keys: dict[str, str]) -> str:
    """What floors cost: score given up of the plain draw's, and groups that were short."""

    def rows() -> Iterator[Sequence[str]]:
        for title, key in keys.items():
            for floor in FLOORS:
                own = seeds(results, "certificates", f"{key}/floor-{floor}")
                if not own:
                    continue
                bound = [sum(row[3] == "at its floor" for row in one["groups"].values()) for one in own]
                short = [sum(row[2] < row[1] for row in one["groups"].values()) for one in own]
                yield (title, floor, str(len(own)), span([100 * given_up(one) for one in own], "{:.1f}"),
                       span(bound, "{:.1f}"), span(short, "{:.1f}"))  # fmt: skip

    head = ("draw", "floor", "seeds", "price, % of the plain score", "groups at their floor", "groups short")
    return table(head, rows())


def given_up(certificate: dict[str, Any]) -> float:
    """The share of the plain draw's score that the policy costs."""
    price = certificate["price"]
    return float((price["score_without"] - price["score_with_policy"]) / abs(price["score_without"]))


def audits(results: Results) -> str:
    """Every audit: flags, those of random selections, verdict."""

    def rows() -> Iterator[Sequence[str]]:
        for name, one in results["audits"].items():
            random = f"{min(one['random'])} to {max(one['random'])}"
            yield (name, f"{one['pool']:,}", f"{one['selected']:,}", str(one["tests"]), str(one["flags"]), random,
                   one["verdict"] or "-")  # fmt: skip

    return table(("audit/seed", "pool", "selected", "tests", "flags", "random: flags", "policy, floor 0.8"), rows())


def agreement(results: Results) -> str:
    """What the corpus's label of gender says, against what captions mention."""
    found = results["agreement"]["english"]
    said = sorted({name for row in found.values() for name in row})
    rows = ((label, *(f"{row.get(name, 0):,}" for name in said)) for label, row in found.items())
    return table(("label", *said), rows)


def training(results: Results) -> str:
    """Languages in a training run: unique pairs, how often they were drawn, early against late."""
    keys = ("training/plain", "training/floor-0.8")

    def rows() -> Iterator[Sequence[str]]:
        plain, held = (results["audits"][f"{key}/0"]["columns"]["locale"]["groups"] for key in keys)
        for name, row in plain.items():
            cells = [
                text
                for one in (row, held[name])
                for text in (f"{one['kept']:,}", f"{one['draws']:,}", ratio(one["ratio"]), ratio(one["late"][2]))
            ]
            yield (name, f"{row['n']:,}", *cells)

    each = ("unique", "draws", "ratio to the rest", "late to early")
    return table(("locale", "n", *each, *(f"{text}, floor 0.8" for text in each)), rows())


def references(results: Results) -> str:
    """Recall at one of the references, over seeds."""
    held = dict.fromkeys(name.rpartition("/")[0] for name in results["references"])

    def rows() -> Iterator[Sequence[str]]:
        for name in held:
            own = seeds(results, "references", name)
            cells = [span([100 * one[way] for one in own], "{:.1f}") for way in ("image_to_text", "text_to_image")]
            yield (name, str(len(own)), *cells)

    return table(("reference, fitted on held-out", "seeds", "image to text, %", "text to image, %"), rows())


MULTILINGUAL: Final = {"learnability": "multilingual/learnability", "easy-reference": "multilingual/easy-reference"}
HELD: Final = {f"{name}, floor 0.8": f"{key}/floor-0.8" for name, key in MULTILINGUAL.items()}
PEOPLE: Final = {"saw every style": "people/english", "saw no tones": "people/toneless"}
MENTIONS: Final = {name: f"{key}/mentions" for name, key in PEOPLE.items()}
BOOKS: Final = {"plain": "openstax", "floor 0.8": "openstax/floor-0.8"}
TABLES: Final[dict[str, Callable[[Results], str]]] = {
    "references": references,
    "audits": audits,
    "english": lambda found: over_seeds(found, MULTILINGUAL, "english"),
    "locales": lambda found: over_seeds(found, MULTILINGUAL | HELD, "locale"),
    "scripts": lambda found: one_audit(found, "multilingual/learnability", ("english", "caption script")),
    "prices": lambda found: prices(found, MULTILINGUAL),
    "copies": lambda found: by_seed(found, MULTILINGUAL | {"without near copies": "copies/near"}, "near-duplicates"),
    "learnable": lambda found: by_seed(found, MULTILINGUAL | {"without near copies": "copies/near"}, "tone"),
    "tones": lambda found: over_seeds(found, PEOPLE | {"no tones, floor 0.8": "people/toneless/floor-0.8"}, "tone"),
    "genders": lambda found: over_seeds(found, PEOPLE, "gender"),
    "crossed": lambda found: over_seeds(found, PEOPLE, "tone & gender"),
    "defaults": lambda found: one_audit(found, "people/english", ("default",)),
    "agreement": agreement,
    "mentions": lambda found: over_seeds(found, MENTIONS, "gender"),
    "training": training,
    "books": lambda found: one_audit(found, "openstax", ("book", "kind")),
    "kinds": lambda found: over_seeds(found, BOOKS, "kind"),
    "subjects": lambda found: over_seeds(found, BOOKS, "book"),
}


def placed(page: str, results: Results) -> str:
    """The page with each table between its marks. Errors: KeyError for a mark without a table."""

    def put(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]](results)}\n{found[3]}"

    return re.sub(r"(<!-- (\w+) -->).*?(<!-- end -->)", put, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--write", action="store_true", help="into README.md beside this file")
    args = parser.parse_args()
    results, page = json.loads(args.results.read_text()), HERE / "README.md"
    if args.write:
        page.write_text(placed(page.read_text(), results))
        return
    for name, make in TABLES.items():
        try:
            print(f"## {name}\n\n{make(results)}\n")
        except (KeyError, IndexError) as error:
            print(f"## {name}\n\nnot there yet: {error}\n")


if __name__ == "__main__":
    main()
