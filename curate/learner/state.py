"""Where a run can be taken up again: one safetensors file with weights, optimiser, random state and a JSON of the rest.

A file is written beside its name, synced and renamed, so it is complete or absent; nothing in it is a pickle. The last
two are kept. Tensors are named "model.NAME", "optimiser.NUMBER.KEY", "random.DEVICE" and "extra.NAME".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from curate.errors import VerificationError
from curate.storage import make_directory, remove, replace_file

_NAME = re.compile(r"step-(\d{8})\.safetensors")
KEPT = 2


@dataclass(frozen=True, slots=True)
class State:
    """What a file holds: the step after which it was taken, tensors by name, and the rest."""

    step: int
    tensors: dict[str, Tensor]
    rest: dict[str, Any]


def capture(
    step: int, module: nn.Module, optimiser: torch.optim.Optimizer, extra: Mapping[str, Tensor], rest: dict[str, Any]
) -> State:
    """The present state of a run; tensors are copied to the CPU."""
    tensors = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    plain: dict[str, Any] = {}
    for number, values in optimiser.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{number}.{key}"] = value
            else:
                plain[f"{number}.{key}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors |= {f"extra.{name}": tensor for name, tensor in extra.items()}
    copied = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return State(step, copied, rest | {"optimiser": plain})


def restore(state: State, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Put a state into a module and an optimiser that were built alike; returns the extra tensors.

    Errors: VerificationError where the file is of another model.
    """
    parts = _by_kind(state.tensors)
    try:
        module.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise VerificationError(
            f"the state of step {state.step} is of another model ({error}); --overwrite begins anew"
        ) from error
    values: dict[int, dict[str, Any]] = {}
    for name, value in (*parts["optimiser"].items(), *state.rest["optimiser"].items()):
        number, _, key = name.partition(".")
        values.setdefault(int(number), {})[key] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": values})
    _laid_out(optimiser)
    torch.set_rng_state(parts["random"]["cpu"])
    if "cuda" in parts["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(parts["random"]["cuda"])
    return parts["extra"]


def _laid_out(optimiser: torch.optim.Optimizer) -> None:
    """Moments in the memory layout of their parameters: a fused update walks both as they lie (channels last)."""
    for parameter, values in optimiser.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter).copy_(value)


def write_state(directory: Path, state: State) -> Path:
    """Write a state and forget all but the last two. Errors: StorageError, with the earlier states as they were."""
    make_directory(directory)
    path = directory / f"step-{state.step:08d}.safetensors"
    replace_file(path, save(state.tensors, metadata={"curate": json.dumps({"step": state.step, **state.rest})}))
    for _, old in states(directory)[:-KEPT]:
        remove(old)
    return path


def states(directory: Path) -> list[tuple[int, Path]]:
    """The steps that a directory holds states of, in order."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(found[1]), path) for path in paths if (found := _NAME.fullmatch(path.name)))


def read_state(directory: Path) -> State | None:
    """The latest state, or None where there is none. Errors: VerificationError for a damaged file."""
    found = states(directory)
    if not found:
        return None
    step, path = found[-1]
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            rest = json.loads(file.metadata()["curate"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise VerificationError(
            f"{path} is damaged ({error}); remove it to resume from the state before it, or --overwrite"
        ) from error
    rest.pop("step")
    return State(step, tensors, rest)


def _by_kind(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimiser": {}, "random": {}, "extra": {}}
    for name, tensor in tensors.items():
        kind, _, inner = name.partition(".")
        parts[kind][inner] = tensor
    return parts
