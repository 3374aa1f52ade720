"""Why a sample is kept, dropped or quarantined: the closed list of reasons that the ledger uses.

Every input sample ends in exactly one status with one reason. `tests/unit/test_reasons.py` holds that no module writes
a reason that is not listed here.
"""

from __future__ import annotations

from typing import Final

KEPT: Final = {
    "selected": "drawn into a sub-batch",
}
DROPPED: Final = {
    "not-selected": "a candidate of its super-batch that the sampler did not draw",
    "never-chosen": "no step of the training chose it: passed over each time, or never met",
    "duplicate-exact": "same image bytes and same caption as an earlier sample",
    "duplicate-near": "image within the perceptual-hash distance of an earlier sample",
}
QUARANTINED: Final = {
    "tar-truncated": "the shard ends inside this sample",
    "tar-damaged": "the shard cannot be read from this sample on",
    "key-duplicate": "a sample with this key came earlier in the shard",
    "member-refused": "its image is a link, a device, a sparse file, or has an unsafe name",
    "image-missing": "no member ends in jpg, jpeg, png, webp or gif",
    "image-empty": "the image has no bytes",
    "image-format": "the bytes are not JPEG, PNG, WEBP or GIF",
    "image-too-large": "the header declares more pixels than the limit",
    "image-undecodable": "the image cannot be decoded",
    "caption-missing": "no txt member and no caption in the json",
    "caption-empty": "the caption has no visible character",
    "caption-encoding": "the caption is not UTF-8",
    "caption-too-long": "the caption is longer than the limit",
}

REASONS: Final = {**KEPT, **DROPPED, **QUARANTINED}
