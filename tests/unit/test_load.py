"""Loading: nothing in a file is run, everything that fails says what to do, and one model is loaded once."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from curate.errors import CurateWarning, ModelError, UsageError
from curate.models import precision
from curate.models.load import load_model


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Unfit:
    """A call that a weights-only unpickler allows and that raises TypeError, upon which open_clip tries again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (3,)


def test_a_checkpoint_of_ours_loads(tiny_checkpoint: Path, tiny_softmax_checkpoint: Path) -> None:
    """Loss type, scale and bias are read from the weights."""
    sigmoid, softmax = load_model(str(tiny_checkpoint)), load_model(str(tiny_softmax_checkpoint))
    assert (sigmoid.loss, round(sigmoid.scale, 3), sigmoid.bias) == ("sigmoid", 10.0, -5.0)
    assert (softmax.loss, round(softmax.scale, 3), softmax.bias) == ("softmax", 14.286, 0.0)
    assert sigmoid.identity.differences(softmax.identity)


def test_one_model_is_loaded_once(tiny_checkpoint: Path) -> None:
    """The same name gives the same object, with or without open_clip's prefix; a rewritten checkpoint does not."""
    assert load_model(str(tiny_checkpoint)) is load_model(f"local-dir:{tiny_checkpoint}")


def test_a_rewritten_checkpoint_is_read_again(
    tiny_checkpoint: Path, tiny_softmax_checkpoint: Path, tmp_path: Path
) -> None:
    """A directory whose weights changed gives the new model."""
    place = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, place)
    before = load_model(str(place))
    shutil.rmtree(place)
    shutil.copytree(tiny_softmax_checkpoint, place)
    assert load_model(str(place)).loss == "softmax" != before.loss


@pytest.mark.parametrize("before", [[], [Unfit()]])
@pytest.mark.parametrize("modern", [True, False])
def test_code_in_a_weight_file_does_not_run(
    before: list[Any], modern: bool, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle with code in it is refused, as a file and in a directory, even where the environment trusts it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copy(tiny_checkpoint / "open_clip_config.json", directory)
    weights = directory / "open_clip_pytorch_model.bin"
    if modern:
        torch.save({"state_dict": [*before, Hostile(marker)]}, weights)
    else:
        weights.write_bytes(pickle.dumps({"state_dict": [*before, Hostile(marker)]}))
    for spec in (str(directory), f"ViT-B-32:{weights}"):
        with pytest.raises(ModelError, match="could run code"):
            load_model(spec)
    assert not marker.exists()


def test_remote_tokenizer_code_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A configuration cannot switch on foreign code through the tokenizer's settings."""
    place = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, place)
    config = json.loads((place / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (place / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(str(place))


def test_a_safe_pickle_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Plain weights in a pickle give the embeddings of the safetensors file, and the same digest."""
    from safetensors.torch import load_file

    place = tmp_path / "model"
    place.mkdir()
    shutil.copy(tiny_checkpoint / "open_clip_config.json", place)
    torch.save({"state_dict": load_file(tiny_checkpoint / "open_clip_model.safetensors")}, place / "model.pth")
    assert load_model(str(place)).identity.differences(load_model(str(tiny_checkpoint)).identity) == []


def test_missing_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A configuration alone is not silently taken as an untrained model."""
    shutil.copy(tiny_checkpoint / "open_clip_config.json", tmp_path)
    with pytest.raises(ModelError, match="no weights"):
        load_model(str(tmp_path))


def test_damaged_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A cut safetensors file is a ModelError that names the model."""
    place = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, place)
    weights = place / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=str(place)):
        load_model(str(place))


@pytest.mark.parametrize("name", ["hf-hub:nobody/nothing", "ViT-B-32:laion2b_s34b_b79k"])
def test_without_network_the_message_says_how_to_fetch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not cached name the command that fetches them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set\), run `hf download \w+/"):
        load_model(name)


def test_untrained_is_announced_and_seeded() -> None:
    """An architecture alone warns; one seed gives one model and leaves the global random state alone."""
    state = torch.get_rng_state()
    with pytest.warns(CurateWarning, match="untrained"):
        one = load_model("curate-tiny", seed=3)
    with pytest.warns(CurateWarning, match="untrained"):
        other = load_model("curate-tiny", seed=4)
    assert one.identity.checkpoint != other.identity.checkpoint
    assert torch.equal(state, torch.get_rng_state())


def test_bfloat16_is_measured(tiny_checkpoint: Path) -> None:
    """An explicit bfloat16 model stores how far its cosines are from float32 and shares everything else."""
    model = load_model(str(tiny_checkpoint), precision="bf16", device="cpu")
    assert 0 < model.rounding <= precision.COSINE_BOUND
    assert model.identity.differences(load_model(str(tiny_checkpoint), precision="fp32").identity) == [
        "precision: bf16 here, fp32 in the cache"
    ]


def test_bfloat16_that_rounds_too_much_falls_back(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was not asked for, bfloat16 above the bound gives way to float32, with the figure."""
    monkeypatch.setattr("curate.models.load.COSINE_BOUND", 1e-9)
    monkeypatch.setattr("curate.models.load.choose_precision", lambda *_: "bf16")
    monkeypatch.setattr("curate.models.load._loaded", OrderedDict())
    with pytest.warns(CurateWarning, match="float32 is used instead"):
        assert load_model(str(tiny_checkpoint)).identity.precision == "fp32"


def test_unknown_device() -> None:
    """A device that is not there is refused before anything is loaded."""
    with pytest.raises(UsageError, match="not available"):
        load_model("curate-tiny", device="cuda:77")


def test_cpu_flags(tmp_path: Path) -> None:
    """The CPU's own list of instructions decides; a machine without one has no bfloat16."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n")
    assert "avx512_bf16" in precision._cpu_flags(tmp_path / "cpuinfo")
    assert precision._cpu_flags(tmp_path / "absent") == []


def test_a_model_is_not_pickled(tiny_checkpoint: Path) -> None:
    """A model does not travel between processes."""
    with pytest.raises(TypeError, match="send its spec"):
        pickle.dumps(load_model(str(tiny_checkpoint)))
