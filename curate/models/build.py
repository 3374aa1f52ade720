"""Build an open_clip model and read its weights without running anything that its files contain.

Weights are read as safetensors or as a weights-only pickle, before open_clip sees them: open_clip 3.3 reads a
checkpoint weights-only too, but falls back to torch's default when that raises TypeError.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from curate.errors import CurateWarning, ModelError
from curate.models.configs import CONFIGS, PREPROCESS
from curate.models.precision import DTYPES
from curate.models.spec import CONFIG_FILE, FEEDFORWARD_FILE, ModelSpec

_SAFE_TOKENIZER_SETTINGS = {"clean", "strip_sep_token", "language", "reduction_mask"}


def config_of(spec: ModelSpec) -> dict[str, Any]:
    import open_clip

    if not spec.architecture:
        return dict(_try(spec, lambda: open_clip.get_model_config(spec.open_clip_name)))
    return CONFIGS.get(spec.architecture) or dict(open_clip.get_model_config(spec.architecture))


def build(spec: ModelSpec, weights: Path | None, precision: str, seed: int) -> nn.Module:
    import open_clip

    if weights is None:
        return build_untrained(
            config_of(spec),
            seed=seed,
            precision=precision,
            preprocess=PREPROCESS if spec.architecture in CONFIGS else {},
        )
    if (layers := stored_feedforward(spec)) is not None:
        return _with_fast_layers(spec, layers, weights, precision, seed)
    pretrained = None if not spec.architecture else spec.location
    module: nn.Module = _try(
        spec,
        lambda: open_clip.create_model_from_pretrained(
            spec.open_clip_name, pretrained, precision=precision, return_transform=False, weights_only=True
        ),
    )
    return module


def stored_feedforward(spec: ModelSpec) -> Any | None:
    """The `FeedforwardConfig` of a checkpoint of ours whose blocks have fast feedforward layers; None for any other."""
    from curate.feedforward.config import FeedforwardConfig

    path = Path(spec.location) / FEEDFORWARD_FILE
    if spec.kind != "directory" or not path.is_file():
        return None
    return _try(spec, lambda: FeedforwardConfig(**json.loads(path.read_bytes())))


def _with_fast_layers(spec: ModelSpec, layers: Any, weights: Path, precision: str, seed: int) -> nn.Module:
    """open_clip's model, the layers put in, then the weights."""
    from curate.feedforward.surgery import replace_feedforward

    def load() -> nn.Module:
        record = json.loads((Path(spec.location) / CONFIG_FILE).read_bytes())
        module = build_untrained(record["model_cfg"], seed=seed, preprocess=record["preprocess_cfg"])
        replace_feedforward(module, layers)
        module.load_state_dict(load_file(weights))
        return module.to(DTYPES[precision])  # type: ignore[index]

    module: nn.Module = _try(spec, load)
    return module


def build_untrained(
    config: dict[str, Any], *, seed: int, precision: str = "fp32", preprocess: dict[str, Any] | None = None
) -> nn.Module:
    """An open_clip model of a configuration, initialised from `seed`; the global random state is left as it was."""
    import open_clip

    with TemporaryDirectory(prefix="curate-") as directory, torch.random.fork_rng(devices=[]), _quiet_open_clip():
        record = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        (Path(directory) / CONFIG_FILE).write_text(json.dumps(record), encoding="utf-8")
        torch.manual_seed(seed)
        try:
            module: nn.Module = open_clip.create_model(
                f"local-dir:{directory}", load_weights=False, precision=precision, pretrained_text=False
            )
        except (ImportError, RuntimeError, TypeError, ValueError, OSError) as error:
            raise ModelError(f"the model configuration cannot be built: {error}") from error
    return module


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Drop open_clip's warnings, on the root logger, that a model without weights has no weights."""

    def foreign(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    logging.getLogger().addFilter(foreign)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(foreign)


def safe_weights(spec: ModelSpec) -> Path | None:
    """The weight file of a model, proven to load without running code; None for an untrained one."""
    if spec.kind == "untrained":
        return None
    path = _weights_path(spec)
    check_weights(path)
    return path


def _weights_path(spec: ModelSpec) -> Path:
    from open_clip import pretrained
    from open_clip.factory import _find_checkpoint_in_dir

    if spec.kind == "file":
        return Path(spec.location)
    if spec.kind == "directory":
        found = _find_checkpoint_in_dir(Path(spec.location))
        if not found:
            raise ModelError(f"model {spec.text!r}: no weights (*.safetensors, *.bin, *.pth) in {spec.location}")
        return Path(found)
    if spec.kind == "hub":
        return Path(_try(spec, lambda: pretrained.download_pretrained_from_hf(spec.location)))
    tag = pretrained.get_pretrained_cfg(spec.architecture, spec.location)
    return Path(_try(spec, lambda: pretrained.download_pretrained(tag)))


def check_weights(path: Path) -> None:
    """Read a weight file without executing anything in it. Errors: ModelError where that is impossible."""
    if path.suffix in (".safetensors", ".npz", ".npy"):
        return  # tensors only by their format; numpy refuses pickled arrays by default
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # an unpickler fed hostile bytes raises nearly anything
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} is not a plain file of weights and was not loaded, because unpickling it could run "
            f"code ({first}); convert it to safetensors where you trust it"
        ) from error


def tokenizer_of(spec: ModelSpec) -> Any:
    """The model's tokenizer. Settings that would run foreign code or draw at random are refused or turned off."""
    import open_clip

    text = config_of(spec).get("text_cfg", {})
    settings = dict(text.get("tokenizer_kwargs") or {})
    if unknown := sorted(set(settings) - _SAFE_TOKENIZER_SETTINGS):
        raise ModelError(
            f"model {spec.text!r}: its configuration sets {', '.join(unknown)} for the tokenizer, which curate "
            "does not pass on"
        )
    foreign = text.get("hf_tokenizer_name") or ("siglip" in spec.architecture.lower())
    if not foreign and set(settings) <= {"clean"}:
        return _simple_tokenizer(text.get("context_length", 77), settings.get("clean", "lower"))
    remote = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    tokenizer: Any = _try(spec, lambda: open_clip.get_tokenizer(spec.open_clip_name, **remote))
    if getattr(tokenizer, "reduction_fn", None) is not None:
        tokenizer.reduction_fn = None
        warnings.warn(
            f"{spec.text}: its tokenizer shortens long captions at random; curate cuts them at the end",
            CurateWarning,
            stacklevel=5,
        )
    return tokenizer


@lru_cache(maxsize=8)
def _simple_tokenizer(context_length: int, clean: str) -> Any:
    """CLIP's own tokenizer, as `open_clip.get_tokenizer` makes it; building it takes a third of a second."""
    import open_clip

    return open_clip.SimpleTokenizer(context_length=context_length, clean=clean)


def _try(spec: ModelSpec, action: Any) -> Any:
    """Run an open_clip call, and say what to do where it fails."""
    try:
        return action()
    except ImportError as error:
        raise ModelError(f"model {spec.text!r} needs a package that is not installed: {error}") from error
    except Exception as error:  # open_clip wraps hub, network, JSON and shape errors in many types
        raise ModelError(f"model {spec.text!r} cannot be loaded: {_first_lines(error)}{_fetch_hint(spec)}") from error


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _fetch_hint(spec: ModelSpec) -> str:
    from open_clip import pretrained

    if spec.kind not in ("hub", "tag"):
        return ""
    tag = pretrained.get_pretrained_cfg(spec.architecture, spec.location)
    repository = spec.location if spec.kind == "hub" else str(tag.get("hf_hub", "")).rpartition("/")[0]
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
    fetch = f"`hf download {repository}`" if repository else f"a download of {tag.get('url', 'the weights')}"
    return (
        f". If its weights are not in the cache yet{offline}, run {fetch} on a machine with network access, and "
        "point HF_HOME at that cache"
    )
