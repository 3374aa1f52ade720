"""`croissant.json`: the dataset for machines, in Croissant 1.0 with its RAI extension (mlcommons.org/croissant).

Every shard and sidecar is a FileObject with its sha256, a FileSet and a RecordSet read the sidecars' columns, PROV
names the inputs, models and settings it was made of. Cost: two nodes a shard; input shards beyond 1,000 are counted and
digested, and stand in the manifest alone.
"""

from __future__ import annotations

import json
from typing import Any, Final

import pyarrow as pa

from curate.formats.img2dataset import SIDECAR_SCHEMA
from curate.provenance.data_card import name_patterns
from curate.provenance.limits import UNKNOWN, limits
from curate.provenance.lineage import Lineage, digest_of
from curate.provenance.markdown import shortened
from curate.reporting.markup import visible
from curate.storage import readable_json

MOST_INPUTS: Final = 1_000
CONFORMS: Final = ("http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0")
METHOD: Final = "Evans et al. 2024, Data curation via joint example selection, https://arxiv.org/abs/2406.17711"

# The context of the specification's examples; `prov` is added to it.
_CONTEXT: Final[dict[str, Any]] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
} | {
    name: f"cr:{name}"
    for name in (
        "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet", "format",
        "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references",
        "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
    )
}  # fmt: skip

MEANINGS: Final = {
    "key": "key of the sample in its shard: nine digits, unique in the dataset",
    "url": "where the picture was fetched from, as its json said",
    "caption": "the caption, as it is in the shard",
    "status": "img2dataset's column; always success",
    "error_message": "img2dataset's column; always empty",
    "width": "pixels",
    "height": "pixels",
    "original_width": "pixels before an earlier tool resized it, as its json said",
    "original_height": "pixels before an earlier tool resized it, as its json said",
    "exif": "EXIF as the sample's json had it",
    "sha256": "of the picture's bytes",
    "original_key": "key in the input shard",
    "original_shard": "the input shard",
    "sample_id": "16 bytes that name the sample in every file of the run",
    "uid": "DataComp's uid, where the input had one",
    "sub_batch": "the sub-batch that it was drawn into",
    "rank": "its place in the sub-batch, from 0",
    "score": "the score it was drawn by, of its sub-batch only",
    "reference_similarity": "cosine of picture and caption in the reference model",
    "learner_similarity": "cosine of picture and caption in the learner",
}


def croissant(lineage: Lineage) -> bytes:
    """The whole file: JSON, sorted, of UTF-8."""
    said = f"Written by curate {lineage.tool}. {lineage.counts['kept']:,} of {lineage.counts['in']:,} image-text pairs"
    document = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": list(CONFORMS),
        "name": f"curate selection {lineage.identity}",
        "description": f"{said}, copied byte for byte into {len(lineage.shards):,} WebDataset shards.",
        "version": f"1.0.0+{lineage.identity}",
        "license": UNKNOWN["Licence"],
        "citeAs": UNKNOWN["Citation"],
        "citation": METHOD,
        "keywords": ["curate", "image-text", "webdataset"],
        "distribution": _distribution(lineage),
        "recordSet": [_records()] if lineage.shards else [],
        "prov:wasDerivedFrom": _sources(lineage),
        "prov:wasGeneratedBy": _activity(lineage),
    }
    return readable_json(_clean(document | _responsible(lineage)))


def _responsible(lineage: Lineage) -> dict[str, Any]:
    """The fields of the RAI extension."""
    found = lineage.findings
    audited = [] if found is None else [*found.sentences, *found.notes]
    if found is not None and found.verdict is not None:
        audited.append(f"Checked against the policy: {found.verdict['result']}.")
    return {
        "rai:dataBiases": audited or ["Not audited: who or what was left out more often is not known."],
        "rai:dataLimitations": list(limits(lineage)),
        "rai:dataCollection": "unknown. Selected from the input shards under prov:wasDerivedFrom; how these were "
        "collected is not known here.",
        "rai:personalSensitiveInformation": [UNKNOWN["Consent, personal data, harmful content"]],
        "rai:dataPreprocessingProtocol": ["Bytes of pictures and captions are copied, not re-encoded."],
        "rai:dataCollectionMissingData": _counted(lineage),
    }


def _counted(lineage: Lineage) -> str:
    return "; ".join(f"{name}: {count:,}" for name, count in lineage.reasons.items()) or "no input"


def _distribution(lineage: Lineage) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = []
    for shard in lineage.shards:
        sidecar = f"{str(shard['name']).removesuffix('.tar')}.parquet"
        files.append(_file(shard["name"], "application/x-tar", shard["sha256"]) | {"contentSize": f"{shard['size']} B"})
        files.append(_file(sidecar, "application/x-parquet", lineage.digests[sidecar]))
    if lineage.certificate is not None:
        files.append(_file("certificate.json", "application/json", lineage.digests["certificate.json"]))
    if lineage.shards:
        files.append({
            "@type": "cr:FileSet",
            "@id": "sidecars",
            "name": "sidecars",
            "description": "One parquet a shard, one row a pair.",
            "encodingFormat": "application/x-parquet",
            "includes": name_patterns(lineage, ".parquet"),
        })  # fmt: skip
    return files


def _file(name: str, kind: str, digest: str) -> dict[str, Any]:
    named = {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name}
    return named | {"encodingFormat": kind, "sha256": digest}


def _records() -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "samples",
        "name": "samples",
        "description": "Every pair of the dataset: caption, scores, and where it came from.",
        "key": {"@id": "samples/key"},
        "field": [_field(column) for column in SIDECAR_SCHEMA],
    }


def _field(column: pa.Field) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"samples/{column.name}",
        "name": column.name,
        "description": MEANINGS[column.name],
        "dataType": _data_type(column.type),
        "source": {"fileSet": {"@id": "sidecars"}, "extract": {"column": column.name}},
    }


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"


def _sources(lineage: Lineage) -> list[dict[str, Any]]:
    """The input shards; blank nodes, since a path may hold what no identifier may."""
    listed = [
        {"@type": "prov:Entity", "name": one["url"], "sha256": one["sha256"], "description": f"{one['rows']:,} pairs"}
        for one in lineage.inputs[:MOST_INPUTS]
    ]
    more = lineage.inputs[MOST_INPUTS:]
    if more:
        digest = digest_of([one["sha256"] for one in more])
        name = f"{len(more):,} more input shards, listed in _curate/manifest.json"
        listed.append({"@type": "prov:Collection", "name": name, "identifier": f"sha256 of their sha256: {digest}"})
    return listed


def _activity(lineage: Lineage) -> dict[str, Any]:
    used = [
        {
            "@type": "prov:Entity",
            "name": f"{role} model {shortened(model['name'])}",
            "identifier": f"checkpoint sha256:{model['checkpoint']}",
            "description": json.dumps(model, sort_keys=True),
        }
        for role, model in sorted(lineage.models.items())
    ]
    settings = {"@type": "prov:Entity", "name": "settings", "prov:value": json.dumps(lineage.settings, sort_keys=True)}
    if lineage.chosen is not None:
        log = f"sha256:{lineage.chosen['log']}"
        used.append({"@type": "prov:Entity", "name": "the training's log of choices", "identifier": log})
    return {
        "@type": "prov:Activity",
        "name": lineage.verb,
        "prov:used": [*used, settings],
        "prov:wasAssociatedWith": {"@type": "prov:SoftwareAgent", "name": "curate", "softwareVersion": lineage.tool},
    }


def _clean(value: Any) -> Any:
    """The document with every text as it can be shown and written: no lone surrogates, controls or direction marks."""
    if isinstance(value, dict):
        return {key: _clean(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_clean(one) for one in value]
    return visible(value) if isinstance(value, str) else value
