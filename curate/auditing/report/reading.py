"""How a report is to be read: what each heading means, and what no audit of this kind can tell."""

from __future__ import annotations

from typing import Final

from curate.auditing.outcome import Audit

LIMITS: Final = (
    "Groups are what labels, captions, metadata and clusters say. A caption that mentions a group does not show that a "
    "person of it is depicted, and a depicted person need not be mentioned.",
    "Perceived or inferred attributes are not how anyone describes themselves.",
    "An association between a group and being kept does not state its cause. A confounder that explains a disparity "
    "tells where it comes from and does not excuse it; one that was not declared was not looked at.",
    "Where nothing was detected, a disparity smaller than the column \u201ccould see\u201d may be there all the same.",
    "Caption length counts words, and letters in scripts without spaces: across languages and scripts it is no common "
    "yardstick, and a ratio within equal length says little there.",
    "Near-copies weigh less than other samples in a ratio, its interval and its test; in the counts each is one "
    "sample.",
    "The audit compares a selection with its pool. What the pool itself lacks is not seen here.",
)


def terms(audit: Audit) -> tuple[tuple[str, str], ...]:
    """Each heading and what it means, with this audit's own settings."""
    low, high = audit.screen
    found = [
        ("Rate", "Of the group's samples in the pool, the share that was selected, with Wilson's 95% interval."),
        (
            "Ratio to the rest",
            "The group's rate over the rate of the column's other known samples, with a 95% interval on the log scale. "
            "1 is the same rate, 0.5 half as often.",
        ),
        ("Cohen's h", "The same difference as an effect size: 0.2 is small, 0.5 medium, 0.8 large."),
        (
            "q",
            "The false discovery rate (Benjamini-Hochberg, within a declared family) at which the group would be "
            f"flagged: here at {audit.alpha:g}. Below it the test: Fisher's where an expected count is below 5, else "
            "the G-test with Yates's correction.",
        ),
        (
            "Level",
            f"Detected: q is at most {audit.alpha:g}. Large: and the ratio is outside {low:g} to {high:g}. Confidently "
            f"large: and so is the whole interval. {low:g} is a screening ratio, not a legal test.",
        ),
        (
            "Could see",
            "The minimum detectable ratio (MDR): one that far from 1 would have been flagged in 80% of audits of this "
            "size. For a group with \u201cnone below 1\u201d even selecting none of it would not have been flagged.",
        ),
        (
            "Not known",
            "Samples whose group nobody stated stand as a group of their own and are in no other group's rest.",
        ),
    ]
    rows = audit.rows
    if any(row.conditional for row in rows):
        found.append(
            (
                "Within equal \u2026, explained by \u2026?",
                "The ratio among samples alike in the confounder (Mantel-Haenszel), beside the crude one. No: more "
                "than half of the log ratio remains. In part: less, and still not 1. Yes: less, and 1 is within.",
            )
        )
    if any(column.kind == "zero-shot" for column in audit.columns):
        found.append(
            (
                "Predicted",
                "What a zero-shot model takes a picture for, where it is sure enough; not a fact about whom or what it "
                "shows. Its errors may differ from group to group, and may follow the disparities of other models.",
            )
        )
    if audit.duplicate_clusters is not None:
        told = f" Here they fared alike with a correlation of {audit.rho:.2f}." if audit.rho is not None else ""
        found.append(
            (
                "Counting copies",
                f"{audit.duplicate_clusters:,} clusters of near-duplicates count as about one vote each in tests and "
                f"intervals, as copies are kept or left out together.{told} This column counts every copy instead.",
            )
        )
    if any(row.shrunken for row in rows):
        found.append(
            ("Rate after shrinkage", "The rate pulled to those of the column's other groups, the more the fewer rows.")
        )
    if any(row.exposures for row in rows):
        found.append(("Exposures", "How often samples of the group were drawn, the same one several times."))
    if any(row.early_late for row in rows):
        found.append(("Early, late", "Selected samples first drawn before and after the middle of all sub-batches."))
    if any(row.losses for row in rows):
        found.append(
            (
                "Which means",
                "The group's median losses against the pool's. Both low: already learned. Learner high, reference low: "
                "worth learning. Both high: hard for the reference too, so another reference is needed and no other "
                "threshold. Distances are in standard deviations (sd) of the pool.",
            )
        )
    if audit.associations:
        found.append(("Changed by", "The odds ratio of group and concept in the selection over that in the pool."))
    return tuple(found)
