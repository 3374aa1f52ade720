"""A policy as a verb is given it: read and checked before any work, and pinned word for word."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from curate.errors import UsageError
from curate.marked_yaml import parse_yaml, read_yaml
from curate.policy.schema import Policy, check_policy
from curate.settings import PolicySettings, checked
from curate.storage import file_digest

File = str | PathLike[str]


@dataclass(frozen=True, slots=True)
class GivenPolicy:
    """What is pinned, the policy that it says, and where its labels are now (None: nowhere, or it needs none)."""

    settings: PolicySettings
    policy: Policy
    labels: Path | None = None


def given_policy(policy: File | None, labels: File | None = None, on: str | None = None) -> GivenPolicy | None:
    """What --policy, --labels and --on say; None without any of them. `on` is key unless given.

    Errors: UsageError naming file, line and field; for a file that is not there; and for labels without a policy.
    """
    if policy is None:
        if labels is not None or on is not None:
            option = "--on" if labels is None else "--labels"
            raise UsageError(f"{option}: labels give groups to a policy; name that too, with --policy FILE")
        return None
    if on is not None and labels is None:
        raise UsageError("--on says how labels are joined; name them too, with --labels FILE")
    path, file = _path(policy), None if labels is None else _path(labels)
    found = check_policy(read_yaml(path))
    values = {"text": path.read_text("utf-8"), "labels": None if file is None else _digest(file)}
    settings = checked(PolicySettings, values | ({} if on is None else {"on": on}))
    return GivenPolicy(settings, found, file)


def pinned_policy(settings: PolicySettings, where: Path) -> GivenPolicy:
    """The policy that the record at `where` pins."""
    return GivenPolicy(settings, check_policy(parse_yaml(settings.text, f"the policy in {where}")))


def _path(file: File) -> Path:
    return Path(file).expanduser().absolute()


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
