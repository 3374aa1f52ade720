"""Small images and archives for tests, made from seeds: `from tests.making import make_image, make_tar`."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from struct import pack

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Sample = tuple[str, Mapping[str, bytes]]  # key, {extension: payload}


def make_pixels(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth coloured picture [height, width, 3] that JPEG keeps almost unchanged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def make_image(kind: str = "jpeg", width: int = 64, height: int = 48, seed: int = 0, **options: object) -> bytes:
    """An encoded image; `kind` is a Pillow format name, `options` go to its encoder ("mode" converts first)."""
    image = Image.fromarray(make_pixels(width, height, seed))
    mode = options.pop("mode", None)
    if isinstance(mode, str):
        image = image.convert(mode)
    if kind == "jpeg":
        options.setdefault("quality", 95)
    if kind == "webp":
        options.setdefault("lossless", True)
    return encode(image, kind, **options)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes that Pillow writes for an image."""
    out = io.BytesIO()
    image.save(out, kind.upper(), **options)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    """An EXIF block with nothing but an orientation, for the `exif` option of `make_image`."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    """One PNG chunk with its length and checksum."""
    return pack(">I", len(payload)) + kind + payload + pack(">I", zlib.crc32(kind + payload))


def make_png_bomb(width: int = 13_000, height: int = 13_000) -> bytes:
    """A small, valid PNG that unpacks to width x height grey pixels."""
    packer = zlib.compressobj(9)
    row = bytes(width + 1)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def make_samples(count: int, *, width: int = 32, height: int = 24, seed: int = 0, start: int = 0) -> list[Sample]:
    """`count` samples with 9-digit keys, a JPEG and a caption of their own each."""
    return [
        (
            f"{start + n:09d}",
            {
                "jpg": make_image("jpeg", width, height, seed=seed + start + n),
                "txt": f"a picture with number {start + n}".encode(),
            },
        )
        for n in range(count)
    ]


def make_tar(path: str | os.PathLike[str], samples: Iterable[Sample], *, form: int = tarfile.USTAR_FORMAT) -> Path:
    """Write samples in order, members of a sample side by side, with the standard library."""
    return write_tar(path, [(f"{key}.{ext}", data) for key, parts in samples for ext, data in parts.items()], form=form)


def write_tar(
    path: str | os.PathLike[str],
    members: Iterable[tuple[str | tarfile.TarInfo, bytes]],
    *,
    form: int = tarfile.USTAR_FORMAT,
) -> Path:
    """Write members one by one; a TarInfo instead of a name gives links, directories and devices."""
    target = Path(path)
    target.write_bytes(tar_bytes(members, form=form))
    return target


def tar_bytes(members: Iterable[tuple[str | tarfile.TarInfo, bytes]], *, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """The archive that `write_tar` writes, in memory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data) if info.isreg() else info.size
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is no file: kind is tarfile.SYMTYPE, LNKTYPE, DIRTYPE, FIFOTYPE, CHRTYPE ..."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def data_root() -> Path:
    """The folder of real corpora, or a skip that says why."""
    root = Path(os.environ.get("CURATE_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (root / "openstax").is_dir():
        pytest.skip(f"no real corpora at {root}; set CURATE_TEST_DATA")
    return root
