"""Groups from what a sample brings along: its URL's country, its size and shape, any column of the ledger.

What the selection itself decided (status, score, times selected) is refused as a group: kept samples would be kept.
"""

# N samples

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from curate.auditing.columns import MOST_GROUPS, UNKNOWN, Column, column_of, shown
from curate.errors import UsageError

OUTCOMES: Final = frozenset(
    (
        "status", "reason", "detail", "score", "sub_batch", "rank", "chunk", "times_selected", "out_shard", "out_key",
    )
)  # fmt: skip
# ISO 3166-1 alpha-2, with uk and eu, which are top-level domains too.
_COUNTRIES: Final = """
    ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bl bm bn bo bq br bs bt bv bw by bz
    ca cc cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg eh er es et eu fi fj fk fm fo fr
    ga gb gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je jm jo jp
    ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mf mg mh mk ml mm mn mo mp mq mr ms mt
    mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw
    sa sb sc sd se sg sh si sj sk sl sm sn so sr ss st sv sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug
    uk um us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw"""
COUNTRIES: Final = frozenset(_COUNTRIES.split())
# Sold to everyone for what they spell: they say nothing about a country.
_SPELLINGS: Final = """
    ac ai am as bz cc cd co fm gg gl io la ly me mn ms nu pw sc sh st su tk to tv vc ws"""
SPELLINGS: Final = frozenset(_SPELLINGS.split())
# Country domains in other scripts, as they are on the wire.
IDN_COUNTRIES: Final = {
    "xn--p1ai": "ru", "xn--fiqs8s": "cn", "xn--fiqz9s": "cn", "xn--j6w193g": "hk", "xn--kprw13d": "tw",
    "xn--kpry57d": "tw", "xn--3e0b707e": "kr", "xn--h2brj9c": "in", "xn--j1amh": "ua", "xn--90a3ac": "rs",
    "xn--o3cw4h": "th", "xn--wgbh1c": "eg", "xn--mgbaam7a8h": "ae", "xn--mgberp4a5d4ar": "sa", "xn--qxam": "gr",
    "xn--90ais": "by", "xn--node": "ge", "xn--y9a3aq": "am", "xn--d1alf": "mk", "xn--90ae": "bg",
}  # fmt: skip
SIZES: Final = ((256, "below 256"), (512, "256 to 511"), (1024, "512 to 1023"))
LARGEST_SIZE: Final = "1024 and above"
SHAPES: Final = ((0.5, "tall"), (0.8, "portrait"), (1.25, "square"), (2.0, "landscape"))
WIDEST_SHAPE: Final = "wide"


def country_column(urls_N: Sequence[str | None], *, source: str = "url in the sample's json") -> Column:
    """The country whose top-level domain an image's URL has: where it was hosted, not what or whom it shows.

    Domains that are sold for what they spell (.io, .tv, .co) and those of no country are groups of their own.
    """
    provenance = f"top-level domain of {source}: where the image was hosted, not what it shows"
    return column_of([country_of(url) for url in urls_N], name="url country", kind="metadata", provenance=provenance)


def country_of(url: str | None) -> str | None:
    """The country code, "no country (generic domain)", "no country (sold for its spelling)", "address", or None.

    >>> [country_of(url) for url in ("https://a.co.uk/x.jpg", "http://b.com", "http://1.2.3.4/", "b.de")]
    ['gb', 'no country (generic domain)', 'address', None]
    """
    try:
        host = (urlsplit(url or "").hostname or "").rstrip(".")
        last = host.rpartition(".")[2].encode("idna").decode("ascii").lower()
    except ValueError:  # UnicodeError is one: no URL, or a name that no domain has
        return None
    if ":" in host or last.isdigit():
        return "address"
    if "." not in host or not last:
        return None
    if last in SPELLINGS:
        return "no country (sold for its spelling)"
    code = IDN_COUNTRIES.get(last, last if last in COUNTRIES else None)
    return "no country (generic domain)" if code is None else {"uk": "gb"}.get(code, code)


def size_column(width_N: NDArray[Any], height_N: NDArray[Any]) -> Column:
    """Classes of the shorter side in pixels; unknown where either is 0 or less (nulls are read as 0)."""
    shorter_N = np.minimum(width_N, height_N)
    return _classes("image size", "shorter side in pixels, as decoded", shorter_N, SIZES, LARGEST_SIZE, shorter_N > 0)


def shape_column(width_N: NDArray[Any], height_N: NDArray[Any]) -> Column:
    """Classes of width / height: tall < 0.5 <= portrait < 0.8 <= square < 1.25 <= landscape < 2 <= wide."""
    known_N = np.minimum(width_N, height_N) > 0
    ratio_N = width_N / np.maximum(height_N, 1)
    return _classes("image shape", "width / height, as decoded", ratio_N, SHAPES, WIDEST_SHAPE, known_N)


def _classes(
    name: str, provenance: str, value_N: NDArray[Any], edges: tuple[tuple[float, str], ...], last: str,
    known_N: NDArray[np.bool_],
) -> Column:  # fmt: skip
    code_N = np.searchsorted([edge for edge, _ in edges], value_N, side="right")
    codes_N = np.where(known_N, code_N, UNKNOWN).astype(np.int32)
    return Column(name, "metadata", provenance, (*(label for _, label in edges), last), codes_N)


def ledger_column(table: pa.Table, name: str, *, bins: int = 4) -> Column:
    """Any column of the ledger: text, true and false as they are; numbers of more than 20 values in `bins` quantiles.

    Errors: UsageError for a column that is not there, that the selection itself made, or with too many values.
    """
    if name not in table.column_names:
        raise UsageError(f"no column {shown(name)!r} in the ledger; there are: {', '.join(table.column_names)}")
    if name in OUTCOMES:
        raise UsageError(f"{name!r} is what the selection did; its groups cannot show what the selection left out")
    column, kind = table[name], table[name].type
    provenance = f"{name!r} in the ledger"
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if number and pc.count_distinct(column).as_py() > 20:
        return quantile_column(column.cast(pa.float64()).to_numpy(), name=name, provenance=provenance, bins=bins)
    if not (number or pa.types.is_string(kind) or pa.types.is_boolean(kind)):
        raise UsageError(f"{name!r} holds {kind}; groups are text, numbers or true and false")
    if pa.types.is_string(kind) and (distinct := pc.count_distinct(column).as_py()) > MOST_GROUPS:
        raise UsageError(f"{name!r} has {distinct:,} distinct values; an audit compares at most {MOST_GROUPS:,} groups")
    return field_column(column.to_pylist(), name=name, provenance=provenance)


def field_column(values_N: Sequence[Any], *, name: str, provenance: str) -> Column:
    """A field of the samples' json: text, numbers, true and false; anything else, blank text and NaN are unknown."""
    return column_of([label_of(value) for value in values_N], name=name, kind="metadata", provenance=provenance)


def quantile_column(value_N: NDArray[np.float64], *, name: str, provenance: str, bins: int = 4) -> Column:
    """Numbers in classes of about equal size; equal numbers stay together, and what is not finite is unknown.

    The names show what is in each: "1 to 20". Fewer classes where numbers repeat.
    """
    known_N = np.isfinite(value_N)
    known = value_N[known_N]
    if not len(known):
        return Column(shown(name), "metadata", provenance, (), np.full(len(value_N), UNKNOWN, np.int32))
    edges = np.unique(np.quantile(known, np.arange(1, bins) / bins, method="inverted_cdf"))
    code, used = np.searchsorted(edges, known, side="left"), []
    for one in np.unique(code):
        inside = known[code == one]
        used.append(f"{inside.min():.6g} to {inside.max():.6g}")
    codes_N = np.full(len(value_N), UNKNOWN, np.int32)
    codes_N[known_N] = np.unique(code, return_inverse=True)[1]
    names = tuple(used) if len(set(used)) == len(used) else tuple(f"{n}: {one}" for n, one in enumerate(used, 1))
    return Column(shown(name), "metadata", f"{provenance}, in {len(used)} classes of about equal size", names, codes_N)


def label_of(value: Any) -> str | None:
    """A value of a field as the name of a group; None where it names none."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and np.isfinite(value)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return None
