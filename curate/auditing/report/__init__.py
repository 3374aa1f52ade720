"""The report of an audit: one HTML file that needs no network, to read, to print, and to attach to a paper.

    galleries.drawn(...), galleries.medoids(...)    which rows to show, by a hash of their ids
    galleries.fetch(...)                            their pictures, from the original shards
    page.render_report(audit, ...)                  the file, as text

Findings stand on top, then a policy's verdict, the figures, a table per column, galleries, and how to read it all.
"""

from __future__ import annotations

from curate.auditing.report.galleries import Gallery, Strip, Tile, drawn, fetch, medoids
from curate.auditing.report.page import render_report

__all__ = ["Gallery", "Strip", "Tile", "drawn", "fetch", "medoids", "render_report"]
