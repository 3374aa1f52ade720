"""RUN/tensorboard: the records of log.jsonl as TensorBoard events, written as they come. A line takes some 0.2 ms.

tensorboardX gives the file format. Its queue and thread are left out: when the disk is full they would end silently and
leave training waiting for good, where a direct write fails with an error that says so. A resumed run writes a new file;
its first event tells TensorBoard to forget what earlier files hold from that step on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from curate.learner.report.history import Record, chunks_of, number, word
from curate.storage import make_directory, storage_errors

FLUSH_SECONDS: Final = 10.0
_STEP: Final = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "gain": "selection/gain",
    "keep": "selection/kept_share",
    "effective": "selection/effective_candidates",
    "clean": "selection/clean_share",
    "clean_pool": "selection/clean_share_of_candidates",
    "samples": "cost/samples",
    "candidates": "cost/candidates",
    "flops": "cost/flops",
    "seconds": "cost/seconds",
}
_LAG: Final = {"rank_correlation": "selection/lag_rank_correlation", "overlap": "selection/lag_overlap"}
_END: Final = {"loss": "end/loss", "factor": "end/factor_over_iid", "seconds": "end/seconds"}


class EventWriter:
    """Writes records as events into `directory`. `purge_step` is the first step that a resumed run does again.

    Numbers become scalars at the record's step; the start and handovers become text. What is null is left out. Example:
    `EventWriter(run / "tensorboard").record({"kind": "step", "step": 1, "loss": 3.1})`.
    """

    def __init__(self, directory: Path, *, purge_step: int | None = None) -> None:
        """Open a new file. Errors: StorageError."""
        from tensorboardX.event_file_writer import EventsWriter

        make_directory(directory)
        self._path, self._due, self._step = directory, 0.0, 0
        number_of_file = sum(1 for _ in directory.glob("events.out.tfevents.*"))
        with storage_errors(directory):
            # two files of one second need two names
            self._file = EventsWriter(str(directory / "events"), f".{number_of_file:05d}")
        if purge_step is not None:
            self._write(step=purge_step, session_log=_session_start())

    def record(self, line: Mapping[str, Any]) -> None:
        """Write what TensorBoard can show of a record of the log. Errors: StorageError."""
        kind, at = word(line, "kind") or "", number(line, "step")
        self._step = int(at) if at is not None and kind == "step" else self._step
        step = self._step if at is None else int(at)
        scalars = {tag: value for tag, value in _scalars(kind, line) if value is not None}
        if scalars:
            self._write(step=step, summary=_summary(scalars))
        for tag, text in _texts(kind, line):
            self._write(step=step, summary=_text(tag, text))
        if time.monotonic() >= self._due or kind == "end":
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system. Errors: StorageError."""
        with storage_errors(self._path):
            self._file.flush()
        self._due = time.monotonic() + FLUSH_SECONDS

    def close(self) -> None:
        """Flush and close the file. Errors: StorageError."""
        with storage_errors(self._path):
            self._file.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with storage_errors(self._path):
            self._file.write_event(Event(wall_time=time.time(), **fields))


def write_events(lines: Iterable[Mapping[str, Any]], directory: Path) -> None:
    """Write all records of a log. Example: `write_events(read_log(run / "log.jsonl"), run / "tensorboard")`."""
    writer = EventWriter(directory)
    try:
        for line in lines:
            writer.record(line)
    finally:
        writer.close()


def _scalars(kind: str, line: Record) -> Iterator[tuple[str, float | None]]:
    yield from _KINDS.get(kind, lambda _: iter(()))(line)


def _of_step(line: Record) -> Iterator[tuple[str, float | None]]:
    yield from ((tag, number(line, key)) for key, tag in _STEP.items())
    if chunks := chunks_of(line):
        yield "selection/score_first_chunk", chunks[0]
        yield "selection/score_last_chunk", chunks[-1]


def _of_watch(line: Record) -> Iterator[tuple[str, float | None]]:
    yield from ((f"watch/{side}_{key}", number(line, side, key)) for side in ("learner", "reference")
                for key in ("loss", "recall"))  # fmt: skip
    yield "watch/noise", number(line, "noise")


def _of_eval(line: Record) -> Iterator[tuple[str, float | None]]:
    yield "eval/zeroshot_accuracy", number(line, "zeroshot", "accuracy")
    yield "eval/retrieval_image_to_text", number(line, "retrieval", "image_to_text")
    yield "eval/retrieval_text_to_image", number(line, "retrieval", "text_to_image")


def _named(tags: Mapping[str, str]) -> Callable[[Record], Iterator[tuple[str, float | None]]]:
    return lambda line: ((tag, number(line, key)) for key, tag in tags.items())


def _of_quota(line: Record) -> Iterator[tuple[str, float | None]]:
    yield from ((f"policy/{key}", number(line, key)) for key in ("bound", "conflicts", "substitutes"))
    prices = line.get("given_up")
    for name in prices if isinstance(prices, Mapping) else ():
        yield f"policy/given_up_{name}", number(line, "given_up", name)


_KINDS: Final[Mapping[str, Callable[[Record], Iterator[tuple[str, float | None]]]]] = {
    "step": _of_step,
    "watch": _of_watch,
    "eval": _of_eval,
    "quota": _of_quota,
    "lag": _named(_LAG),
    "end": _named(_END),
}


def _texts(kind: str, line: Record) -> Iterator[tuple[str, str]]:
    """Markdown, of which TensorBoard shows no HTML; indented by four it is shown as it is."""
    if kind == "handover":
        yield "handover", f"    {word(line, 'from')} to {word(line, 'to')}: {word(line, 'why')}"
    settings = line.get("settings")
    if kind == "start" and isinstance(settings, Mapping):
        yield "settings", "\n".join(f"    {name}: {value}" for name, value in settings.items())


def _summary(scalars: Mapping[str, float]) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])


def _text(tag: str, text: str) -> Any:
    from tensorboardX.summary import text as summary_of

    return summary_of(tag, text)


def _session_start() -> Any:
    from tensorboardX.proto.event_pb2 import SessionLog

    return SessionLog(status=SessionLog.START)
