"""What a selection by scores cannot claim, in sentences for the data card and for Croissant's `rai:dataLimitations`."""

from __future__ import annotations

from typing import Final

from curate.provenance.lineage import Lineage

UNKNOWN: Final = {
    "Licence": (
        "unknown. Pictures and captions keep the terms of wherever they came from; curate does not read them and "
        "grants nothing."
    ),
    "Citation": "unknown. Cite the sources of the input shards; the method is that of Evans et al. 2024.",
    "Creator, contact, date of publication": "unknown.",
    "Consent, personal data, harmful content": "unknown. Nothing was searched for, and nothing was removed for it.",
}


def limits(lineage: Lineage) -> tuple[str, ...]:
    """The limits of this selection; the last ones only where they apply."""
    found = [
        "Selected by what models score, so it inherits what the models know and prefer: a sample that the reference "
        "never learned to read is scored low whatever its worth.",
        "Shares of languages, subjects and groups of people may differ from those of the input; an audit shows how.",
        "Captions are as they were found. A mention in a caption does not say who is depicted.",
        "Duplicates were looked for among samples that were drawn from together, not in the whole input."
        if lineage.chosen is None
        else "Chosen by a training as it went: the choice fits that learner at that step, and others less.",
        "Scores compare samples of one sub-batch; they are no measure of quality across sub-batches.",
    ]
    lost = lineage.counts["quarantined"]
    if lost:
        found.append(f"Of the input {lost:,} samples could not be read and had no chance to be drawn.")
    flawed = sum(one["flaw"] is not None for one in lineage.inputs)
    if flawed:
        found.append(f"Of the input shards {flawed:,} end early or are damaged; what comes after is not even counted.")
    if lineage.findings is None:
        found.append("Not audited: who or what was left out more often is not known.")
    return tuple(found)
