"""Keep the two papers in a finished output, and keep them true: made with the manifest, made anew after an audit.

The manifest holds the findings and the digests of both files, so one rename changes what they should say. Around it the
old digests stand in `replaced` until both files are there: a run that is killed at any point leaves an output that
`curate verify` accepts, and the next audit or resumption completes it. A file without the mark "Written by curate" is
somebody's own: it stays as it is, and is neither replaced nor proven.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from curate.errors import UsageError
from curate.provenance.croissant import croissant
from curate.provenance.data_card import data_card
from curate.provenance.lineage import CARDS, Findings, Lineage, audited_state
from curate.run_record import Record, read_record
from curate.storage import readable_json, replace_file

_MARK: Final = b"Written by curate"
_MARKED: Final = 8192  # bytes at the start of a file within which the mark stands
CERTIFICATE: Final = "certificate.json"


def make_cards(
    record: Record, manifest: Mapping[str, Any], certificate: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Both files as they follow from a run's record, manifest and certificate."""
    lineage = Lineage.of(record, manifest, certificate)
    return {"README.md": data_card(lineage), "croissant.json": croissant(lineage)}


def is_ours(path: Path) -> bool:
    """Whether a file may be replaced: it is not there, or bears the mark of what curate wrote."""
    try:
        with open(path, "rb") as file:
            return _MARK in file.read(_MARKED)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def carried_findings(old: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The section `audit` of the manifest that is at `old`, if it speaks of the same selection as `manifest`."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        audit = json.loads(old.read_bytes())["audit"]
        if audit["of"] == audited_state(manifest):
            return {"audit": audit}
    return {}


def add_findings(output: Path, findings: Findings) -> bool:
    """Write what an audit found into the papers of `output`, in the place of earlier findings.

    False, and nothing changes, where the output has no papers of curate's: it has not finished, holds scores only, or
    is of a version without them. Errors: UsageError where its manifest is damaged, StorageError where it cannot be
    written.
    Example: `add_findings(out, Findings.of(audit, report="audit/report.html"))`.
    """
    path = Path(output) / "_curate" / "manifest.json"
    try:
        old = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UsageError(f"{path} is not readable ({error}); run the same command again") from error
    kept = [name for name in CARDS if name in old["digests"] and is_ours(Path(output) / name)]
    if not kept:
        return False
    record = read_record(Path(output))
    new = {name: value for name, value in old.items() if name != "replaced"}
    new |= {"audit": {"of": audited_state(old), "findings": findings.as_json()}}
    made = make_cards(record, new, read_certificate(Path(output), old))
    new["digests"] = old["digests"] | {name: hashlib.sha256(made[name]).hexdigest() for name in kept}
    before = {name: _earlier(old, name) for name in kept}
    replace_file(path, readable_json(new | {"replaced": before}))
    for name in kept:
        replace_file(Path(output) / name, made[name])
    replace_file(path, readable_json(new))
    return True


def read_certificate(output: Path, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The certificate of a run that was drawn under a policy."""
    if CERTIFICATE not in manifest["digests"]:
        return None
    found: dict[str, Any] = json.loads((output / CERTIFICATE).read_bytes())
    return found


def _earlier(manifest: Mapping[str, Any], name: str) -> list[str]:
    """Every digest that a file may have until it is replaced: one more for each audit that was cut short."""
    before: list[str] = manifest.get("replaced", {}).get(name, [])
    return sorted({*before, manifest["digests"][name]})
