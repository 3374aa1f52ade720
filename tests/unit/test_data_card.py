"""The data card and the Croissant file of made-up runs: complete, valid, the same every time, and safe to read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from curate.auditing.audit import audit_columns
from curate.formats.img2dataset import SIDECAR_SCHEMA
from curate.marked_yaml import parse_yaml
from curate.policy.certificate import certificate
from curate.policy.price import Price
from curate.policy.quotas import State
from curate.policy.schema import check_policy
from curate.provenance import Findings, Lineage
from curate.provenance.croissant import MEANINGS, MOST_INPUTS, croissant
from curate.provenance.data_card import MOST_INPUTS as MOST_ROWS
from curate.provenance.data_card import data_card
from curate.provenance.keeping import carried_findings, is_ours
from curate.provenance.lineage import MOST_SENTENCES, audited_state
from curate.provenance.markdown import LONGEST, code, sentence, shortened, table, text
from curate.reporting.markup import visible

HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://evil.example/p.png)",
    "[click](javascript:alert(1))",
    "a | b \\| c \\\\| d",
    "``` \n# heading\n---",
    "1. one",
    "- item",
    "<!-- hidden -->",
    "&lt;b&gt; *bold* _it_ ~~gone~~ $x$ `code`",
    "<https://evil.example>",
    "\u202ereversed\x00\x1b[31m",
    "\udcff lone",
]
POLICY = """
schema: 1
author: A. <b>Expert</b>
date: 2026-11-20
rationale: "Filters drop captions | that mention women."
columns:
  - {column: gender, source: "lexicon gender-en", groups: [woman, man], min_ratio: 0.8, overlapping: true}
"""


def as_html(card: bytes) -> str:
    """The card as CommonMark with tables makes it, raw HTML let through as on a careless site."""
    body = card.decode().split("---\n", 2)[2]
    return str(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body))


def made(**changes: Any) -> Lineage:
    """A small run: two inputs, one of them cut, one shard."""
    settings = {"score": {"reference": "r"}, "select": {"criterion": "learnability", "seed": 7}, "write": {}}
    model = dict.fromkeys(("architecture", "checkpoint", "preprocessing", "tokenizer"), "ab12" * 16)
    inputs = tuple(
        {"url": f"in/{at}.tar", "sha256": f"{at:064x}", "rows": 6, "kept": 2, "dropped": 3, "quarantined": 1, "flaw": f}
        for at, f in enumerate([None, "tar-truncated at byte 9"])
    )
    lineage = Lineage(
        tool="0.1.0",
        settings=settings,
        models={"reference": model | {"name": "ViT-B-32", "precision": "fp32"}},
        counts={"in": 12, "kept": 4, "dropped": 6, "quarantined": 2},
        reasons={"caption-missing": 2, "not-selected": 6, "selected": 4},
        inputs=inputs,
        shards=({"name": "00000.tar", "sha256": "c" * 64, "size": 10240, "samples": 4},),
        digests={"00000.tar": "c" * 64, "00000.parquet": "d" * 64},
        chosen=None,
        certificate=None,
        findings=None,
    )
    return replace(lineage, **changes)


@cache
def audited() -> Findings:
    random = np.random.default_rng(0)
    audit = audit_columns({"tone": random.choice(["dark", "light"], 400)}, random.random(400) < 0.2, placebos=1)
    return Findings.of(audit)


def found(**changes: Any) -> Findings:
    return replace(audited(), **changes)


def signed() -> dict[str, Any]:
    policy = check_policy(parse_yaml(POLICY, "p.yaml"))
    state = State(tuple(bound.name for bound in policy.bounds), (50, 60), (8, 12), pool=200, chosen=40, draws=2)
    return certificate(policy, state, conflicts=["gender=woman: short by 1"], price=Price(10.0, 12.0, 40))


def test_every_number_of_the_run_is_on_the_card() -> None:
    """Counts by status and reason, digests of inputs and checkpoints, flaws, settings and seed are all said."""
    said = data_card(made()).decode()
    for fact in ("4 of 12", "| quarantined | 2 |", "| not-selected | 6 |", "ab12" * 16, f"{1:064x}", "at byte 9"):
        assert fact in said
    assert '"seed": 7' in said
    assert "with seed 7" in said
    assert "Not audited" in said
    assert "Licence: unknown" in said
    assert "Drawn without a policy" in said


def test_the_same_run_gives_the_same_bytes() -> None:
    """Nothing but the lineage enters, and the order of a dictionary does not."""
    backwards = dict(reversed(made().settings.items()))
    for make in (data_card, croissant):
        assert make(made()) == make(made(settings=backwards))
        assert make(made()) != make(made(tool="0.2.0"))


@pytest.mark.parametrize("samples", [4, 1000, 5 * 10**9])
def test_the_front_matter_is_what_the_hub_reads(samples: int) -> None:
    """It is YAML of known fields, with the licence unknown and patterns that match shards alone."""
    shards = tuple({**made().shards[0], "name": name, "samples": samples} for name in ("99999.tar", "100000.tar"))
    card = data_card(made(shards=shards)).decode()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert DatasetCard(card).data.license == matter["license"] == "unknown"
    path = matter["configs"][0]["data_files"][0]["path"]
    assert path == ["[0-9]" * 5 + ".tar", "[0-9]" * 6 + ".tar"]
    assert matter["size_categories"] == [{4: "n<1K", 1000: "1K<n<10K", 5 * 10**9: "n>1B"}[samples]]


def named(name: str) -> Lineage:
    """A run in which everything that has a name bears this one."""
    summary = found(sentences=(name,), notes=(name,), report=name, verdict={"result": name, "conflict": name})
    certified = signed()
    certified["groups"][0] |= {"group": name, "reason": name}
    certified["policy"] |= {"author": name, "rationale": name}
    return made(
        settings={**made().settings, "score": {"reference": name}},
        models={"reference": {**made().models["reference"], "name": name}},
        inputs=({**made().inputs[0], "url": name, "flaw": name},),
        digests={**made().digests, "certificate.json": "e" * 64},
        findings=replace(summary, columns=({**summary.columns[0], "name": name, "provenance": name},)),
        certificate=certified,
    )


def tags(html: str) -> list[str]:
    return re.findall(r"<[a-z/!][^>]*>", html, re.IGNORECASE)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_stay_text(name: str) -> None:
    """No name of a file, model, label or person makes an element, a link or a cell; it is shown as it is."""
    html = as_html(data_card(named(name)))
    assert tags(html) == tags(as_html(data_card(named("plain"))))
    shown = MarkdownIt("zero").render(visible(name)).removeprefix("<p>").removesuffix("</p>\n").strip()
    assert html.count(f">{shown}</td>") == 7
    assert "\n".join(json.loads(croissant(named(name)))["rai:dataBiases"]).count(visible(name)) == 3


def test_escaping_by_kind_of_place() -> None:
    """Each of these is how the characters of Markdown look once they mean nothing."""
    assert text("1. x") == r"1\. x"
    assert text("0.62 (0.55-0.70)") == "0.62 (0.55-0.70)"
    assert text("http://a.b www.c.d") == r"http\://a.b www\.c.d"
    assert text("# x") == r"\# x"
    assert text("-1") == r"\-1"
    assert code("`` x") == "``` `` x ```"
    assert code("") == "` `"
    assert table(("a", "b"), [("1", "2")], right=(1,)) == ["| a | b |", "| --- | ---: |", "| 1 | 2 |"]
    assert len(shortened("x" * 10**6)) == LONGEST
    assert len(sentence("x" * 10**6)) == 4_000


def test_the_policy_and_its_price_are_told() -> None:
    """Author, rationale, date, bounds, the certificate's rows, conflicts and the price stand on the card."""
    digests = {**made().digests, "certificate.json": "e" * 64}
    run = made(certificate=signed(), digests=digests)
    said = data_card(run).decode()
    assert "> Filters drop captions \\| that mention women." in said
    assert "2026-11-20" in said
    assert "| gender | woman | min ratio 0.8 | lexicon gender-en |" in said
    assert "| gender=woman | 50 | 8 |" in said
    assert "1 of 2 draws could not meet every bound" in said
    assert "0.05 of the score per pair" in said
    pinned = {"select": {"criterion": "learnability", "policy": {"text": "schema: 1"}}}
    assert "no certificate is kept here" in data_card(made(settings=pinned)).decode()
    assert "certificate.json" in {one["name"] for one in json.loads(croissant(run))["distribution"]}


def test_findings_are_told_with_what_they_rest_on() -> None:
    """The audit's sentences, how many more there are, coverage of its columns and the verdict are on both."""
    summary = found(left_out=12, verdict={"result": "violated", "conflict": ""}, notes=("labels: 99 % matched",))
    assert Findings.from_json(json.loads(json.dumps(summary.as_json()))) == summary
    run = made(findings=summary)
    said, machine = data_card(run).decode(), json.loads(croissant(run))
    assert "Not audited" not in said
    assert "and 12 more sentences" in said
    assert "**violated**" in said
    assert "| tone | " in said
    assert {*summary.sentences, *summary.notes} <= set(machine["rai:dataBiases"])


def test_a_thousand_flagged_groups_are_cut() -> None:
    """The summary of an audit keeps the first sentences and counts the rest."""
    random = np.random.default_rng(0)
    label_N = random.integers(0, 200, 4000)
    audit = audit_columns({"place": label_N}, random.random(4000) < np.where(label_N < 100, 0.9, 0.05), placebos=1)
    summary = Findings.of(audit)
    assert len(summary.sentences) == MOST_SENTENCES
    assert summary.left_out > 0


def test_a_training_is_described_as_one() -> None:
    """What a training chose names its steps and the digest of its log."""
    said = data_card(made(chosen={"log": "f" * 64, "samples": 96, "steps": 12})).decode()
    assert "96 choices that a training made in 12 steps" in said
    assert "f" * 64 in said
    assert "curate train --write-shards" in said


def test_an_empty_selection_has_papers_too() -> None:
    """Without a shard there is nothing to load, no pattern and no record set, and both files are valid."""
    run = made(shards=(), counts={"in": 0, "kept": 0, "dropped": 0, "quarantined": 0}, reasons={}, inputs=())
    card = data_card(run).decode()
    assert "nothing to load" in card
    assert "configs" not in yaml.safe_load(card.split("---\n")[1])
    assert json.loads(croissant(run))["distribution"] == []


def test_very_many_inputs_are_counted_not_listed() -> None:
    """The card shows twenty input shards and Croissant a thousand; both say how many more there are."""
    inputs = tuple({**made().inputs[0], "url": f"{at}.tar"} for at in range(MOST_INPUTS + 5))
    run = made(inputs=inputs)
    assert f"and {MOST_INPUTS + 5 - MOST_ROWS:,} more" in data_card(run).decode()
    sources = json.loads(croissant(run))["prov:wasDerivedFrom"]
    assert len(sources) == MOST_INPUTS + 1
    assert sources[-1]["name"].startswith("5 more input shards")


def test_every_column_of_the_sidecar_has_a_meaning() -> None:
    """A column that is added to the sidecar is described here too."""
    assert list(MEANINGS) == SIDECAR_SCHEMA.names


def test_findings_hold_for_one_selection_only(tmp_path: Path) -> None:
    """A manifest takes over the findings of an earlier one of the same units and shards, and of no other."""
    manifest = {"receipts": ["score-1"], "shards": [{"sha256": "a" * 64}]}
    audit = {"of": audited_state(manifest), "findings": found().as_json()}
    path = tmp_path / "manifest.json"
    assert carried_findings(path, manifest) == {}
    path.write_text(json.dumps(manifest | {"audit": audit}))
    assert carried_findings(path, manifest) == {"audit": audit}
    assert carried_findings(path, manifest | {"receipts": ["score-2"]}) == {}
    assert carried_findings(path, manifest | {"shards": [{"sha256": "b" * 64}]}) == {}
    path.write_text("cut off")
    assert carried_findings(path, manifest) == {}


def test_a_policys_text_is_not_repeated_in_the_settings(tmp_path: Path) -> None:
    """The settings name the policy by its digest; a file without the mark is somebody's own."""
    from curate.provenance.lineage import _without_text

    settings = _without_text({"select": {"policy": {"text": "schema: 1", "labels": None}}, "write": {}})
    assert set(settings["select"]["policy"]) == {"labels", "sha256"}
    assert is_ours(tmp_path / "none")
    (tmp_path / "README.md").write_text("my own words")
    assert not is_ours(tmp_path / "README.md")
    (tmp_path / "README.md").write_bytes(data_card(made()))
    assert is_ours(tmp_path / "README.md")
