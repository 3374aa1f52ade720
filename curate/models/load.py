"""Load a model once per process, without running anything that its files contain.

Weights are read as safetensors or as a weights-only pickle, before open_clip sees them: open_clip 3.3 reads a
checkpoint weights-only too, but falls back to torch's default when that raises TypeError. Loading costs one read of
the weights, one hash of them and a probe batch that compares the fast paths, and the precision, with open_clip's own.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import CurateWarning, ModelError
from curate.models.configs import CONFIGS, PREPROCESS
from curate.models.embed import DualEncoder, encode_images, encode_texts, plain_text
from curate.models.identity import ModelIdentity, digest_json, digest_tokenizer, digest_weights
from curate.models.precision import COSINE_BOUND, NativePrecision, Precision, choose_device, choose_precision
from curate.models.preprocess import RULE, Preprocess
from curate.models.spec import CONFIG_FILE, ModelSpec, parse_spec
from curate.models.towers import image_path, text_parts

_KEEP_LOADED = 4
_FAST_PATH_TOLERANCE = 1e-4
_SAFE_TOKENIZER_SETTINGS = {"clean", "strip_sep_token", "language", "reduction_mask"}
_loaded: OrderedDict[tuple[Any, ...], DualEncoder] = OrderedDict()
_lock = threading.Lock()


def load_model(spec: str, *, precision: Precision = "auto", device: str = "auto", seed: int = 0) -> DualEncoder:
    """Load a model by name; a second call returns the same object. `seed` initialises an untrained architecture.

    Errors: ModelError where the name is unknown, the weights are absent and cannot be fetched, do not fit, or are a
    pickle that would run code; UsageError for an unavailable device. Warnings: CurateWarning for an untrained model, a
    precision that rounds too much, or a tower without a fast path.
    Example: `load_model("ViT-B-32:laion2b_s34b_b79k").embed_texts(...)` gives [n, 512].
    """
    parsed, on = parse_spec(spec), choose_device(device)
    arithmetic = choose_precision(precision, on)
    key = (parsed.kind, parsed.open_clip_name, parsed.location, precision, arithmetic, str(on), seed, _stamp(parsed))
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load(parsed, arithmetic, on, seed, chosen=precision != "auto")
            while len(_loaded) > _KEEP_LOADED:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _stamp(spec: ModelSpec) -> tuple[tuple[str, int, int], ...]:
    """What tells a rewritten checkpoint from the one already loaded."""
    path = Path(spec.location)
    files = sorted(path.iterdir()) if spec.kind == "directory" else [path] if spec.kind == "file" else []
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())


def _load(
    spec: ModelSpec, arithmetic: NativePrecision, device: torch.device, seed: int, *, chosen: bool
) -> DualEncoder:
    weights = _safe_weights(spec)
    exact = encoder_of(
        _build(spec, weights, "fp32", seed), spec.text, tokenizer_of(spec), device=device, architecture=_config_of(spec)
    )
    if spec.kind == "untrained":
        warnings.warn(
            f"{spec.text} is untrained (initialised from seed {seed}): its scores carry no knowledge",
            CurateWarning,
            stacklevel=4,
        )
    if arithmetic == "fp32":
        return exact
    rounded = encoder_of(
        _build(spec, weights, arithmetic, seed),
        spec.text,
        exact.tokenizer,
        device=device,
        precision=arithmetic,
        identity=exact.identity,
    )
    return _rounded_or_exact(rounded, exact, chosen=chosen)


def _rounded_or_exact(rounded: DualEncoder, exact: DualEncoder, *, chosen: bool) -> DualEncoder:
    change = float((_probe_cosines(rounded) - _probe_cosines(exact)).abs().max())
    rounded = replace(rounded, rounding=change)
    if change <= COSINE_BOUND:
        return rounded
    then = "kept, as it was asked for" if chosen else "float32 is used instead"
    warnings.warn(
        f"{exact.identity.name}: {rounded.identity.precision} changes cosines by up to {change:.4f} on the "
        f"probe batch (bound {COSINE_BOUND}); {then}",
        CurateWarning,
        stacklevel=5,
    )
    return rounded if chosen else exact


def encoder_of(
    module: nn.Module,
    name: str,
    tokenizer: Any,
    *,
    architecture: dict[str, Any] | None = None,
    device: torch.device | None = None,
    precision: NativePrecision = "fp32",
    identity: ModelIdentity | None = None,
) -> DualEncoder:
    """Wrap an open_clip module, e.g. one in training: takes its digests and verifies its fast paths.

    `architecture` is the model configuration; `identity` reuses the digests of the same weights in another precision.
    """
    device = device or torch.device("cpu")
    model: Any = module.to(device).eval()
    settings = dict(model.visual.preprocess_cfg)
    rule = Preprocess.from_config(settings)
    base = identity or ModelIdentity(
        name,
        digest_json(architecture),
        digest_weights(model.state_dict()),
        digest_json({"settings": settings, "rule": RULE}),
        digest_tokenizer(tokenizer),
        "",
    )
    bias = getattr(model, "logit_bias", None)
    with torch.inference_mode():
        token_1T: Tensor = tokenizer(["probe"]).to(device)
        width = plain_text(model, token_1T).shape[-1]
    encoder = DualEncoder(
        identity=ModelIdentity(
            base.name, base.architecture, base.checkpoint, base.preprocessing, base.tokenizer, precision
        ),
        module=model,
        tokenizer=tokenizer,
        rule=rule,
        device=device,
        loss="softmax" if bias is None else "sigmoid",
        scale=float(model.logit_scale.detach().exp()),
        bias=0.0 if bias is None else float(bias.detach()),
        width=width,
        context_length=token_1T.shape[-1],
        fast_image=image_path(model),
        text=text_parts(model),
    )
    return _verified(encoder)


def _verified(encoder: DualEncoder) -> DualEncoder:
    """Drop a fast path that does not give open_clip's own embedding on the probe batch."""
    tolerance = _FAST_PATH_TOLERANCE if encoder.identity.precision == "fp32" else 4 * COSINE_BOUND
    plain = replace(encoder, fast_image=None, text=None)
    image, text = _probe(encoder)
    with torch.inference_mode():
        wrong = []
        if (
            encoder.fast_image
            and _distance(encode_images(encoder, image[:2]), encode_images(plain, image[:2])) > tolerance
        ):
            wrong.append("fast_image")
        if encoder.text and _distance(encode_texts(encoder, text), encode_texts(plain, text)) > tolerance:
            wrong.append("text")
    for name in wrong:
        warnings.warn(
            f"{encoder.identity.name}: the short {name.removeprefix('fast_')} path differs from open_clip's "
            "on the probe batch; open_clip's own, slower one is used",
            CurateWarning,
            stacklevel=6,
        )
    dropped: dict[str, Any] = dict.fromkeys(wrong)
    return replace(encoder, **dropped)


def _probe(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
    """Four smooth images and four captions of different lengths, the same on every machine."""
    coarse = torch.randint(0, 256, (4, 3, 4, 4), generator=torch.Generator().manual_seed(7)).float()
    image = functional.interpolate(coarse, (encoder.rule.height, encoder.rule.width), mode="bilinear").to(torch.uint8)
    captions = ["", "a red circle", "two dogs on a beach at sunset, one of them asleep", "word " * 60]
    return image, encoder.tokenize(captions)


def _probe_cosines(encoder: DualEncoder) -> Tensor:
    image, text = _probe(encoder)
    return encoder.embed_images(image) @ encoder.embed_texts(text).T


def _distance(a_BD: Tensor, b_BD: Tensor) -> float:
    difference = functional.normalize(a_BD.float(), dim=-1) - functional.normalize(b_BD.float(), dim=-1)
    return float(torch.nan_to_num(difference, nan=torch.inf).abs().max())


# Building and reading ---------------------------------------------------------------------------------------------


def _config_of(spec: ModelSpec) -> dict[str, Any]:
    import open_clip

    if not spec.architecture:
        return dict(_try(spec, lambda: open_clip.get_model_config(spec.open_clip_name)))
    return CONFIGS.get(spec.architecture) or dict(open_clip.get_model_config(spec.architecture))


def _build(spec: ModelSpec, weights: Path | None, precision: str, seed: int) -> nn.Module:
    import open_clip

    if weights is None:
        return build_untrained(
            _config_of(spec),
            seed=seed,
            precision=precision,
            preprocess=PREPROCESS if spec.architecture in CONFIGS else {},
        )
    pretrained = None if not spec.architecture else spec.location
    module: nn.Module = _try(
        spec,
        lambda: open_clip.create_model_from_pretrained(
            spec.open_clip_name, pretrained, precision=precision, return_transform=False, weights_only=True
        ),
    )
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


def _safe_weights(spec: ModelSpec) -> Path | None:
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

    text = _config_of(spec).get("text_cfg", {})
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
