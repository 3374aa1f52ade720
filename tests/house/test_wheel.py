"""The wheel and the sdist: what they carry, and that the wheel works where no checkout is in sight."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib, pathlib, sys
import curate
root = pathlib.Path(sys.argv[1])
assert pathlib.Path(curate.__file__).is_relative_to(root), curate.__file__
assert [pathlib.Path(entry) for entry in curate.__path__] == [root / "curate"], list(curate.__path__)
for path in sorted((root / "curate").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "triton":  # what Triton compiles imports it, and nothing else imports that
            continue
        raise
    assert pathlib.Path(module.__file__) == path, (name, module.__file__)
    print(name)
"""


@dataclass(frozen=True, slots=True)
class Built:
    """Both distributions of the checkout, and the wheel that its sdist gives."""

    wheel: Path
    sdist: Path
    again: Path

    @property
    def in_sdist(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}


def in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def build(source: Path, target: str, folder: Path) -> Path:
    """Build with hatchling itself, as pip would have it do, but without an environment of its own."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    sdist = build(ROOT, "sdist", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return Built(build(ROOT, "wheel", folder / "wheel"), sdist, build(source, "wheel", folder / "again"))


@pytest.fixture(scope="module")
def unpacked(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(folder)
    return folder


def run_there(unpacked: Path, cwd: Path, *arguments: str) -> str:
    """Run Python with the unpacked wheel first on its path: an editable install comes after it."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_carries_the_three_floors_as_one_package(built: Built) -> None:
    """Modules, word lists, templates and C++ sources are under curate/, nothing else is, no `kernels` is at the top."""
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "curate").rglob("*.py")} | {"curate/py.typed"}
    data = [path for kind in ("*.yaml", "*.html", "*.css", "*.js") for path in (ROOT / "curate").rglob(kind)]
    expected |= {path.relative_to(ROOT).as_posix() for path in data}
    carried = [path for floor in ("kernels", "pipelines") for path in (ROOT / floor).rglob("*.py")]
    carried += [path for kind in ("*.cpp", "*.hpp", "README.md") for path in (ROOT / "kernels").rglob(kind)]
    expected |= {f"curate/{path.relative_to(ROOT).as_posix()}" for path in carried}
    assert {name for name in in_wheel(built.wheel) if name.startswith("curate/")} == expected
    (information,) = {name.split("/")[0] for name in in_wheel(built.wheel)} - {"curate"}
    assert information.startswith("curate_multimodal-")
    assert information.endswith(".dist-info")


def test_the_sdist_gives_the_same_wheel(built: Built) -> None:
    """A wheel built from the sdist carries the same files as one built from the checkout."""
    assert in_wheel(built.again) == in_wheel(built.wheel)


def test_the_sdist_carries_source_tests_and_examples_only(built: Built) -> None:
    """The sdist has what is needed to build and to test, and nothing that a build or a run left in the checkout."""
    needed = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "curate/__init__.py"}
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert needed - built.in_sdist == set()
    left = {name for name in built.in_sdist if "__pycache__" in name or name.endswith((".pyc", ".tar", ".parquet"))}
    assert left == set()
    assert {name.split("/")[0] for name in built.in_sdist} & {"demo", ".venv", "shared", "dist", ".git"} == set()


def test_every_module_of_the_wheel_imports(unpacked: Path, tmp_path: Path) -> None:
    """With the wheel's content first on the path, every module comes from it, kernels and pipelines included."""
    names = run_there(unpacked, tmp_path, "-c", IMPORT_ALL, str(unpacked)).split()
    assert {"curate.cli", "curate.kernels.selection.plain", "curate.pipelines.runner"} <= set(names)


def test_the_kernels_of_the_wheel_compile(unpacked: Path, tmp_path: Path) -> None:
    """The C++ sources are where the wheel's own code looks for them: a layer compiles, or there is no compiler."""
    code = "from curate.kernels import compiled; print(compiled.why_not('fff/path.cpp'))"
    assert run_there(unpacked, tmp_path, "-c", code).strip() in ("None", "no C++ compiler is on PATH")


def test_the_command_line_of_the_wheel_answers(unpacked: Path, tmp_path: Path) -> None:
    """`python -m curate.cli --version` prints the version that the wheel's name has."""
    version = run_there(unpacked, tmp_path, "-m", "curate.cli", "--version").strip()
    assert (unpacked / f"curate_multimodal-{version}.dist-info").is_dir()
