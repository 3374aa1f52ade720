"""Imports only go down: kernels < curate < pipelines < curate/cli; read from the syntax trees, nothing is run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for floor in ("kernels", "curate", "pipelines") for path in (ROOT / floor).rglob("*.py"))
# Above every floor: the command line calls whatever it likes, and the package looks its public names up when used.
TOP = ("curate/cli/", "curate/__init__.py")
MAY_IMPORT_IN_KERNELS = {"torch", "numpy", "triton", "curate.kernels"}


def imported(source: str, package: str) -> Iterator[str]:
    """Every module that a file of `package` imports, at its top or in a function, as an absolute name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def under(name: str, *floors: str) -> bool:
    return any(name == floor or name.startswith(f"{floor}.") for floor in floors)


def climbs(path: str, source: str) -> list[str]:
    """The imports of a file, named from the root of the repository, that go up."""
    folders = path.split("/")[:-1]
    names = set(imported(source, ".".join(folders if folders[0] == "curate" else ["curate", *folders])))
    if folders[0] == "kernels":
        allowed = {name for name in names if under(name, *MAY_IMPORT_IN_KERNELS)}
        return sorted(name for name in names - allowed if name.split(".")[0] not in sys.stdlib_module_names)
    if folders[0] == "pipelines":
        return sorted(name for name in names if under(name, "curate.cli", "tests", "examples"))
    above = ("curate.cli", "curate.pipelines", "pipelines", "kernels", "tests", "examples")
    return sorted(name for name in names if under(name, *above)) if not path.startswith(TOP) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    """No file imports from a floor above its own; kernels import torch, numpy, triton and the standard library only."""
    assert climbs(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/selection/plain.py", "import scipy.stats"),
        ("kernels/selection/plain.py", "from curate.errors import UsageError"),
        ("curate/ledger.py", "from curate.pipelines import passes"),
        ("curate/ledger.py", "def f():\n    from curate import cli"),
        ("curate/shards/samples.py", "from .. import pipelines"),
        ("curate/shards/samples.py", "from ..pipelines.engine import open_engine"),
        ("pipelines/engine.py", "import curate.cli"),
    ],
)
def test_a_planted_import_upwards_is_found(path: str, line: str) -> None:
    """The check above sees each way of importing upwards."""
    assert climbs(path, line) != []


def test_the_package_itself_imports_the_standard_library_only() -> None:
    """`import curate` runs nothing but the standard library, so that `curate --help` answers at once."""
    names = set(imported((ROOT / "curate" / "__init__.py").read_text(encoding="utf-8"), "curate"))
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_kernels_and_pipelines_are_no_packages_of_their_own() -> None:
    """Beside the checkout's root an `__init__.py` in kernels/ would shadow the registry's `kernels`."""
    assert [name for name in ("kernels", "pipelines") if (ROOT / name / "__init__.py").exists()] == []
    assert (ROOT / "kernels" / "selection" / "__init__.py").exists()


def test_nothing_is_named_like_a_library() -> None:
    """No module or folder bears the name of a library that the code imports, or of one that it may import later."""
    libraries = {"triton", "torch", "dask", "select", "kernels", "faiss", "numpy"}
    for path in FILES:
        libraries |= {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"), "curate")}
    libraries -= {"curate"}
    parts = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts[1:]}
    assert parts & libraries == set()
