"""Read what a user wrote after --reference or --learner: which model, from where. Costs nothing, touches no network.

ViT-B-32:laion2b_s34b_b79k      an open_clip architecture and one of its pretrained tags
ViT-B-32:/models/epoch_20.pt    an open_clip architecture and a weight file
hf-hub:org/name                 a repository on the Hugging Face hub with an open_clip_config.json
local-dir:/models/mine          a directory with an open_clip_config.json and weights
/models/mine                    the same, as `curate train` writes it
ViT-B-32, curate-tiny           an architecture alone: untrained, from a seed, for comparisons and tests
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from curate.errors import ModelError
from curate.models.configs import CONFIGS

Kind = Literal["tag", "file", "hub", "directory", "untrained"]
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
FEEDFORWARD_FILE = "curate_feedforward.json"  # beside them where a model has fast feedforward layers


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A parsed model name. `location` is the tag, the file, the repository or the directory; "" where untrained."""

    text: str
    kind: Kind
    architecture: str
    location: str

    @property
    def absolute(self) -> str:
        """The name to hand to another process: paths made absolute, the rest as written."""
        if self.kind == "directory":
            return self.location
        return f"{self.architecture}:{self.location}" if self.kind == "file" else self.text

    @property
    def open_clip_name(self) -> str:
        """The name that `open_clip.create_model` and `open_clip.get_tokenizer` take."""
        if self.kind == "directory":
            return f"local-dir:{self.location}"
        return f"hf-hub:{self.location}" if self.kind == "hub" else self.architecture


def parse_spec(text: str) -> ModelSpec:
    """Parse a model name.

    Errors: ModelError, with the nearest known names, where the name, the tag or the path does not exist.
    Example: `parse_spec("ViT-B-32:openai")` has kind "tag", architecture "ViT-B-32" and location "openai".
    """
    text = text.strip()
    if text.startswith("hf-hub:"):
        return _hub(text)
    if text.startswith("local-dir:"):
        return _directory(text, Path(text.removeprefix("local-dir:")))
    path = Path(text).expanduser()
    if path.is_dir() or text.startswith((".", "/", "~")):
        return _directory(text, path)
    architecture, colon, location = text.partition(":")
    architecture = _known_architecture(architecture, text)
    if not colon:
        return ModelSpec(text, "untrained", architecture, "")
    return _weights_of(architecture, location, text)


def _hub(text: str) -> ModelSpec:
    repository = text.removeprefix("hf-hub:")
    if len(repository.split("/")) != 2 or not all(repository.split("/")):
        raise ModelError(f"model {text!r}: a hub model is written hf-hub:organisation/name")
    return ModelSpec(text, "hub", "", repository)


def _directory(text: str, path: Path) -> ModelSpec:
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise ModelError(f"model {text!r}: there is no directory {path}")
    if not (path / CONFIG_FILE).is_file():
        raise ModelError(
            f"model {text!r}: {path} holds no {CONFIG_FILE}; a checkpoint is a directory with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}, as `curate train` writes it"
        )
    return ModelSpec(text, "directory", "", str(path))


def _known_architecture(name: str, text: str) -> str:
    import open_clip

    known = [*open_clip.list_models(), *CONFIGS]
    cleaned = name.replace("/", "-")
    if cleaned in known:
        return cleaned
    raise ModelError(
        f"model {text!r}: no architecture is called {name!r}{_nearest(name, known)}; "
        "`python -c 'import open_clip; print(open_clip.list_models())'` lists them"
    )


def _weights_of(architecture: str, location: str, text: str) -> ModelSpec:
    import open_clip

    if open_clip.get_pretrained_cfg(architecture, location):
        return ModelSpec(text, "tag", architecture, location)
    if Path(location).expanduser().is_file():
        return ModelSpec(text, "file", architecture, str(Path(location).expanduser().absolute()))
    if "/" in location:
        raise ModelError(f"model {text!r}: there is no weight file {location}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not tags:
        raise ModelError(
            f"model {text!r}: {architecture} has no pretrained weights in open_clip; "
            f"write {architecture} alone for an untrained one, or {architecture}:/path/to/weights"
        )
    raise ModelError(
        f"model {text!r}: {architecture} has no weights tagged {location!r}{_nearest(location, tags)}; "
        f"its tags are {', '.join(tags)}"
    )


def _nearest(name: str, known: list[str]) -> str:
    lowered = {k.lower(): k for k in known}
    close = [lowered[k] for k in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    return f"; did you mean {' or '.join(close)}?" if close else ""
