"""What is known of a written dataset and where it came from: record, manifest, certificate and findings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from curate.run_record import Record
from curate.storage import canonical_json

if TYPE_CHECKING:
    from curate.auditing.outcome import Audit

CARDS: Final = ("README.md", "croissant.json")
MOST_SENTENCES: Final = 60  # the most striking come first; the audit's own files have all of them


@dataclass(frozen=True, slots=True)
class Findings:
    """What an audit said, as far as it is kept with the dataset.

    `sentences` are those of `curate.auditing.sentences`, `left_out` how many more there were; `columns` has name, kind,
    provenance, coverage and unknown share of each; `verdict` is that of the policy's check (`Verdict.as_json()`), if
    any; `notes` are further sentences; `report` is where the full report is, relative to the dataset.
    """

    sentences: tuple[str, ...]
    left_out: int
    pool: int
    selected: int
    flags: int
    tests: int
    alpha: float
    seed: int
    columns: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    verdict: dict[str, Any] | None = None
    report: str | None = None

    @classmethod
    def of(
        cls, audit: Audit, *, notes: tuple[str, ...] = (), verdict: Mapping[str, Any] | None = None,
        report: str | None = None,
    ) -> Findings:  # fmt: skip
        """The summary of an audit."""
        from curate.auditing.outcome import as_plain  # half a second (scipy), and few runs are audited
        from curate.auditing.sentences import findings

        said = findings(audit)
        facts = ("name", "kind", "provenance", "coverage", "unknown_share")
        columns = tuple({name: getattr(column, name) for name in facts} for column in audit.columns)
        shown = said[:MOST_SENTENCES]
        verdict = None if verdict is None else as_plain(dict(verdict))
        return cls(
            shown, len(said) - len(shown), audit.pool, audit.selected, audit.flags, sum(audit.tests.values()),
            audit.alpha, audit.seed, columns, tuple(notes), verdict, report,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` makes the same of them."""
        from curate.auditing.outcome import as_plain

        plain: dict[str, Any] = as_plain(asdict(self))
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Findings:
        lists = {name: tuple(value[name]) for name in ("sentences", "columns", "notes")}
        return cls(**{**value, **lists})


@dataclass(frozen=True, slots=True)
class Lineage:
    """A finished run in the words of its files. `inputs`, `shards`, `counts`, `reasons`: as in the manifest."""

    tool: str
    settings: dict[str, Any]
    models: dict[str, Any]
    counts: dict[str, int]
    reasons: dict[str, int]
    inputs: tuple[dict[str, Any], ...]
    shards: tuple[dict[str, Any], ...]
    digests: dict[str, str]
    chosen: dict[str, Any] | None
    certificate: dict[str, Any] | None
    findings: Findings | None

    @classmethod
    def of(cls, record: Record, manifest: Mapping[str, Any], certificate: Mapping[str, Any] | None = None) -> Lineage:
        """The lineage that a run's record and manifest tell."""
        plain, audit = record.as_json(), manifest.get("audit")
        return cls(
            record.tool,
            _without_text(plain["settings"]),
            plain["models"],
            manifest["counts"],
            manifest["reasons"],
            tuple(manifest["inputs"]),
            tuple(manifest["shards"]),
            {name: digest for name, digest in sorted(manifest["digests"].items()) if name not in CARDS},
            manifest.get("chosen"),
            None if certificate is None else dict(certificate),
            None if audit is None else Findings.from_json(audit["findings"]),
        )

    @property
    def samples(self) -> int:
        """Pairs in the shards, repeats included."""
        return sum(int(shard["samples"]) for shard in self.shards)

    @property
    def identity(self) -> str:
        """Twelve hex digits that name what the shards hold: equal where these are, whatever the directory."""
        return digest_of([shard["sha256"] for shard in self.shards])[:12]

    @property
    def verb(self) -> str:
        """What made the dataset."""
        return "curate score" if self.chosen is None else "curate train --write-shards"

    @property
    def selection(self) -> dict[str, Any]:
        """The settings that the samples were drawn by."""
        found: dict[str, Any] | None = self.settings.get("select") or self.settings.get("train")
        return found or {}


def _without_text(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with a digest in the place of a policy's text, which the certificate has in full."""
    groups = {name: dict(group) for name, group in settings.items() if isinstance(group, Mapping)}
    for group in groups.values():
        if isinstance(group.get("policy"), Mapping) and "text" in group["policy"]:
            policy = dict(group["policy"])
            digest = hashlib.sha256(policy.pop("text").encode()).hexdigest()
            group["policy"] = policy | {"sha256": digest}
    return settings | groups


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def audited_state(manifest: Mapping[str, Any]) -> str:
    """A digest of what an audit speaks of: the units of the run and its shards. Findings hold for this alone."""
    return digest_of([manifest["receipts"], [shard["sha256"] for shard in manifest["shards"]]])
