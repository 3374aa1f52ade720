"""What `import curate` promises: a list of names, each with a description, none in the way of a module."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys

import pytest

import curate

PUBLIC = [
    "CurateError",
    "CurateWarning",
    "FastFeedforward",
    "FeedforwardConfig",
    "JointSelector",
    "PathFeedforward",
    "SelectionView",
    "SubBatches",
    "__version__",
    "audit",
    "demo",
    "doctor",
    "evaluate",
    "explain",
    "inspect",
    "plan",
    "probe",
    "replace_feedforward",
    "run",
    "score",
    "select",
    "train",
    "verify",
    "write",
]
NAMES = [name for name in PUBLIC if name != "__version__"]


def test_the_public_names_are_these() -> None:
    """A new public name is a decision: it is written here too."""
    assert sorted(curate.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(curate))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves_and_is_described(name: str) -> None:
    """Each name can be called, twice over, and says what it does."""
    assert callable(getattr(curate, name))
    assert callable(getattr(curate, name)), f"curate.{name} was replaced by a module while it was looked up"
    assert len((inspect.getdoc(getattr(curate, name)) or "").split()) >= 4


def test_no_public_name_is_the_name_of_a_module() -> None:
    """A module curate/X.py would take the place of the function `curate.X` as soon as anything imports it."""
    modules = {module.name for module in pkgutil.iter_modules(curate.__path__)}
    assert modules & set(PUBLIC) == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    """`curate.typo` fails as any module does, naming what was asked for."""
    with pytest.raises(AttributeError, match="no attribute 'typo'"):
        _ = curate.typo


def test_listing_the_names_loads_no_library() -> None:
    """`import curate` and `dir(curate)` import nothing outside the standard library."""
    code = (
        "import sys; before = set(sys.modules); import curate; dir(curate); curate.__all__; curate.__version__;"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['curate']"
