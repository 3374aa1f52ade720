"""The side files, held against what the tools' own sources say they read."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest

from curate.errors import UsageError
from curate.formats import dali, datacomp, img2dataset, openclip, wids

LOW, HIGH = "0" * 31 + "7", "f" * 32


def test_output_key_has_nine_digits() -> None:
    """A key is shard * 10^4 + index in nine digits."""
    assert img2dataset.output_key(7, 42) == "000070042"
    assert int(img2dataset.output_key(12, 9999)) == 12 * 10**4 + 9999


@pytest.mark.parametrize(("shard", "index"), [(0, 10_000), (0, -1), (-1, 0)])
def test_output_key_refuses_a_shared_key(shard: int, index: int) -> None:
    """An index that would run into the next shard's keys is refused."""
    with pytest.raises(UsageError, match=r"0\.\.9999"):
        img2dataset.output_key(shard, index)


def test_stats_have_img2dataset_keys() -> None:
    """The stats hold exactly img2dataset's eight keys, and nothing that differs between runs."""
    stats = img2dataset.stats(5)
    assert list(stats) == [
        "count", "successes", "failed_to_download", "failed_to_resize",
        "duration", "start_time", "end_time", "status_dict",
    ]  # fmt: skip
    assert stats["count"] == stats["successes"] == stats["status_dict"]["success"] == 5
    assert stats["start_time"] == stats["end_time"] == stats["duration"] == 0
    assert img2dataset.stats(0)["status_dict"] == {}


def test_sidecar_starts_with_img2dataset_columns() -> None:
    """The sidecar holds img2dataset's eleven columns before ours."""
    own = [
        "key", "url", "caption", "status", "error_message",
        "width", "height", "original_width", "original_height", "exif", "sha256",
    ]  # fmt: skip
    assert img2dataset.SIDECAR_SCHEMA.names[:11] == own
    assert img2dataset.SIDECAR_SCHEMA.field("sample_id").type.byte_width == 16


def test_uid_array_is_sorted_high_then_low() -> None:
    """A uid's first 16 digits are the high word, rows are sorted, duplicates stay."""
    middle = "0" * 15 + "1" + "0" * 16
    uid_n = datacomp.uid_array([HIGH, middle, LOW, LOW])
    assert uid_n.dtype == np.dtype("u8,u8")
    assert uid_n.tolist() == [(0, 7), (0, 7), (1, 0), (2**64 - 1, 2**64 - 1)]
    assert datacomp.uid_strings(uid_n) == [LOW, LOW, middle, HIGH]


def test_uid_file_round_trip_is_deterministic() -> None:
    """The file reads back to the same rows, and its bytes do not depend on the order given."""
    content = datacomp.to_npy(datacomp.uid_array([HIGH, LOW]))
    assert content == datacomp.to_npy(datacomp.uid_array([LOW, HIGH]))
    assert datacomp.uid_strings(datacomp.from_npy(content)) == [LOW, HIGH]


def test_uid_array_of_none_is_empty() -> None:
    """No uid gives an empty array of the right type."""
    assert datacomp.from_npy(datacomp.to_npy(datacomp.uid_array([]))).shape == (0,)


@pytest.mark.parametrize("uid", ["", "f" * 31, "F" * 32, "g" * 32, "f" * 33, "f" * 32 + "\n"])
def test_uid_array_refuses_what_is_no_uid(uid: str) -> None:
    """Anything but 32 lower-case hexadecimal digits is refused by value."""
    with pytest.raises(UsageError, match="not a DataComp uid"):
        datacomp.uid_array([uid])


@pytest.mark.parametrize("content", [b"", b"junk", datacomp.to_npy(datacomp.uid_array([LOW]))[:-4]])
def test_from_npy_refuses_other_content(content: bytes) -> None:
    """A file that is not a subset file is a UsageError."""
    with pytest.raises(UsageError, match="subset file"):
        datacomp.from_npy(content)


@pytest.mark.parametrize(
    ("content", "uid"),
    [
        (json.dumps({"uid": HIGH}).encode(), HIGH),
        (json.dumps({"meta": {"uid": HIGH}}).encode(), None),
        (json.dumps({"uid": HIGH.upper()}).encode(), None),
        (json.dumps({"uid": [HIGH]}).encode(), None),
        (json.dumps([{"uid": HIGH}]).encode(), None),
        (b'{"uid": "' + HIGH.encode(), None),
        (b'\xff{"uid": 1}', None),
        (b'{"uid":' + b"[" * 100_000, None),
        (b'{"uid": ' + b"9" * 10_000 + b"}", None),
        (b"", None),
    ],
)
def test_uid_of_is_strict(content: bytes, uid: str | None) -> None:
    """Only a top-level string of 32 lower-case hexadecimal digits counts, and no bytes raise."""
    assert datacomp.uid_of(content) == uid
    assert datacomp.uid_of(memoryview(content)) == uid


def test_dali_index_lists_members_by_sample() -> None:
    """One line per sample, four fields per member, the extension from the first dot on."""
    names = [("000000000.jpg", 512, 9), ("000000000.seg.png", 1536, 8), ("000000001.jpg", 2560, 7)]
    text = dali.dali_index(SimpleNamespace(name=name, offset=offset, size=size) for name, offset, size in names)
    assert text == ("v1.2 2\njpg 512 9 000000000.jpg seg.png 1536 8 000000000.seg.png\njpg 2560 7 000000001.jpg\n")


def test_dali_index_refuses_blanks() -> None:
    """A name with a blank would shift the fields, so it is refused."""
    with pytest.raises(UsageError, match="blanks"):
        dali.dali_index([SimpleNamespace(name="a b.jpg", offset=512, size=1)])


def test_wids_index_has_the_fields_wids_reads() -> None:
    """The index carries kind, version and one entry per shard."""
    index = wids.wids_index([wids.WidsShard("00000.tar", "0" * 32, 3, 10240)], name="kept")
    assert index["__kind__"] == "wids-shard-index-v1"
    assert index["wids_version"] == 1
    assert index["shardlist"] == [{"url": "00000.tar", "md5sum": "0" * 32, "nsamples": 3, "filesize": 10240}]


def test_shard_pattern_refuses_gaps() -> None:
    """A pattern over a gap would name a shard that is not there."""
    assert openclip.shard_pattern(["00008.tar", "00009.tar", "00010.tar"]) == "{00008..00010}.tar"
    with pytest.raises(UsageError, match="consecutively"):
        openclip.shard_pattern(["00000.tar", "00002.tar"])
    with pytest.raises(UsageError, match="no shard"):
        openclip.shard_pattern([])


@pytest.mark.parametrize("directory", ["out", "my out", "it's", "a{b}c", "a::b", "$(rm x)"])
def test_train_command_survives_shell_and_parser(directory: str) -> None:
    """The command parses in the installed open_clip, and its pattern expands to the shards, whatever the path."""
    params = pytest.importorskip("open_clip_train.params")
    data = pytest.importorskip("open_clip_train.data")
    shards = ["00000.tar", "00001.tar"]
    words = shlex.split(openclip.train_command(directory, shards, 100, "ViT-S-32", sigmoid=True))
    moved = words[:1] == ["cd"]
    words = words[3:] if moved else words
    assert words[:3] == ["python", "-m", "open_clip_train.main"]
    args = params.parse_args(words[3:])
    base = "" if moved else f"{directory}/"
    assert list(data.expand_urls(args.train_data)[0]) == [base + shard for shard in shards]
    assert (args.train_num_samples, args.model, args.siglip, args.dataset_type) == (100, "ViT-S-32", True, "webdataset")
    assert args.workers <= len(shards)
    assert args.batch_size <= 50


@pytest.mark.parametrize(
    ("version", "breaks"), [("0.2.86", False), ("0.2.95", False), ("0.2.96", True), ("1.0.2", True)]
)
def test_webdataset_note_names_the_breaking_versions(
    monkeypatch: pytest.MonkeyPatch, version: str, breaks: bool
) -> None:
    """From 0.2.96 on, the note says what to install; before, there is none."""
    monkeypatch.setattr(openclip.metadata, "version", lambda _: version)
    note = openclip.webdataset_note()
    assert (note is not None) == breaks
    assert not breaks or ("pip install 'webdataset<=0.2.86'" in str(note) and version in str(note))
