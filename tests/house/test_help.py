"""`--help` of every verb: quick, without torch, with an example that parses; and the list of verbs and flags."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from curate.cli import app

ENGINE = "--workers --scheduler --engine --allow-remote-scheduler"
SELECTION = "--keep --sub-batch --super-batch --chunks --criterion --gain --loss --seed --deduplicate"

# A new flag is a decision: it is written here too.
FLAGS = {
    "demo": "--output -o --samples --steps --learning --seed --overwrite --json",
    "doctor": "--json",
    "inspect": "SHARDS --decode --json",
    "score": f"SHARDS --output -o --reference --learner {SELECTION} --trusted --trusted-size --policy --labels --on "
    "--precision --batch-size "
    f"--samples-per-shard --tolerance --reference-cache --scores-only --dry-run --overwrite --json {ENGINE}",
    "select": f"OUT --output -o {SELECTION} --policy --labels --on --no-policy --json {ENGINE}",
    "write": f"OUT --output -o --samples-per-shard --tolerance --json {ENGINE}",
    "verify": "OUT --load --no-load --json",
    "explain": "OUT KEY --sheet --json",
    "audit": "OUT --selected --labels --on --least-match --label-error --lexicon --attributes --columns --intersect "
    f"--confounder --clusters --policy --output -o --seed --json {ENGINE}",
    "evaluate": "CHECKPOINT --zeroshot --retrieval --classes --templates --label --pool --precision --batch-size "
    "--json",
    "probe": "SHARDS --estimator --model --tangents --rules --batch --seeds --loss --seed --json",
    "run": f"RECIPE --output -o --set --dry-run --overwrite --json {ENGINE}",
    "train": "SHARDS --output -o --model --reference --criterion --filter-ratio --batch --steps --epochs --loss --gain "
    "--chunks --handover --trusted --watch-every --scoring --lag --lr --weight-decay --warmup --augment --ffn "
    "--ffn-depth --ffn-leaf-width --estimator --tangents --rules --estimator-workers --precision --seed --eval "
    "--eval-shards --zeroshot --zeroshot-label --eval-every --checkpoint-every --label --clean --policy --labels "
    "--on --write-shards "
    "--baseline --grams-per-kwh --reference-cache "
    f"--overwrite --json {ENGINE}",
}
VERBS = sorted(FLAGS)
CALLS = [("--help",), ("--version",), *((verb, "--help") for verb in VERBS)]
HEAVY = "torch numpy pandas pyarrow dask distributed open_clip webdataset PIL faiss pydantic yaml"

# Processor time, not wall time: another process on the machine must not fail this.
SHOW_HELP = f"""
import json, sys, time
from curate.cli import main
code = main(sys.argv[1:])
loaded = [name for name in {HEAVY!r}.split() if name in sys.modules]
print(json.dumps({{"code": code, "loaded": loaded, "seconds": time.process_time()}}), file=sys.stderr)
"""


@cache
def shown_help(*arguments: str) -> tuple[str, dict[str, Any]]:
    """What `curate ARGUMENTS` prints in a process of its own, and what that cost."""

    done = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *arguments],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "COLUMNS": "160", "NO_COLOR": "1"},
    )  # fmt: skip
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


def example(verb: str) -> list[str]:
    """The arguments of the command in the verb's help."""
    lines = [line.strip() for line in app[verb].help.splitlines() if line.strip().startswith("Example: curate ")]
    assert len(lines) == 1
    return shlex.split(lines[0].removeprefix("Example: curate "))


def test_the_verbs_are_these() -> None:
    """A new verb is a decision: it is written here too."""
    assert sorted(name for name in app if not name.startswith("-")) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_the_flags_are_these(verb: str) -> None:
    """The flags and positional arguments of each verb, in the order of its help."""
    arguments = app[verb].assemble_argument_collection()
    assert [name for argument in arguments for name in argument.names if name != "*"] == FLAGS[verb].split()


@pytest.mark.parametrize("arguments", CALLS, ids=" ".join)
def test_help_is_quick_and_loads_no_library(arguments: tuple[str, ...]) -> None:
    """Help answers with less than two seconds of processor time and imports none of the heavy libraries."""
    text, cost = shown_help(*arguments)
    assert cost["code"] == 0
    assert cost["loaded"] == []
    assert cost["seconds"] < 2
    assert text.strip()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example_that_parses(verb: str) -> None:
    """The help of each verb has one line `Example: curate VERB ...` whose arguments the command line accepts."""
    arguments = example(verb)
    assert arguments[0] == verb
    assert "Example: curate " + verb in shown_help(verb, "--help")[0]
    command, bound, *_ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    assert command is app[verb].default_command
    assert bound.arguments or len(arguments) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_explained_or_named_like_what_it_is(verb: str) -> None:
    """The help shows every flag of the verb."""
    text, _ = shown_help(verb, "--help")
    assert [flag for flag in FLAGS[verb].split() if flag not in text] == []


def test_the_top_help_lists_every_verb() -> None:
    """`curate --help` names every verb with a sentence."""
    text, _ = shown_help("--help")
    assert [verb for verb in VERBS if f" {verb} " not in text] == []
