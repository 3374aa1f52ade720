"""What open_clip's trainer needs: `sizes.json`, and the command line that trains on the new shards.

Option names are those of `open_clip_train.params` (3.x). Two traps of its data pipeline are met here: it demands at
least one shard per worker, and a worker whose shards hold less than one batch yields none.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata

from curate.errors import UsageError

_DEFAULT_WORKERS = 4
_DEFAULT_BATCH = 64
_FIRST_MARKED = (0, 2, 96)
# braceexpand gives these a meaning; '::' parts two sources
_SPECIAL = re.compile(r"[{}\\]|::")


def sizes(shards: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Content of `sizes.json`: base name of each shard -> samples in it.

    >>> sizes([("00000.tar", 10000), ("00001.tar", 17)])
    {'00000.tar': 10000, '00001.tar': 17}
    """
    return dict(shards)


def shard_pattern(names: Sequence[str]) -> str:
    """One pattern for consecutive shard names, in the brace notation of webdataset and open_clip.

    >>> shard_pattern(["00000.tar", "00001.tar", "00002.tar"])
    '{00000..00002}.tar'
    >>> shard_pattern(["00000.tar"])
    '00000.tar'

    Raises `UsageError` if there is no shard or the numbers have a gap.
    """
    if not names:
        raise UsageError("no shard was written, so there is nothing to train on; lower the thresholds or raise --keep")
    if len(names) == 1:
        return names[0]
    stems = [name.removesuffix(".tar") for name in names]
    first, last = stems[0], stems[-1]
    if any(not stem.isdecimal() for stem in stems) or [int(stem) for stem in stems] != list(
        range(int(first), int(last) + 1)
    ):
        raise UsageError(f"shards {names[0]} .. {names[-1]} are not numbered consecutively; name them one by one")
    return f"{{{first}..{last}}}.tar"


def webdataset_note() -> str | None:
    """What to do before the command runs, where the installed webdataset breaks open_clip's loader; else None.

    webdataset marks the end of each shard since 0.2.96, and the loader of open_clip 3.3 and earlier stops at the mark
    with `KeyError: 'fname'` (open_clip issue 935).
    """
    try:
        installed = metadata.version("webdataset")
    except metadata.PackageNotFoundError:
        return "open_clip trains with webdataset, which is not installed: pip install 'webdataset<=0.2.86'"
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    if numbers < _FIRST_MARKED:
        return None
    return (
        f"webdataset {installed} breaks open_clip's loader (KeyError: 'fname', open_clip issue 935); in the "
        "environment that trains: pip install 'webdataset<=0.2.86'"
    )


@contextmanager
def end_of_shard_fix() -> Iterator[None]:
    """Let open_clip's loader run under any webdataset: the end-of-shard mark that it trips over is left out inside."""
    from open_clip_train import data

    if webdataset_note() is None:
        yield
        return
    original = data.tar_file_expander
    data.tar_file_expander = partial(original, eof_value=None)
    try:
        yield
    finally:
        data.tar_file_expander = original


def train_command(
    out_dir: str | os.PathLike[str],
    shards: Sequence[str],
    samples: int,
    model: str,
    *,
    batch_size: int | None = None,
    sigmoid: bool = False,
) -> str:
    """The command line that trains `model` on the shards of `out_dir`, quoted for a POSIX shell.

    `shards` are base names in order, `samples` their sum; `batch_size` is per GPU (None: open_clip's 64, lowered where
    the shards are too small to fill it). `sigmoid` adds `--siglip`.

    >>> print(train_command("out", ["00000.tar", "00001.tar"], 20000, "ViT-B-32"))
    python -m open_clip_train.main --train-data 'out/{00000..00001}.tar' --train-num-samples 20000 --dataset-type webdataset --workers 2 --model ViT-B-32
    """  # noqa: E501
    pattern = shard_pattern(shards)
    directory = os.fspath(out_dir)
    # no spelling of such a path survives brace expansion, so the shell goes there instead
    outside = bool(_SPECIAL.search(directory))
    workers = min(_DEFAULT_WORKERS, len(shards))
    batch = _DEFAULT_BATCH if batch_size is None else batch_size
    fitting = max(1, min(batch, samples // len(shards)))
    words = ["python", "-m", "open_clip_train.main"]
    words += ["--train-data", pattern if outside else os.path.join(directory, pattern)]
    words += ["--train-num-samples", str(samples), "--dataset-type", "webdataset"]
    words += ["--workers", str(workers)] if workers < _DEFAULT_WORKERS else []
    words += ["--batch-size", str(fitting)] if fitting != _DEFAULT_BATCH else []
    words += ["--model", model]
    words += ["--siglip"] if sigmoid else []
    words += ["--logs", "../logs"] if outside else []
    command = shlex.join(words)
    return f"cd {shlex.quote(directory)} && {command}" if outside else command
