"""Load a model once per process, and check it.

Loading costs one read of the weights, one hash of them, and a probe batch that compares the fast paths and the
precision with open_clip's own.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import CurateWarning
from curate.models.build import build, config_of, safe_weights, tokenizer_of
from curate.models.embed import DualEncoder, encode_images, encode_texts, plain_text
from curate.models.identity import ModelIdentity, digest_json, digest_tokenizer, digest_weights
from curate.models.precision import COSINE_BOUND, NativePrecision, Precision, choose_device, choose_precision
from curate.models.preprocess import RULE, Preprocess
from curate.models.spec import ModelSpec, parse_spec
from curate.models.tokens import short_tokens
from curate.models.towers import image_path, text_parts

_KEEP_LOADED = 4
_FAST_PATH_TOLERANCE = 1e-4
_PROBE_CAPTIONS = ["", "a red circle", "two dogs on a beach at sunset, one of them asleep", "word " * 60]
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
    weights = safe_weights(spec)
    exact = encoder_of(
        build(spec, weights, "fp32", seed), spec.text, tokenizer_of(spec), device=device, architecture=config_of(spec)
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
        build(spec, weights, arithmetic, seed),
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
    """Wrap an open_clip module, e.g. one just trained: takes its digests and verifies its fast paths.

    `architecture` is the model configuration; `identity` reuses the digests of the same weights in another precision.
    """
    device = device or torch.device("cpu")
    model: Any = module.to(device).eval()
    model.visual.to(memory_format=torch.channels_last)  # convolutions are twice as fast so on a CPU, and equal
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
        fast_tokens=short_tokens(tokenizer),
    )
    return _verified(encoder)


def _verified(encoder: DualEncoder) -> DualEncoder:
    """Drop a fast path that does not give open_clip's own embedding on the probe batch."""
    tolerance = _FAST_PATH_TOLERANCE if encoder.identity.precision == "fp32" else 4 * COSINE_BOUND
    plain = replace(encoder, fast_image=None, text=None, fast_tokens=None)
    image, text = _probe(plain)
    with torch.inference_mode():
        wrong = []
        if (
            encoder.fast_image
            and _distance(encode_images(encoder, image[:2]), encode_images(plain, image[:2])) > tolerance
        ):
            wrong.append("fast_image")
        if encoder.text and _distance(encode_texts(encoder, text), encode_texts(plain, text)) > tolerance:
            wrong.append("text")
        if encoder.fast_tokens and not torch.equal(encoder.fast_tokens(_PROBE_CAPTIONS), text):
            wrong.append("fast_tokens")
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
    return image, encoder.tokenize(_PROBE_CAPTIONS)


def _probe_cosines(encoder: DualEncoder) -> Tensor:
    image, text = _probe(encoder)
    return encoder.embed_images(image) @ encoder.embed_texts(text).T


def _distance(a_BD: Tensor, b_BD: Tensor) -> float:
    difference = functional.normalize(a_BD.float(), dim=-1) - functional.normalize(b_BD.float(), dim=-1)
    return float(torch.nan_to_num(difference, nan=torch.inf).abs().max())
