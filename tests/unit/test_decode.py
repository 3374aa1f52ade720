"""Headers and pixels of untrusted images: one rule each, and refusal with a reason."""

from __future__ import annotations

import io
import os
import tracemalloc
import warnings
from struct import pack

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from curate.images.decode import ImageHeader, ImageRejected, decode_rgb, read_header
from curate.images.header import exif_orientation
from tests.making import encode, exif, make_image, make_pixels, make_png_bomb, png_chunk

KINDS = ["jpeg", "png", "webp", "gif"]


def refusal(data: bytes, **options: int) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode_rgb(data, **options)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("kind", KINDS)
def test_header_and_pixels(kind: str) -> None:
    """Each format gives its stored size from the header and nearly the pixels that went in."""
    data = make_image(kind, 61, 47)
    assert read_header(data) == ImageHeader(kind, 61, 47)
    rgb, header = decode_rgb(memoryview(data))
    assert header == ImageHeader(kind, 61, 47)
    assert (rgb.shape, rgb.dtype, rgb.flags.c_contiguous) == ((47, 61, 3), np.uint8, True)
    assert np.abs(rgb.astype(int) - make_pixels(61, 47)).mean() < (12 if kind == "gif" else 3)


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"restart_marker_rows": 1}]
)
def test_jpegs_match_pillow(options: dict[str, object]) -> None:
    """Baseline, progressive, 4:4:4 and grey JPEGs decode to Pillow's pixels within rounding."""
    data = make_image("jpeg", 120, 90, **options)
    rgb, _ = decode_rgb(data)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(rgb - theirs).max() <= 3


def test_lossy_webp_header() -> None:
    """The three kinds of WEBP (lossy, lossless, extended) all tell their size."""
    assert read_header(make_image("webp", 33, 21, lossless=False)) == ImageHeader("webp", 33, 21)
    assert read_header(make_image("webp", 33, 21, mode="RGBA", exif=exif(1))) == ImageHeader("webp", 33, 21)


def test_min_side_reduces_but_never_below() -> None:
    """A JPEG is decoded at half size where the shorter side stays long enough, else whole; it is never enlarged."""
    data = make_image("jpeg", 640, 512)
    assert [decode_rgb(data, min_side=side)[0].shape[:2] for side in (64, 224, 256, 257, 512, 900)] == [
        (64, 80), (256, 320), (256, 320), (512, 640), (512, 640), (512, 640),
    ]  # fmt: skip
    assert decode_rgb(data, min_side=64)[1] == ImageHeader("jpeg", 640, 512)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    """All eight orientations come out as Pillow's exif_transpose has them; the header stays as stored."""
    data = make_image(kind, 60, 40, exif=exif(orientation))
    rgb, header = decode_rgb(data)
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert rgb.shape == theirs.shape
    assert np.abs(rgb - theirs).max() <= 3
    assert (header.width, header.height) == (60, 40)


def test_orientation_with_reduced_decoding() -> None:
    """Turning comes after reducing."""
    assert decode_rgb(make_image("jpeg", 640, 320, exif=exif(6)), min_side=100)[0].shape == (320, 160, 3)


@pytest.mark.parametrize(
    "tiff", [b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 40, exif(9)[6:], exif(0)[6:]]
)
def test_broken_exif_is_upright(tiff: bytes) -> None:
    """An EXIF block that makes no sense means orientation 1."""
    assert exif_orientation(tiff) == 1


def test_cmyk_jpeg_is_converted_as_pillow_does() -> None:
    """CMYK goes to RGB by Pillow's rule, Adobe's inversion included."""
    data = make_image("jpeg", 40, 30, mode="CMYK")
    rgb, _ = decode_rgb(data)
    assert np.array_equal(rgb, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(rgb.astype(int) - make_pixels(40, 30)).mean() < 6


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    """Transparent is white, half transparent red is pink."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((255, 0, 0, 128), (4, 0, 8, 8))
    rgb, _ = decode_rgb(encode(image, kind, lossless=True))
    assert rgb[0, 0].tolist() == [255, 255, 255]
    assert np.abs(rgb[0, 7].astype(int) - [255, 127, 127]).max() <= 2


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_palette_and_its_transparent_colour(kind: str) -> None:
    """A palette is expanded and its transparent colour becomes white."""
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    image.putpixel((3, 3), 1)
    rgb, _ = decode_rgb(encode(image, kind, transparency=0))
    assert rgb[0, 0].tolist() == [255, 255, 255]
    assert rgb[3, 3].tolist() == [200, 100, 50]


def test_sixteen_bits_keep_the_high_byte() -> None:
    """16-bit grey PNGs keep the high byte of each value, as 16-bit colour does."""
    grey = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).astype(np.uint16)
    rgb, _ = decode_rgb(encode(Image.fromarray(grey), "png"))
    assert np.array_equal(rgb[:, :, 0], (grey >> 8).astype(np.uint8))
    rows = b"".join(b"\0" + grey[row].astype(">u2").repeat(3).tobytes() for row in range(8))
    import zlib

    head = png_chunk(b"IHDR", pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    colour = b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    assert np.array_equal(decode_rgb(colour)[0][:, :, 1], (grey >> 8).astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes(mode: str) -> None:
    """Grey images have three equal channels."""
    rgb, _ = decode_rgb(make_image("png", 20, 10, mode=mode))
    assert np.array_equal(rgb[:, :, 0], rgb[:, :, 2])


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations_give_frame_0(kind: str) -> None:
    """An animation is its first frame."""
    frames = [Image.new("RGB", (12, 9), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    rgb, _ = decode_rgb(data)
    assert rgb[4, 4].tolist() == [250, 0, 0]


def test_bomb_is_refused_from_its_header() -> None:
    """A 13,000 x 13,000 PNG is refused before any memory is taken for its pixels."""
    bomb = make_png_bomb()
    assert len(bomb) < 1_000_000
    tracemalloc.start()
    assert refusal(bomb) == "image-too-large"
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_limit_holds_for_every_format(kind: str) -> None:
    """The limit is inclusive and checked on the header of each format."""
    data = make_image(kind, 20, 10)
    assert decode_rgb(data, max_pixels=200)[1].width == 20
    assert refusal(data, max_pixels=199) == "image-too-large"


def test_a_size_cannot_be_hidden_from_the_header() -> None:
    """A frame header that a naive walk would step over is the one that counts, as in the decoder."""
    data = make_image("jpeg", 64, 48)
    frame = data.index(b"\xff\xc0")
    decoy = b"\xff\xc0" + data[frame + 2 : frame + 5] + pack(">HH", 8, 8) + data[frame + 9 : frame + 19]
    hidden = data[:frame] + b"\xff\x00" + data[frame:]
    assert (read_header(hidden).width, read_header(hidden).height) == (64, 48)
    skip = pack(">H", 2 + len(data[frame : frame + 19]))
    assert read_header(data[:frame] + b"\xff\x00" + skip + data[frame : frame + 19] + decoy).width == 64


def test_two_frame_headers_are_refused() -> None:
    """A JPEG with a small frame header and then a large one is refused, not decoded at the larger size."""
    data = make_image("jpeg", 64, 48)
    frame = data.index(b"\xff\xc0")
    large = data[frame : frame + 5] + pack(">HH", 60_000, 60_000) + data[frame + 9 : frame + 19]
    assert refusal(data[: frame + 19] + large + data[frame + 19 :]) == "image-undecodable"


def test_gif_frame_larger_than_its_screen() -> None:
    """A GIF whose frame reaches beyond a small screen is measured by the frame."""
    data = bytearray(make_image("gif", 20, 10))
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[at + 5 : at + 9] = pack("<HH", 65535, 65535)
    assert refusal(bytes(data)) == "image-too-large"


def test_png_text_and_profile_bombs_never_reach_the_decoder() -> None:
    """A PNG with compressed text and profile that unpack to 100 MB decodes as if they were not there."""
    import zlib

    blob = zlib.compress(bytes(100_000_000), 9)
    data = make_image("png", 20, 10)
    extra = b"".join(png_chunk(kind, b"n\0\0" + blob) for kind in (b"zTXt", b"iCCP"))
    bomb = data[:33] + extra + data[33:]
    assert np.array_equal(decode_rgb(bomb)[0], decode_rgb(data)[0])


def test_progressive_jpeg_with_endless_scans_is_refused() -> None:
    """A progressive JPEG with hundreds of scans, each a pass over the whole picture, is refused."""
    data = make_image("jpeg", 64, 64, progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[data.rindex(b"\xff\xc4", 0, last) : -2]
    assert refusal(data[:-2] + scan * 200 + data[-2:]) == "image-undecodable"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_images(kind: str, part: float) -> None:
    """An image that ends early is refused in every format, never half decoded."""
    data = make_image(kind, 200, 150, **({"interlace": 0} if kind == "gif" else {}))
    assert refusal(data[: int(len(data) * part)]) == "image-undecodable"


def test_truncation_is_refused_even_if_pillow_was_told_to_bear_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's process-wide leniency for cut files does not let half pictures through."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = make_image("png", 200, 150)
    assert refusal(data[: len(data) // 2]) == "image-undecodable"


def test_truncated_progressive_and_cmyk_jpegs() -> None:
    """A cut progressive JPEG and a cut CMYK JPEG are refused by whichever decoder takes them."""
    for options in ({"progressive": True}, {"mode": "CMYK"}):
        data = make_image("jpeg", 200, 150, **options)
        assert refusal(data[: len(data) // 2]) == "image-undecodable"


def test_stray_bytes_in_a_jpeg_are_harmless() -> None:
    """Bytes between segments or before the end marker do not cost the picture."""
    data = make_image("jpeg", 64, 48)
    table = data.index(b"\xff\xdb")
    odd = data[:table] + b"\0\0\0" + data[table:-2] + bytes(50) + data[-2:] + b"after the end"
    assert np.array_equal(decode_rgb(odd)[0], decode_rgb(data)[0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image-empty"),
        (b"\0" * 100, "image-format"),
        (b"<svg xmlns=''/>", "image-format"),
        (b"BM" + b"\0" * 100, "image-format"),
        (b"II*\0" + b"\0" * 100, "image-format"),
        (b"%!PS-Adobe", "image-format"),
        (b"\x80\x04\x95", "image-format"),
        (b"\xff\xd8", "image-undecodable"),
        (b"\xff\xd8\xff\xe1\x00\x00", "image-undecodable"),
        (b"\xff\xd8" + b"\xff\xe0\x00\x02" * 30_000, "image-undecodable"),
        (b"\xff\xd8" + b"\xff" * 100_000, "image-undecodable"),
        (b"\x89PNG\r\n\x1a\n", "image-undecodable"),
        (b"RIFF\0\0\0\0WEBPVP8X", "image-undecodable"),
        (b"RIFF\0\0\0\0WEBPJUNK" + b"\0" * 30, "image-undecodable"),
        (b"GIF89a", "image-undecodable"),
        (b"GIF89a\x01\0\x01\0\0\0\0" + b"\x21\xfe\x01x" * 3, "image-undecodable"),
        (b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\x10\x01\x11\0\0", "image-undecodable"),
    ],
)
def test_refusals(data: bytes, reason: str) -> None:
    """Empty, foreign and broken files each have their reason."""
    assert refusal(data) == reason


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_never_raise_anything_else(kind: str) -> None:
    """Five hundred random corruptions per format decode or are rejected, and nothing is printed as a warning."""
    data = make_image(kind, 40, 30)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(500):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                broken[at] = rng.integers(256)
            for view in (bytes(broken), bytes(broken[: rng.integers(1, len(data))])):
                try:
                    rgb, _ = decode_rgb(view, max_pixels=1_000_000)
                except ImageRejected:
                    continue
                assert rgb.ndim == 3


def test_broken_metadata_gives_no_warning() -> None:
    """Corrupt EXIF, a malformed multi-picture block and an invalid animation chunk are passed over in silence."""
    jpeg = make_image("jpeg", 40, 30, mode="CMYK")
    mpf = b"MPF\0MM\0*" + os.urandom(40)
    odd = (
        jpeg[:2]
        + b"\xff\xe1\0\x10Exif\0\0MM\0*\xff\xff\xff\xff"
        + b"\xff\xe2"
        + pack(">H", len(mpf) + 2)
        + mpf
        + jpeg[2:]
    )
    png = make_image("png", 20, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode_rgb(odd)[0], decode_rgb(jpeg)[0])
        decode_rgb(png[:33] + png_chunk(b"acTL", pack(">II", 0, 0)) + png[33:])
