"""`README.md` of a written dataset: what it is, where it came from, whom it may leave out, and what nobody knows.

The front matter is what the Hugging Face hub and `datasets` read: which files are the data, and that the licence is not
known. Nothing here is a verdict; wording as in `curate.auditing.sentences`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from curate.formats.openclip import shard_pattern, train_command
from curate.provenance.limits import UNKNOWN, limits
from curate.provenance.lineage import Findings, Lineage
from curate.provenance.markdown import code, fenced_json, sentence, table, text
from curate.reasons import REASONS

MOST_INPUTS: Final = 20  # rows of the table; the manifest has all
_STATUSES: Final = ("kept", "dropped", "quarantined")
_SIZES: Final = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
                 (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))  # fmt: skip
_MARK: Final = (
    "<!-- Written by curate {tool} from the files beside it, and written anew by `curate select`, `write`, `audit` "
    "or a repeated run. Remove this line to keep words of your own: then curate leaves the file alone. -->"
)


def data_card(lineage: Lineage) -> bytes:
    """The whole file, UTF-8, ending in a newline."""
    parts: tuple[Callable[[Lineage], Iterator[str]], ...] = (
        _front_matter, _head, _counts, _findings, _policy, _origin, _loading, _limits, _unknown, _files,
    )  # fmt: skip
    return ("\n".join(line for part in parts for line in part(lineage)) + "\n").encode()


def _front_matter(lineage: Lineage) -> Iterator[str]:
    yield from ("---", "license: unknown", f"pretty_name: curate selection {lineage.identity}")
    yield from ("size_categories:", f"- {_size_category(lineage.samples)}")
    yield from ("tags:", "- curate", "- image-text", "- webdataset")
    if lineage.shards:
        yield from ("configs:", "- config_name: default", "  data_files:", "  - split: train", "    path:")
        yield from (f"    - {json.dumps(pattern)}" for pattern in name_patterns(lineage, ".tar"))
    yield from ("---", _MARK.format(tool=lineage.tool), "")


def name_patterns(lineage: Lineage, suffix: str) -> list[str]:
    """Glob patterns of the shards' names with this suffix: digits only, so that no other file matches."""
    lengths = sorted({len(str(shard["name"]).removesuffix(".tar")) for shard in lineage.shards})
    return ["[0-9]" * length + suffix for length in lengths]


def _size_category(samples: int) -> str:
    return next((name for bound, name in _SIZES if samples < bound), "n>1B")


def _head(lineage: Lineage) -> Iterator[str]:
    kept, came = lineage.counts["kept"], lineage.counts["in"]
    share = f" ({kept / came:.1%})" if came else ""
    yield f"# {kept:,} of {came:,} image-text pairs, selected by curate"
    yield ""
    yield (
        f"{kept:,}{share} of the {came:,} pairs in {len(lineage.inputs):,} input shards, copied byte for byte into "
        f"{len(lineage.shards):,} WebDataset shards. {_how(lineage)}"
    )
    yield ""


def _how(lineage: Lineage) -> str:
    chosen, settings = lineage.chosen, lineage.selection
    criterion = f"by the criterion {code(settings['criterion'])}" if "criterion" in settings else "by its criterion"
    if chosen is not None:
        return (
            f"They are {chosen['samples']:,} choices that a training made in {chosen['steps']:,} steps {criterion}, in "
            "its order; a pair that was chosen often is there as often."
        )
    way = "in sub-batches of pairs that are learned together (Evans et al. 2024, arXiv 2406.17711)"
    if settings.get("criterion") == "alignment":
        way = "one by one"
    return f"They were drawn {criterion} {way}, with seed {text(settings.get('seed', 0))}."


def _counts(lineage: Lineage) -> Iterator[str]:
    yield from ("## What became of every pair", "")
    rows = [(status, f"{lineage.counts[status]:,}") for status in _STATUSES]
    yield from table(("status", "pairs"), [*rows, ("in all", f"{lineage.counts['in']:,}")], right=(1,))
    yield ""
    reasons = [(text(name), f"{count:,}", text(REASONS.get(name, ""))) for name, count in lineage.reasons.items()]
    yield from table(("reason", "pairs", "meaning"), reasons, right=(1,))
    yield from ("", "`_curate/ledger/` has every pair with its reason; `curate explain OUT KEY` looks one up.", "")


def _findings(lineage: Lineage) -> Iterator[str]:
    yield from ("## Whom it leaves out", "")
    if lineage.findings is None:
        yield "Not audited: nothing is known here of who or what this selection leaves out. `curate audit` measures it."
        yield ""
        return
    yield from _audited(lineage.findings)


def _audited(found: Findings) -> Iterator[str]:
    yield (
        f"An audit compared {found.selected:,} selected with {found.pool:,} pairs in {found.tests:,} tests (false "
        f"discovery rate {found.alpha:g}, seed {found.seed}). It speaks of associations in this selection, of mentions "
        "in captions and not of who is depicted."
    )
    yield ""
    yield from (f"- {sentence(one)}" for one in found.sentences)
    if found.left_out:
        yield f"- and {found.left_out:,} more sentences, in the audit's own files"
    yield from ("", *(f"- {sentence(one)}" for one in found.notes), *([""] if found.notes else []))
    if found.report:
        yield from (f"The whole report: {code(found.report)}.", "")
    columns = [
        (text(one["name"]), text(one["provenance"]), f"{one['coverage']:.1%}", f"{one['unknown_share']:.1%}")
        for one in found.columns
    ]
    yield from table(("groups of", "read from", "coverage", "not known"), columns, right=(2, 3))
    yield ""
    if found.verdict is not None:
        conflict = f": {sentence(found.verdict['conflict'])}" if found.verdict.get("conflict") else ""
        yield from (f"Checked against the policy: **{text(found.verdict['result'])}**{conflict}", "")


def _policy(lineage: Lineage) -> Iterator[str]:
    certificate = lineage.certificate
    if certificate is None:
        said = "Drawn without a policy: no group had a floor or a ceiling."
        if lineage.selection.get("policy"):
            said = "Drawn under a policy, of which no certificate is kept here; the settings name it."
        yield from ("## Policy", "", said, "")
        return
    policy = certificate["policy"]
    yield from ("## Policy", "", f"Drawn under the policy of {text(policy['author'])}, {text(policy['date'])}:", "")
    yield from (f"> {sentence(policy['rationale'])}", "")
    asked = [
        (text(column["column"]), text(group["name"]), text(_bounds(group)), text(column["source"]))
        for column in policy["columns"]
        for group in column["groups"]
    ]
    yield from (*table(("column", "group", "asked", "read from"), asked), "")
    yield from _certified(certificate)


def _bounds(group: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:,.15g}" for name, value in group.items() if name != "name")


def _certified(certificate: dict[str, Any]) -> Iterator[str]:
    rows = [
        (text(row["group"]), *(f"{row[name]:,}" for name in ("n", "L", "V", "C", "slack")), text(row["reason"]))
        for row in certificate["groups"]
    ]
    head = ("group", "in the pool", "at least", "at most", "chosen", "slack", "why")
    yield from (*table(head, rows, right=(1, 2, 3, 4, 5)), "")
    conflicts = certificate.get("draws_with_conflict", 0)
    draws = f"{conflicts:,} of {certificate['draws']:,} draws"
    yield f"{draws} could not meet every bound; `certificate.json` has all figures."
    price = certificate.get("price")
    if price:
        figure = price.get("given_up_per_member")
        given_up = "not known" if figure is None else f"{figure:.4g} of the score per pair"
        yield f"Given up against the draw without a policy: {given_up}."
    yield ""


def _origin(lineage: Lineage) -> Iterator[str]:
    yield from ("## Where it came from", "")
    yield from (f"Made by curate {text(lineage.tool)} (`{lineage.verb}`).", "")
    if lineage.chosen is not None:
        yield from (f"The training's log of choices has sha256 {code(lineage.chosen['log'])}.", "")
    yield from _models(lineage)
    rows = [
        (text(one["url"]), one["sha256"], f"{one['rows']:,}", *(f"{one[status]:,}" for status in _STATUSES),
         text(one["flaw"] or "none"))
        for one in lineage.inputs[:MOST_INPUTS]
    ]  # fmt: skip
    yield from table(("input shard", "sha256", "pairs", *_STATUSES, "flaw"), rows, right=(2, 3, 4, 5))
    more = len(lineage.inputs) - len(rows)
    yield from ("", f"and {more:,} more, in `_curate/manifest.json`.", "") if more else ("",)
    yield from ("Settings:", "", *fenced_json(lineage.settings), "")


def _models(lineage: Lineage) -> Iterator[str]:
    if not lineage.models:
        yield from ("No model's scores are stored with it.", "")
        return
    roles = sorted(lineage.models)
    facts = {"name": "name", "precision": "precision"}
    facts |= {name: f"sha256 of {name}" for name in ("checkpoint", "architecture", "preprocessing", "tokenizer")}
    rows = [(said, *(text(lineage.models[role][fact]) for role in roles)) for fact, said in facts.items()]
    yield from (*table(("model", *map(text, roles)), rows), "")


def _loading(lineage: Lineage) -> Iterator[str]:
    yield from ("## How to load it", "")
    if not lineage.shards:
        yield from ("Nothing was selected, so there is nothing to load.", "")
        return
    names = [str(shard["name"]) for shard in lineage.shards]
    pattern = shard_pattern(names)
    yield from ("In this directory:", "", "```python", "import curate, datasets, mlcroissant, webdataset", "")
    yield f'pairs = webdataset.WebDataset("{pattern}").decode("pil").to_tuple("jpg;png;webp", "txt")'
    yield 'pairs = datasets.load_dataset(".", split="train")'
    yield 'sub_batches = curate.SubBatches(".")  # the order and the batches that were drawn'
    yield 'records = mlcroissant.Dataset("croissant.json").records("samples")  # the sidecars, without the images'
    yield from ("```", "", "With a model of your choice for MODEL:", "", "```sh")
    yield from (train_command(".", names, lineage.samples, "MODEL"), "```", "")


def _limits(lineage: Lineage) -> Iterator[str]:
    yield from ("## Limits", "", *(f"- {sentence(one)}" for one in limits(lineage)), "")


def _unknown(_: Lineage) -> Iterator[str]:
    yield from ("## Not known", "", *(f"- {what}: {sentence(why)}" for what, why in UNKNOWN.items()), "")


def _files(lineage: Lineage) -> Iterator[str]:
    yield from ("## Files", "")
    yield "- `NNNNN.tar`: the pairs; `NNNNN.parquet`: one row a pair (key, caption, scores, original key and shard)"
    yield "- `NNNNN_stats.json`, `NNNNN.idx`, `sizes.json`, `shardindex.json`, `meta.json`: for the loaders"
    yield "- `croissant.json`: this card for machines, with the sha256 of every shard and sidecar"
    if lineage.certificate is not None:
        yield "- `certificate.json`: what the policy asked and what was drawn"
    yield "- `_curate/`: manifest, ledger of every input pair, receipts; `curate verify .` proves them and this card"
