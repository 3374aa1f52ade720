"""The verb that asks who and what a selection left out."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from curate.cli.options import LOCAL, EngineOptions, Json
from curate.cli.printing import console, print_json

Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")]
Directory = Annotated[Path | None, Parameter(name=["--output", "-o"])]


def audit(
    out: Path,
    /,
    *,
    selected: Path | None = None,
    labels: Path | None = None,
    on: str = "key",
    least_match: float = 0.5,
    label_error: Names = (),
    lexicon: Names = (),
    attributes: Path | None = None,
    columns: Names = (),
    intersect: Names = (),
    confounder: Names = (),
    clusters: int | None = None,
    policy: Path | None = None,
    output: Directory = None,
    seed: int = 0,
    json: Json = False,
    running: EngineOptions = LOCAL,
) -> int:
    """Say who and what a selection left out, how sure that is, and what could explain it; check it against a policy.

    Groups are labels, metadata, words in captions (mentions, not people depicted), script and language, image sizes,
    near-duplicates, and clusters of the reference's embeddings. Leaves report.html (one file, no network), audit.json,
    groups.parquet and assignments.parquet. Exit codes: 0 done, and with --policy passed; 1 the policy is violated, or
    what is needed cannot be read or written; 2 the policy cannot be met, or wrong usage; 3 indeterminate (coverage or
    power too low to tell); 4 a shard is not what was scored. Where no report was made, standard error says why.

    Example: curate audit filtered --labels labels.csv --columns gender language --intersect gender,language

    Parameters
    ----------
    out
        An output of `curate score`, `select`, `write` or `train`; with --selected, the parquet of a pool that another
        tool selected from (columns key or uid; text or caption, url, width, height, sha256 of the image where known).
    selected
        What another tool selected: DataComp uids (.npy), or keys or uids (.txt, one in a line; .parquet).
    labels
        A CSV or parquet file of labels, joined to the pool's samples.
    on
        The column that both have: key, uid or sample_id.
    least_match
        Refuse labels that fewer than this share of the pool have.
    label_error
        How often labels are right, as COLUMN=SENSITIVITY,SPECIFICITY; ratios are then corrected, too.
    lexicon
        Sets of terms (gender, age, identity; all three unless given) or YAML files with more.
    attributes
        Ask a model about the images (YAML: model, threshold, columns, groups, prompts); never one that scored them.
    columns
        Audit these columns only: of the labels, of the samples' json, of the ledger or the pool's parquet (a list puts
        a sample into several groups), or those that curate makes.
    intersect
        Columns to cross, separated by a comma: gender,age. A name with a comma is quoted as in a CSV:
        'gender,"height, in cm"'. Where another column is called "a & b" as well, the crossing is '"a" & "b"'.
    confounder
        Columns that could explain a disparity; caption length unless given.
    clusters
        Number of embedding clusters; chosen by the size of the pool unless given, 0 for none.
    policy
        A policy (YAML) that the selection is checked against; the columns that it crosses are crossed here too.
    output
        Write there, and leave OUT as it is. Unless given that is OUT/_curate/audit, and the findings enter OUT's data
        card (README.md) and croissant.json.
    seed
        Of clusters, galleries, intervals and random selections.
    """
    from curate.pipelines import auditing

    result = auditing.audit(
        out, selected=selected, labels=labels, on=on, least_match=least_match, label_error=label_error,
        lexicon=lexicon, attributes=attributes, columns=columns, intersect=intersect, confounder=confounder,
        clusters=clusters, policy=policy, to=output, seed=seed, **asdict(running), quiet=False,
    )  # fmt: skip
    if json:
        print_json(result.as_json())
        return result.exit_code
    auditing.render_audit(result, console())
    print(f"look at {result.report}", file=sys.stderr)
    return result.exit_code
