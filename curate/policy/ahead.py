"""What of a policy can be refused before a pool is scored: names that no sample has, groups that no column can have.

Captions and json are read for a policy anyway, at some 8,000 samples/s and core; read before the models run, they cost
nothing more, and a field with a slip in its name is told in minutes rather than after the scores. Every shard is looked
at, so that a field of the last one alone is found, too. What is refused here would be refused later: the samples that
can be scored are among those looked at.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import pyarrow as pa

from curate.auditing.clusters import default_clusters
from curate.auditing.given_columns import MOST_NUMBERS, json_column
from curate.auditing.lexicons import SETS
from curate.auditing.own_columns import CLUSTERS, COPIES, own_columns
from curate.auditing.request import AuditRequest
from curate.auditing.traits import FIELD
from curate.errors import UsageError
from curate.policy.columns import OURS, names_of, refuse_missing, request_of, with_crossed
from curate.policy.given import GivenPolicy

SCORED: Final = (COPIES, CLUSTERS)  # made of what the reference's pass leaves of each image: its hashes, its embedding
_READ: Final = ("caption script", "caption language", "url country")  # whose groups are those that the captions have
_MADE_OF: Final = {COPIES: "hashes of the images", CLUSTERS: "embeddings of a reference"}


def scored_names(given: GivenPolicy | None) -> tuple[str, ...]:
    """The columns of a policy that are not known before the reference's pass, what it holds fixed among them."""
    if given is None:
        return ()
    named, held = names_of(given)
    labelled = request_of(given).label_columns
    return tuple(name for name in SCORED if name in (*named, *held) and name not in labelled)


def refuse_without_reference(given: GivenPolicy) -> None:
    """Errors: UsageError with line and field for a column that only a reference's pass makes; a training has none."""
    scored = scored_names(given)
    for number, column in enumerate(given.policy.columns):
        places = [("intersect" if column.crossed else "column", column.parts), ("confounders", column.confounders)]
        for key, names in places:
            for name in (one for one in names if one in scored):
                raise given.policy.marked.error(
                    ("columns", number, key),
                    f"{name!r} is made of {_MADE_OF[name]}, which the pass of a reference leaves: name one with "
                    "--reference (under --criterion uniform or hard-learner it groups and does not choose), or give "
                    "the groups as labels, such as the assignments.parquet of an audit of this pool",
                )


def check_clusters(given: GivenPolicy, samples: int) -> None:
    """Errors: UsageError with line and field for an embedding cluster that a pool of so many samples cannot have."""
    if CLUSTERS in scored_names(given):
        names = [f"cluster {number}" for number in range(default_clusters(samples))]
        given.policy.require({CLUSTERS: names}, all_known=False)


def reads_pool(given: GivenPolicy) -> bool:
    """Does the policy speak of anything that only the samples' captions and json can tell?"""
    named, held = names_of(given)
    fixed = {*request_of(given).label_columns, *OURS, *(f"caption mentions: {name}" for name in SETS)}
    return not fixed - {*_READ} >= {*named, *held}


def check_pool(given: GivenPolicy, traits: pa.Table, beside: Collection[str]) -> None:
    """Look for columns and groups in the `traits` of all samples of a pool, which has the columns `beside` them.

    Errors: UsageError with line and field for what no sample has. Example: `genere` where the json has `genre` is
    "p.yaml:6: columns.0.column: no column is called 'genere'; did you mean 'genre'?".
    """
    request = request_of(given)
    refuse_missing(given, request, beside, traits)
    given.policy.require(with_crossed(given.policy, _groups(given, request, traits)), all_known=False)


def _groups(given: GivenPolicy, request: AuditRequest, traits: pa.Table) -> Mapping[str, Sequence[str]]:
    """The groups of the columns that the traits alone make; none of one whose groups hang on who can be scored."""
    found: dict[str, Sequence[str]] = {}
    groups: Sequence[str] | None
    own = own_columns(pa.table({}), traits)
    for name in names_of(given)[0]:
        if name in request.label_columns:
            continue
        field, groups = FIELD + name.removeprefix(FIELD), None
        if name in _READ:
            column = own[name]()
            groups = None if column is None else column.names
        elif name not in OURS and field in traits.column_names:
            groups = _field_groups(traits[field], name)
        found |= {} if groups is None else {name: groups}
    return found


def _field_groups(texts_N: pa.ChunkedArray, name: str) -> Sequence[str] | None:
    """None for nothing, for too many, and for numbers that may be put into classes, which hang on what there is."""
    values = [json.loads(text) for text in texts_N.unique().drop_null().to_pylist()]
    numbers = sum(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not values or numbers > MOST_NUMBERS:
        return None
    try:
        return json_column(texts_N, name).names
    except UsageError:
        return None
