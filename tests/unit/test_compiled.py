"""C++ on first use: kept between processes, keyed by what it depends on, and absent with a reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from curate.kernels import compiled

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler here"
)
SOURCE = 'extern "C" int answer(int x) { return x + 1; }\n'


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources and a cache of its own."""
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CURATE_NO_COMPILER", raising=False)
    monkeypatch.setattr(compiled, "_HERE", tmp_path / "kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "answer.cpp").write_text(SOURCE)
    compiled.build.cache_clear()
    yield tmp_path / "kernels"  # type: ignore[misc]
    compiled.build.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("kernels")
def test_a_source_is_compiled_once_and_found_again() -> None:
    """The first process pays for compiling; a later one finds the library."""
    first = compiled.build("answer.cpp")
    assert first.why_not is None
    assert first.seconds > 0
    library = compiled.library("answer.cpp")
    assert library is not None
    assert library.answer(41) == 42
    compiled.build.cache_clear()
    again = compiled.build("answer.cpp")
    assert (again.path, again.seconds) == (first.path, 0.0)


@needs_compiler
def test_another_source_header_or_flag_makes_another_library(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine code depends on is part of its name."""
    paths = set()
    for change in (
        lambda: None,
        lambda: (kernels / "answer.cpp").write_text(SOURCE.replace("+ 1", "+ 2")),
        lambda: (kernels / "shared.hpp").write_text("// a header\n"),
        lambda: monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DOTHER")),
        lambda: monkeypatch.setattr(compiled, "processor", lambda: "another processor"),
    ):
        change()
        compiled.build.cache_clear()
        paths.add(compiled.build("answer.cpp").path)
    assert len(paths) == 5


@needs_compiler
@pytest.mark.usefixtures("kernels")
def test_many_may_build_at_once() -> None:
    """Builders do not disturb each other: all find a whole library, and no half-made file stays."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: compiled.build.__wrapped__("answer.cpp"), range(4)))
    assert len({built.path for built in found}) == 1
    assert [path.suffix for path in compiled.cache_folder().iterdir()] == [".so"]


@needs_compiler
def test_a_source_that_does_not_compile_is_a_reason(kernels: Path) -> None:
    """The compiler's first error is the reason; nothing is raised."""
    (kernels / "answer.cpp").write_text("this is not C++\n")
    assert compiled.library("answer.cpp") is None
    assert "error" in (compiled.why_not("answer.cpp") or "")


def test_without_a_compiler_there_is_a_reason(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler on the PATH, or one forbidden, gives None and says which."""
    monkeypatch.setenv("PATH", str(kernels))
    monkeypatch.delenv("CXX", raising=False)
    assert compiled.library("answer.cpp") is None
    assert compiled.why_not("answer.cpp") == "no C++ compiler is on PATH"
    compiled.build.cache_clear()
    monkeypatch.setenv("CURATE_NO_COMPILER", "1")
    assert compiled.why_not("answer.cpp") == "CURATE_NO_COMPILER is set"


@needs_compiler
def test_an_unwritable_cache_is_a_reason(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache cannot be written the kernel is absent, with the system's reason."""
    blocked = kernels / "a-file"
    blocked.write_text("")
    monkeypatch.setenv("CURATE_CACHE", str(blocked / "cache"))
    assert compiled.library("answer.cpp") is None
    assert compiled.why_not("answer.cpp")


def test_layers_work_without_a_compiler(tmp_path: Path) -> None:
    """In a process that may not compile, both layers and a selection run on torch, forward and backward."""
    code = """
import torch
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.kernels.fff import native
assert not native.supports(torch.zeros(1))
for layer in (FastFeedforward(16, depth=2, leaf_width=4), PathFeedforward(16, depth=3)):
    y = layer(torch.randn(5, 16)); y.sum().backward()
    with torch.inference_mode(): assert torch.equal(layer(torch.zeros(2, 16))[0], layer(torch.zeros(2, 16))[1])
print("fine")
"""
    environment = {**os.environ, "CURATE_NO_COMPILER": "1", "CURATE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr[-2000:]
    assert done.stderr.count("run on torch's own products, several times slower than in C++: CURATE_NO_COMPILER") == 1


def test_threads_share_the_runtime_that_torch_brings() -> None:
    """Where torch brings its own OpenMP, kernels are linked to that one."""
    own = list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    flags = compiled._openmp()
    assert flags[0] == "-fopenmp"
    assert len(flags) == (2 if own else 1)
