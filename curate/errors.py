"""What can go wrong, as exceptions: one tree, and the exit code that the command line gives each branch.

    CurateError                 1   something failed; the message says what, where and what next
    |-- UsageError              2   the arguments cannot be met
    |   |-- RunMismatch         2   the output belongs to a run with another configuration or other inputs
    |   `-- CacheMismatch       2   cached embeddings come from another checkpoint, preprocessing or tokenizer
    |-- ShardError              1   a shard cannot be opened at all
    |-- ModelError              1   a model cannot be built or its weights cannot be loaded safely
    |-- StorageError            1   the output cannot be written (full, read-only, not permitted)
    |-- LossAboveTolerance      3   the run finished, but lost more samples than --tolerance allows
    `-- VerificationError       4   the files contradict each other

A bad *sample* is never an exception that a caller sees: it is a row of the ledger with a reason (`curate.reasons`).
"""

from __future__ import annotations


class CurateError(Exception):
    """Base of everything that curate raises on purpose."""

    exit_code = 1


class UsageError(CurateError):
    """The arguments cannot be met."""

    exit_code = 2


class RunMismatch(UsageError):
    """The output directory belongs to another run."""


class CacheMismatch(UsageError):
    """Cached embeddings were made by another model, preprocessing or tokenizer."""


class ShardError(CurateError):
    """A shard cannot be opened at all."""


class ModelError(CurateError):
    """A model cannot be built, or its weights cannot be loaded safely."""


class StorageError(CurateError):
    """The output cannot be written."""


class LossAboveTolerance(CurateError):
    """The run finished, but lost more than its tolerance."""

    exit_code = 3


class VerificationError(CurateError):
    """The files of a finished run contradict each other."""

    exit_code = 4


class CurateWarning(UserWarning):
    """A slow path or a surprising choice that the user should know of, with a measured number where there is one."""
