"""Types of options that several verbs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

Flag = Annotated[bool, Parameter(negative="")]  # without a --no- twin: it is off unless given
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON value on standard output.")]
Shards = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]
Output = Annotated[Path, Parameter(name=["--output", "-o"], help="The directory that is written.")]
To = Annotated[Path | None, Parameter(name=["--output", "-o"], help="Write there, and leave OUT as it is.")]


@Parameter(name="*")
@dataclass(frozen=True)
class EngineOptions:
    """Where the work runs.

    Parameters
    ----------
    workers
        Units of work at the same time on this machine; up to 4 are threads of this process, more are processes.
    scheduler
        Address of a running Dask scheduler (tls://host:port, or tcp:// on loopback); its workers need to see the
        same paths.
    engine
        inline: no Dask at all. threads: one process. processes: one process per worker.
    allow_remote_scheduler
        Accept a tcp:// scheduler beyond loopback; its protocol lets whoever reaches it run code.
    """

    workers: Annotated[int | None, Parameter(group="Engine")] = None
    scheduler: Annotated[str | None, Parameter(group="Engine")] = None
    engine: Annotated[Literal["inline", "threads", "processes"] | None, Parameter(group="Engine")] = None
    allow_remote_scheduler: Annotated[bool, Parameter(group="Engine", negative="")] = False


LOCAL = EngineOptions()
