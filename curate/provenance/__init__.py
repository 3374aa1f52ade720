"""The papers of a written dataset: `README.md` (a data card) and `croissant.json`, made from its record and manifest.

Both are functions of `RUN.json`, `manifest.json` and `certificate.json` alone, without a clock or a path of the output:
a resumed, repeated or copied run has the same bytes, and `curate verify` makes them anew to compare.
"""

from curate.provenance.keeping import add_findings, make_cards
from curate.provenance.lineage import CARDS, Findings, Lineage

__all__ = ["CARDS", "Findings", "Lineage", "add_findings", "make_cards"]
