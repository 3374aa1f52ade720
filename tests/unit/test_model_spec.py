"""Names of models: what each form means, and what a wrong one answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.errors import ModelError
from curate.models.spec import parse_spec


def test_architecture_with_tag() -> None:
    """An architecture and a tag of open_clip are told apart at the colon."""
    spec = parse_spec("ViT-B-32:laion2b_s34b_b79k")
    assert (spec.kind, spec.architecture, spec.location) == ("tag", "ViT-B-32", "laion2b_s34b_b79k")


def test_architecture_with_weight_file(tmp_path: Path) -> None:
    """A path after the colon is a weight file."""
    (tmp_path / "epoch_1.pt").write_bytes(b"x")
    spec = parse_spec(f"ViT-B-32:{tmp_path}/epoch_1.pt")
    assert (spec.kind, spec.location) == ("file", str(tmp_path / "epoch_1.pt"))


def test_bare_architecture_is_untrained() -> None:
    """Without weights the model is untrained; our own configurations count as architectures."""
    assert parse_spec("ViT-S-32-alt").kind == parse_spec("curate-tiny").kind == "untrained"


def test_hub_repository() -> None:
    """A hub model keeps its repository and its open_clip name."""
    spec = parse_spec("hf-hub:org/name")
    assert (spec.kind, spec.location, spec.open_clip_name) == ("hub", "org/name", "hf-hub:org/name")


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_directory(form: str, tmp_path: Path) -> None:
    """A directory with a configuration is a checkpoint, with or without open_clip's prefix."""
    (tmp_path / "open_clip_config.json").write_text("{}")
    spec = parse_spec(form.format(tmp_path))
    assert (spec.kind, spec.open_clip_name) == ("directory", f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B32", "did you mean ViT-B-32"),
        ("ViT-B-32:laion2b_s34b_b79", "did you mean laion2b_s34b_b79k"),
        ("ViT-S-32-alt:openai", "has no pretrained weights"),
        ("ViT-B-32:/nowhere/a.pt", "there is no weight file"),
        ("/nowhere/model", "there is no directory"),
        ("hf-hub:name", "hf-hub:organisation/name"),
        ("curate-tyni", "did you mean curate-tiny"),
    ],
)
def test_wrong_name_says_what_exists(name: str, message: str) -> None:
    """A name that does not exist is answered with the nearest that does."""
    with pytest.raises(ModelError, match=message):
        parse_spec(name)


def test_directory_without_configuration(tmp_path: Path) -> None:
    """A directory that is no checkpoint says what a checkpoint holds."""
    with pytest.raises(ModelError, match=r"open_clip_config\.json and open_clip_model\.safetensors"):
        parse_spec(str(tmp_path))
