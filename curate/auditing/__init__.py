"""Auditing a selection: groups of samples (columns), what the selection did to each, and how sure one can be."""
