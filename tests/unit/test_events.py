"""TensorBoard events, read back without the library that wrote them: framing and checksums, scalars, text, resuming."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curate.learner.events import EventWriter, write_events

STEP = {"kind": "step", "step": 3, "samples": 384, "loss": 2.5, "lr": 1e-3, "phase": "selecting", "clean": None,
        "chunk_scores": [1.5, 0.5, 0.25], "flops": 3.3e13}  # fmt: skip
EVAL = {"kind": "eval", "step": 4, "zeroshot": {"accuracy": 0.41}, "retrieval": None}


def crc32c(data: bytes) -> int:
    """CRC-32 of Castagnoli, bit by bit, masked as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frames(path: Path) -> Iterator[bytes]:
    """The payloads of a TFRecord file; both checksums of each are checked."""
    data = path.read_bytes()
    while data:
        (length,), (of_length,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        payload, (of_payload,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert (of_length, of_payload) == (crc32c(data[:8]), crc32c(payload))
        yield payload
        data = data[16 + length :]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer: integers, 8 and 4 bytes as floats, the rest as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if size is None else size
        raw, at = message[at : at + size], at + size
        yield key >> 3, struct.unpack({1: "<d", 5: "<f"}[key & 7], raw)[0] if key & 7 != 2 else raw


def events(folder: Path) -> list[dict[str, Any]]:
    """All events of a directory in TensorBoard's order: step, scalars by tag, other tags, and what else there is."""
    found = []
    for path in sorted(folder.iterdir()):
        for payload in frames(path):
            event = dict(fields(payload))
            scalars, others = {}, {}
            for number, value in fields(event.get(5, b"")):
                assert number == 1
                parts = dict(fields(value))
                (scalars if 2 in parts else others)[parts[1].decode()] = parts.get(2, parts.get(8))
            found.append({"step": event.get(2, 0), "scalars": scalars, "others": others, "version": event.get(3),
                          "session": dict(fields(event[7])).get(1) if 7 in event else None})  # fmt: skip
    return found


def test_records_become_scalars_at_their_step(tmp_path: Path) -> None:
    """Each number has its tag; null and unknown kinds leave nothing; the file begins with its version."""
    write_events([STEP, EVAL, {"kind": "unheard-of", "step": 5}], tmp_path / "tensorboard")
    version, step, evaluation = events(tmp_path / "tensorboard")
    assert version["version"] == b"brain.Event:2"
    assert step["step"] == 3
    assert step["scalars"] == {
        "train/loss": 2.5, "train/learning_rate": pytest.approx(1e-3), "cost/samples": 384.0,
        "cost/flops": pytest.approx(3.3e13), "selection/score_first_chunk": 1.5, "selection/score_last_chunk": 0.25,
    }  # fmt: skip
    assert (evaluation["step"], list(evaluation["scalars"])) == (4, ["eval/zeroshot_accuracy"])


def test_handovers_and_settings_are_text(tmp_path: Path) -> None:
    """The start's settings and a handover's reason can be read in the text tab; nothing in them is markup there."""
    start = {"kind": "start", "settings": {"model": "<script>", "lr": 0.1}}
    handover = {"kind": "handover", "step": 7, "from": "selecting", "to": "trimming", "why": "the learner is ahead"}
    write_events([start, handover], tmp_path)
    _, settings, moved = events(tmp_path)
    assert b"    model: <script>\n    lr: 0.1" in settings["others"]["settings/text_summary"]
    assert moved["step"] == 7
    assert b"    selecting to trimming: the learner is ahead" in moved["others"]["handover/text_summary"]


def test_the_end_stands_at_the_last_step(tmp_path: Path) -> None:
    """The record that ends a run has no step of its own."""
    write_events([STEP, {"kind": "end", "steps": 3, "loss": 2.4, "factor": 2.7, "seconds": 9.0}], tmp_path)
    last = events(tmp_path)[-1]
    assert (last["step"], set(last["scalars"])) == (3, {"end/loss", "end/factor_over_iid", "end/seconds"})


def test_a_resumed_run_goes_on_in_a_new_file(tmp_path: Path) -> None:
    """A second writer in the same second neither overwrites the first nor comes before it, and starts a session at the
    step that is done again."""
    for purge in (None, 3, 4):
        writer = EventWriter(tmp_path, purge_step=purge)
        writer.record(STEP)
        writer.close()
    assert len(list(tmp_path.iterdir())) == 3
    sessions = [(event["step"], event["session"]) for event in events(tmp_path) if event["session"]]
    assert sessions == [(3, 1), (4, 1)]  # 1: SessionLog.START, from which TensorBoard purges


def test_events_reach_the_file_while_the_run_goes_on(tmp_path: Path) -> None:
    """What was flushed can be read before the writer is closed."""
    writer = EventWriter(tmp_path)
    writer.record(STEP)
    writer.flush()
    assert len(events(tmp_path)) == 2
    writer.close()


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Where the file cannot grow, the writer fails with advice; it neither hangs nor goes on in silence."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from curate.errors import StorageError\n"
        "from curate.learner.events import EventWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); writer = EventWriter(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "try:\n"
        "    for step in range(300): writer.record({'kind': 'step', 'step': step, 'loss': 1.0})\n"
        "    writer.flush()\n"
        "except StorageError as error: print(error)\n"
        "import os; sys.stdout.flush(); os._exit(0)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env=os.environ, check=True)  # fmt: skip
    assert "the file-size limit is reached" in done.stdout, done.stdout + done.stderr
