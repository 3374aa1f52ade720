"""What the README shows, run as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from curate.auditing.lexicons import shipped_lexicons
from curate.cli import app
from curate.policy.schema import read_policy
from tests.e2e.pools import check_run, make_pool

ROOT = Path(__file__).parents[2]
TEXTS = (ROOT / "README.md", ROOT / "examples" / "real_run" / "README.md")


def commands(text: Path) -> list[str]:
    """The indented `curate ...` lines of a page, continued lines joined."""
    joined = text.read_text().replace("\\\n", " ")
    return re.findall(r"^    (curate .+)$", joined, flags=re.MULTILINE)


def test_the_python_of_the_first_screen_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The six lines fit a reference, filter a pool and print what they say, on tiny shards."""
    make_pool(tmp_path / "clean", shards=1, samples=16, seed=1)
    make_pool(tmp_path / "shards", shards=2, samples=20)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "{'in': 40, 'kept': 8, 'dropped': 32, 'quarantined': 0}"
    assert printed[1].startswith("True python -m open_clip_train.main --train-data ")
    check_run(tmp_path / "filtered")


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.parent.name)
def test_every_command_line_is_one_that_curate_takes(text: Path) -> None:
    """Each `curate ...` line of the page parses, options and all."""
    found = commands(text)
    assert found
    for line in found:
        words = shlex.split(line.replace("$DATA", "data"))[1:]
        command, _, *_ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert command is app[words[0]].default_command, line


def test_the_policy_it_shows_is_one(tmp_path: Path) -> None:
    """The YAML of the README is a policy, with groups that the shipped word lists have."""
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "policy.yaml").write_text(text)
    policy = read_policy(tmp_path / "policy.yaml")
    [column] = policy.columns
    known = {group for lexicon in shipped_lexicons() for group in lexicon.sets[column.name].terms}
    assert {group.name for group in column.groups} <= known


def test_the_make_targets_it_names_exist() -> None:
    """`make demo` and `make test` are targets of the Makefile."""
    named = set(re.findall(r"make (\w+)", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named & targets
