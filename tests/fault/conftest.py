"""What the tests of faults share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.fault.forking import ForkServer


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Command lines of curate in processes of their own."""
    if sys.platform != "linux":
        pytest.skip("reads /proc, and forks a process that has imported torch")
    server = ForkServer(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()
