"""The audit study: its page says what its results say, its policies are policies, and it runs on a few real samples."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from curate.policy.schema import read_policy
from tests.making import data_root

STUDY = Path(__file__).parents[2] / "examples" / "audit"
NEVER = re.compile(r"\b(fair|unfair|unbiased|compliant|no bias)\b", re.IGNORECASE)


def module(name: str) -> ModuleType:
    """One of the study's scripts."""
    spec = importlib.util.spec_from_file_location(f"audit_study_{name}", STUDY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STUDY / "results.json").read_text())
    return found


def run(script: str, *arguments: str | Path) -> list[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(STUDY / script), *map(str, arguments)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_tables_of_the_page_are_those_of_the_results() -> None:
    """Every table in README.md is the one that tables.py makes of results.json, and none is left out."""
    tables, page = module("tables"), (STUDY / "README.md").read_text()
    assert tables.placed(page, results()) == page
    assert set(re.findall(r"<!-- (\w+) -->", page)) == {*tables.TABLES, "end"}


def test_page_keeps_to_the_wording_and_shows_its_figures() -> None:
    """No verdict on a selection is spoken, and each figure of the page is there and small."""
    page = (STUDY / "README.md").read_text()
    assert NEVER.findall(page) == []
    figures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert figures
    assert all((STUDY / name).stat().st_size < 200_000 for name in figures)


@pytest.mark.parametrize("path", sorted((STUDY / "policies").glob("*.yaml")), ids=lambda path: path.stem)
def test_policies_are_read(path: Path) -> None:
    """Each policy of the study is a policy, with floors of 0.8."""
    policy = read_policy(path)
    assert {float(bound.min_ratio or 0) for bound in policy.bounds} == {0.8}


def test_results_agree_within_themselves() -> None:
    """In every audit no group keeps more than it has, and disjoint groups add up to the pool's known part."""
    for key, found in results()["audits"].items():
        for name in ("locale", "tone", "book"):
            rows = found["columns"].get(name, {"groups": {}})["groups"].values()
            assert all(0 <= row["kept"] <= row["n"] for row in rows), key
            assert sum(row["n"] for row in rows) in (0, found["pool"]), key


@pytest.mark.data
def test_pools_hold_what_the_study_says(tmp_path: Path) -> None:
    """Captions in twelve locales over the same images, labels beside; held-out emoji share no base with the pool."""
    pools, data = module("pools"), data_root()
    items = list(pools.emoji(data, ("train",), styles=("blob",), locales=pools.LOCALES, seed=0))
    pools.write_pool(tmp_path / "pool", items, 300)
    with open(tmp_path / "pool" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 300
    assert {row["locale"] for row in rows} == set(pools.LOCALES)
    held = {item.facts["base"] for item in pools.emoji(data, pools.HELD, styles=("blob",))}
    assert not held & {item.facts["base"] for item in items}
    assert not held & {item.facts["base"] for item in pools.emoji(data, ("train",), styles=("openmoji",))}


@pytest.mark.data
@pytest.mark.slow
def test_textbooks_are_audited_and_drawn_again(tmp_path: Path) -> None:
    """A few steps and samples: reference, scores, audit, policy, audit; a second call only reads, tables are made."""
    words = (data_root(), tmp_path / "runs", "openstax", "--samples", "250", "--steps", "2")
    found = tmp_path / "results.json"
    lines = run("study.py", *words, "--results", found)
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == ["openstax/0", "openstax/floor-0.8/0"]
    assert run("study.py", *words, "--results", found) == []
    held = json.loads(found.read_text())["certificates"]["openstax/floor-0.8/0"]
    assert all(row[2] >= row[1] for row in held["groups"].values())
    assert any(line.startswith("| kind: figure | ") for line in run("tables.py", "--results", found))
