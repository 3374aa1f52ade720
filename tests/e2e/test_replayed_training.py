"""A training done again in plain torch from the shards that it teed: the same weights, by any loader.

The loop below is torch's own but for the forward pass: open_clip computes all positions of a caption, the trainer those
up to the longest of a batch. They round differently, and Adam divides what is left by its own size: a bias of attention
keys, whose gradient is zero, moves by rounding alone. So bits are compared with the trainer's forward pass, and with
open_clip's the losses and all but those biases.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import webdataset
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import curate
from curate.images.decode import decode_rgb
from curate.learner.embedding import embed_pairs
from curate.learner.journal import read_log
from curate.learner.resolution import FlexiProblem, low_size, shrink
from curate.learner.settings import parse_settings
from curate.learner.start import prepare
from curate.loaders.replay import replay
from curate.models import configs
from curate.models.preprocess import Preprocess
from curate.pipelines.training import train
from tests.conftest import MINI, make_checkpoint
from tests.e2e.pools import make_pool
from tests.making import make_samples, make_tar

# b sub-batch, C channels, H, W height and width, T tokens, D width

Batches = Iterable[tuple[Tensor, Tensor]]  # uint8 images [b, C, H, W] and token ids [b, T]
VIT: dict[str, Any] = {
    **MINI, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
}  # fmt: skip
QUICK: dict[str, Any] = {
    "batch": 4, "steps": 9, "lr": 3e-3, "filter_ratio": 0.5, "device": "cpu", "precision": "fp32", "engine": "inline",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "uniform": {"criterion": "uniform"},
    "softmax": {"criterion": "uniform", "loss": "softmax", "weight_decay": 0.3, "clip_gradient": 0.1},
    "all phases": {"criterion": "learnability", "handover": "0:learnability@10,3:trim@0.6,6:uniform"},
    "lag": {"criterion": "learnability", "handover": "off", "lag": 2},
}


@dataclass(frozen=True, slots=True)
class Trained:
    """A run, where it teed to, and the model that it began with."""

    run: Path
    teed: Path
    start: Path

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.run / "open_clip_model.safetensors")

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in read_log(self.run / "log.jsonl") if line["kind"] == "step"]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the training, as the shards that it teed have them."""
        found: dict[str, Any] = json.loads((self.teed / "_curate" / "RUN.json").read_bytes())["settings"]["train"]
        return found

    def model(self) -> Any:
        return open_clip.create_model(f"local-dir:{self.start}")

    def tokenizer(self) -> Any:
        return open_clip.get_tokenizer(f"local-dir:{self.start}")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pairs"), shards=2, samples=20)


@pytest.fixture(scope="module", params=[(kind, name) for kind in ("resnet", "vit") for name in RUNS])
def trained(request: pytest.FixtureRequest, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run of each kind of tower and draw, and what it chose."""
    kind, name = request.param
    folder, settings = tmp_path_factory.mktemp("trained"), RUNS[name]
    loss = settings.get("loss", "sigmoid")
    start = make_checkpoint(folder / "start", loss, config=VIT if kind == "vit" else MINI, seed=3)
    reference = {"reference": str(make_checkpoint(folder / "reference", loss))} if "handover" in settings else {}
    return trained_from(start, pairs, folder, **reference, **settings)


def trained_from(start: Path, shards: Path, folder: Path, **settings: Any) -> Trained:
    run = train(
        [shards], folder / "run", model=f"local-dir:{start}", write_shards=folder / "teed", **QUICK | settings
    ).path  # fmt: skip
    return Trained(run, folder / "teed", start)


def sub_batches(trained: Trained) -> Batches:
    """torch's DataLoader over `curate.SubBatches`, two workers."""
    rule = Preprocess.from_config(trained.model().visual.preprocess_cfg)
    pixels = functools.partial(_pixels, rule)
    batches: Any = curate.SubBatches(trained.teed, transform=pixels, tokenizer=trained.tokenizer())
    for batch in DataLoader(batches, batch_size=None, num_workers=2):
        yield batch.images, batch.captions


def replayed(trained: Trained) -> Batches:
    """`replay`, which decodes as the trainer does."""
    for batch in replay(trained.teed, trained.model(), trained.tokenizer()):
        yield batch.images, batch.captions


def plain_webdataset(trained: Trained) -> Batches:
    """webdataset over the tars, in order, as many pairs at a time as a step had: nothing of curate but the pixels."""
    rule, tokenize = Preprocess.from_config(trained.model().visual.preprocess_cfg), trained.tokenizer()
    urls = [str(path) for path in sorted(trained.teed.glob("*.tar"))]
    loader = webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg", "txt").batched(QUICK["batch"])
    for images, captions in loader:
        image_bCHW = torch.from_numpy(np.stack([rule(decode_rgb(memoryview(image))[0]) for image in images]))
        yield image_bCHW, tokenize([text.decode() for text in captions])


def _pixels(rule: Preprocess, image: Any) -> Tensor:
    return torch.from_numpy(rule(np.asarray(image)))


def retrained(model: Any, batches: Batches, settings: dict[str, Any], *, as_trained: bool = True) -> list[float]:
    """The training once more, in plain torch, in place; the loss of each step. Otherwise than `as_trained`: with the
    forward pass of open_clip."""
    model.train()
    if as_trained:
        model.to(memory_format=torch.channels_last)
    taken = list(batches)
    optimiser, losses = adamw(model, settings), []
    for step, (image_bCHW, token_bT) in enumerate(taken):
        for group in optimiser.param_groups:
            group["lr"] = settings["lr"] * share_of(step, len(taken), settings["warmup"])
        optimiser.zero_grad()
        loss = loss_of(model, *embedded(model, image_bCHW, token_bT, settings if as_trained else None))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["clip_gradient"])
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        losses.append(float(loss.detach()))
    return losses


def adamw(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Matrices decay, all else and embeddings do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and "embedding" not in name].append(parameter)
    decays = [{"params": groups[True], "weight_decay": settings["weight_decay"]}]
    rest = [{"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(decays + rest, lr=settings["lr"], betas=tuple(settings["betas"]), fused=True)


def share_of(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine."""
    warm = max(1, round(warmup * steps))
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def embedded(model: Any, image_bCHW: Tensor, token_bT: Tensor, settings: dict[str, Any] | None) -> Any:
    """Unit vectors [b, D] of both sides: as the run made them by its settings, or as open_clip does."""
    if settings is not None and settings["scoring"] == "flexi":
        small_nChw = shrink(image_bCHW[1::2], low_size(model))
        return FlexiProblem(model).embed((image_bCHW[::2], small_nChw, torch.cat([token_bT[::2], token_bT[1::2]])))
    if settings is not None:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16"):
            return embed_pairs(model, image_bCHW, token_bT)
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = (image_bCHW / 255 - mean) / std
    return model.encode_image(pixels, normalize=True), model.encode_text(token_bT, normalize=True)


def loss_of(model: Any, image_bD: Tensor, text_bD: Tensor) -> Tensor:
    """The sigmoid loss of SigLIP where the model has a bias, else CLIP's."""
    logit_bb = model.logit_scale.exp() * image_bD @ text_bD.T
    if model.logit_bias is None:
        own_b = torch.arange(len(logit_bb))
        return (functional.cross_entropy(logit_bb, own_b) + functional.cross_entropy(logit_bb.T, own_b)) / 2
    sign_bb = 2 * torch.eye(len(logit_bb)) - 1
    return -functional.logsigmoid(sign_bb * (logit_bb + model.logit_bias)).sum() / len(logit_bb)


def differing(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Tensors of the model that have not the bits of these weights."""
    state = model.state_dict()
    assert state.keys() == weights.keys()
    return [name for name, tensor in state.items() if not torch.equal(tensor, weights[name])]


@pytest.mark.parametrize("loader", [sub_batches, replayed, plain_webdataset])
def test_replaying_ends_in_the_weights_of_the_run(trained: Trained, loader: Any) -> None:
    """Every bit of every weight and buffer, and every loss, whichever loader reads the shards."""
    model = trained.model()
    assert len(differing(model, trained.weights)) > 50
    losses = retrained(model, loader(trained), trained.settings)
    assert losses == trained.losses
    assert differing(model, trained.weights) == []


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("vit"), "sigmoid", config=VIT, seed=3)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"augment": True, "seed": 5}, id="augmented"),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"criterion": "hard-learner", "scoring": "flexi", "handover": "off"}, id="flexi"),
        pytest.param({"steps": None, "epochs": 1.3}, id="epochs"),
    ],
)
def test_settings_of_the_run_are_replayed(pairs: Path, vit: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Augmented images, bf16, two resolutions and an end by epochs: the same bits again."""
    trained = trained_from(vit, pairs, tmp_path, **settings)
    model = trained.model()
    assert retrained(model, replayed(trained), trained.settings) == trained.losses
    assert differing(model, trained.weights) == []


def test_large_images_need_the_trainers_decode(vit: Path, tmp_path: Path) -> None:
    """A JPEG of several times the model's size is decoded at a reduced scale: by `replay`, bit for bit; a full decode
    gives other pixels and other weights."""
    large = tmp_path / "large"
    large.mkdir()
    make_tar(large / "0.tar", make_samples(24, width=200, height=160))
    trained = trained_from(vit, large, tmp_path)
    model = trained.model()
    assert retrained(model, replayed(trained), trained.settings) == trained.losses
    assert differing(model, trained.weights) == []
    other = trained.model()
    assert retrained(other, sub_batches(trained), trained.settings) == pytest.approx(trained.losses, rel=0.01)
    assert len(differing(other, trained.weights)) > 50


def test_a_run_from_scratch_begins_with_what_prepare_builds(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initial weights follow from the settings in the shards' own record, and so do the last."""
    monkeypatch.setitem(configs.CONFIGS, "mini-vit", VIT)
    run = train([pairs], tmp_path / "run", model="mini-vit", write_shards=tmp_path / "teed", **QUICK | {"seed": 9}).path
    trained = Trained(run, tmp_path / "teed", run)  # preprocessing and tokenizer are those of the checkpoint
    start = prepare(parse_settings(trained.settings))
    assert retrained(start.module, replayed(trained), trained.settings) == trained.losses
    assert differing(start.module, trained.weights) == []


def close(model: nn.Module, weights: dict[str, Tensor], *, atol: float) -> bool:
    """Are all weights the same to `atol`, but for the biases of attention keys?"""
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in state.items():
        ours, theirs = tensor, weights[name]
        if name.endswith("in_proj_bias"):
            ours, theirs = (one.reshape(3, -1)[::2] for one in (ours, theirs))  # queries and values
        if not torch.allclose(ours, theirs, rtol=0, atol=atol):
            return False
    return True


def test_open_clip_alone_comes_to_the_same(pairs: Path, vit: Path, tmp_path: Path) -> None:
    """With open_clip's forward pass and its own transform of the images: losses to 1e-5, weights to a hundredth of a
    rate's 3e-3 where the run moved them by 15e-3."""
    trained = trained_from(vit, pairs, tmp_path)
    model = trained.model()
    losses = retrained(model, replayed(trained), trained.settings, as_trained=False)
    assert losses == pytest.approx(trained.losses, rel=1e-5)
    assert close(model, trained.weights, atol=1e-4)
    assert not close(trained.model(), trained.weights, atol=1e-3)


def test_shared_captions_and_a_reused_scoring_pass_round_otherwise(
    pairs: Path, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run embedded distinct captions once, or kept its scoring pass for training, the rest is rounding."""
    shared = tmp_path / "shared"
    shared.mkdir()
    named = [(key, parts | {"txt": f"class {n % 4}".encode()}) for n, (key, parts) in enumerate(make_samples(40))]
    make_tar(shared / "0.tar", named)
    monkeypatch.setattr("curate.learner.reuse.INTENSITY", 0.0)  # so small a transformer would not be worth it
    jest = {"criterion": "hard-learner", "filter_ratio": 0.8, "handover": "off"}
    for trained in (
        trained_from(vit, shared, tmp_path / "distinct"),
        trained_from(vit, pairs, tmp_path / "reused", **jest),
    ):
        model = trained.model()
        assert retrained(model, replayed(trained), trained.settings) == pytest.approx(trained.losses, rel=1e-5)
        assert differing(model, trained.weights)
        assert close(model, trained.weights, atol=1e-4)
