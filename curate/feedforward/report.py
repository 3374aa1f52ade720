"""What a model's feedforward layers hold and cost, layer by layer and together, before and after they were replaced.

FLOPs are multiplications and additions of matrix products, biases and activations left out, as torch's counter has it
(`curate.models.embed` counts a whole model so). Those of the feedforward layers follow from their shapes, since torch
sees nothing inside a compiled kernel; those of everything else are counted while one blank image and caption pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from curate.errors import UsageError
from curate.feedforward.dense import DenseParts, Site, parts_of, sites
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.feedforward.pruning import usage_of
from curate.feedforward.surgery import kind_of
from curate.models.modes import evaluating


@dataclass(slots=True)
class Pass:
    """What one image or caption made of a block: tokens, and FLOPs that torch saw in the layer and in the block."""

    tokens: int = 0
    layer: int = 0
    block: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """How evenly the counted tokens spread over the stored leaves. `effective` is exp(entropy): as many leaves, used
    evenly, would be as spread out; `dead` leaves saw no token."""

    tokens: int
    leaves: int
    least: float
    most: float
    dead: int
    effective: float


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One feedforward layer. `flops` and `active_parameters` are per token; `tokens` is how many tokens of one image
    or caption pass; `dense_flops` is what the layer cost before it was replaced, None where that is not known;
    `block_flops` adds the rest of the block, attention included, per token."""

    name: str
    kind: str
    parameters: int
    active_parameters: int
    bytes: int
    flops: int
    dense_flops: int | None
    block_flops: float
    dense_block_flops: float | None
    tokens: int
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class FeedforwardReport:
    """All feedforward layers of a model; sums count one image and one caption."""

    layers: tuple[LayerReport, ...]
    model_parameters: int
    model_bytes: int
    other_flops: float

    @property
    def parameters(self) -> int:
        """Parameters of all feedforward layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of those parameters."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def flops(self) -> float:
        """FLOPs of all feedforward layers for one image and one caption."""
        return float(sum(layer.flops * layer.tokens for layer in self.layers))

    @property
    def dense_flops(self) -> float | None:
        """The same before replacement; None where one layer's is not known."""
        known = [layer.dense_flops * layer.tokens for layer in self.layers if layer.dense_flops is not None]
        return float(sum(known)) if len(known) == len(self.layers) else None

    @property
    def model_flops(self) -> float:
        """FLOPs of the whole model for one image and one caption."""
        return self.other_flops + self.flops

    @property
    def dense_model_flops(self) -> float | None:
        """The same before replacement."""
        return None if self.dense_flops is None else self.other_flops + self.dense_flops

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, sums included, for JSON."""
        sums = ("parameters", "bytes", "flops", "dense_flops", "model_flops", "dense_model_flops")
        return asdict(self) | {name: getattr(self, name) for name in sums}

    def __str__(self) -> str:
        head = ("layer", "kind", "parameters", "active", "FLOPs/token", "dense", "block", "dense", "MB", "leaves")
        rows = [head, *(_row(layer) for layer in self.layers)]
        wide = [max(len(row[column]) for row in rows) for column in range(len(head))]
        table = ["  ".join(_pad(cell, wide[n], n) for n, cell in enumerate(row)).rstrip() for row in rows]
        return "\n".join([*table, *self._sums()])

    def _sums(self) -> Iterator[str]:
        yield f"feedforward: {self.parameters:,} parameters, {self.bytes / 1e6:.1f} MB, " + _ratio(
            self.flops, self.dense_flops
        )
        yield f"model: {self.model_parameters:,} parameters, {self.model_bytes / 1e6:.1f} MB, " + _ratio(
            self.model_flops, self.dense_model_flops
        )


def report(model: nn.Module) -> FeedforwardReport:
    """Count an open_clip model's feedforward layers; runs one blank image and one caption through it.

    `usage` of a layer is there where `count_usage` was set and batches have passed. Layers of a shape that is neither
    dense nor ours count with the rest of the model.

    Example: a dense ViT-B/32 block has 4,722,432 feedforward parameters, all active, and 9,437,184 FLOPs per token;
    "leaf 5 x 96" has 4,770,079 with 152,165 of them active, and 302,592 FLOPs per token. Errors:
    UsageError for another model than open_clip's.
    """
    known = list(_known(model))
    total, passes = _count(model, [site for site, _ in known])
    return FeedforwardReport(
        layers=tuple(_layer(site, parts, passes[site.name]) for site, parts in known),
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        model_bytes=_bytes(model),
        other_flops=float(total - sum(seen.layer for seen in passes.values())),
    )


def _known(model: nn.Module) -> Iterator[tuple[Site, DenseParts | None]]:
    """The sites that are ours (None) or dense (their parts)."""
    for site in sites(model):
        if isinstance(site.module, FastFeedforward | PathFeedforward):
            yield site, None
            continue
        try:
            yield site, parts_of(site)
        except UsageError:
            continue


def _layer(site: Site, parts: DenseParts | None, seen: Pass) -> LayerReport:
    layer = site.module
    active, flops = per_token(layer)
    dense = flops if parts is not None else _dense_flops(layer)
    rest = (seen.block - seen.layer) / max(seen.tokens, 1)
    return LayerReport(
        name=site.name,
        kind=kind_of(layer),
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        active_parameters=active,
        bytes=_bytes(layer),
        flops=flops,
        dense_flops=dense,
        block_flops=rest + flops,
        dense_block_flops=None if dense is None else rest + dense,
        tokens=seen.tokens,
        usage=_usage(layer) if isinstance(layer, FastFeedforward) else None,
    )


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _dense_flops(layer: Any) -> int | None:
    """Of the layer that was replaced, whose number of neurons `replace_feedforward` leaves behind."""
    neurons: int | None = getattr(layer, "dense_width", None)
    return None if neurons is None else 2 * neurons * (layer.width + layer.width_out)


def per_token(layer: nn.Module) -> tuple[int, int]:
    """(parameters that one token meets, its FLOPs). The nodes of its own path count, as where tokens descend one by
    one; a kernel that computes the logits of all nodes at once spends 2 D (2**depth - 1 - depth) more."""
    if isinstance(layer, FastFeedforward):
        D, E, H, S, P = layer.width, layer.width_out, layer.leaf_width, layer.shared_width, layer.depth
        products = P * D + (H + S) * (D + E)
        return products + P + H + S + E, 2 * products
    if isinstance(layer, PathFeedforward):
        D, E, K, P = layer.width, layer.width_out, layer.trees, layer.depth + 1
        return K * P * (D + 1 + E) + E, 2 * K * P * (D + E)
    weights = [parameter.numel() for parameter in layer.parameters()]
    return sum(weights), 2 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)


def _usage(layer: FastFeedforward) -> Usage | None:
    tokens = int(layer.usage.sum())
    if not tokens:
        return None
    share_K = usage_of(layer)
    return Usage(
        tokens=tokens,
        leaves=len(share_K),
        least=float(share_K.min()),
        most=float(share_K.max()),
        dead=int((share_K == 0).sum()),
        effective=float(torch.special.entr(share_K).sum().exp()),
    )


@contextmanager
def _uncounted(model: nn.Module) -> Iterator[None]:
    """The blank image does not count as use of a leaf."""
    counting = [layer for layer in model.modules() if isinstance(layer, FastFeedforward) and layer.count_usage]
    for layer in counting:
        layer.count_usage = False
    try:
        yield
    finally:
        for layer in counting:
            layer.count_usage = True


def _count(model: nn.Module, found: list[Site]) -> tuple[int, dict[str, Pass]]:
    """FLOPs of one blank image and one caption, and each site's share of them.

    Gradients stay enabled: without them nn.MultiheadAttention takes a fused kernel that the counter cannot see.
    """
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    passes = {site.name: Pass() for site in found}
    image_1CHW, token_1T = _blank(model)
    encoder: Any = model
    with _uncounted(model), _watched(found, passes, counter), evaluating(model), torch.enable_grad(), counter:
        encoder.encode_image(image_1CHW)
        encoder.encode_text(token_1T)
    return int(counter.get_total_flops()), passes


@contextmanager
def _watched(found: list[Site], passes: dict[str, Pass], counter: FlopCounterMode) -> Iterator[None]:
    """Hooks that read the counter when a block and its feedforward layer are entered and left."""

    def watch(module: nn.Module, seen: Pass, field: str) -> list[Any]:
        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            setattr(seen, field, getattr(seen, field) - int(counter.get_total_flops()))
            if field == "layer":
                seen.tokens += args[0].numel() // args[0].shape[-1]

        def leave(*_: Any) -> None:
            setattr(seen, field, getattr(seen, field) + int(counter.get_total_flops()))

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    hooks = [hook for site in found for hook in watch(site.module, passes[site.name], "layer")]
    hooks += [hook for site in found for hook in watch(site.block, passes[site.name], "block")]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _blank(model: nn.Module) -> tuple[Tensor, Tensor]:
    visual: Any = model.get_submodule("visual")
    size = visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    first = next(m.weight for m in visual.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    text: Any = model if hasattr(model, "context_length") else model.get_submodule("text")
    image_1CHW = torch.zeros(1, 3, height, width, dtype=first.dtype, device=first.device)
    return image_1CHW, torch.ones(1, text.context_length, dtype=torch.long, device=first.device)


def _row(layer: LayerReport) -> tuple[str, ...]:
    usage = layer.usage
    return (
        layer.name,
        layer.kind,
        f"{layer.parameters:,}",
        f"{layer.active_parameters:,}",
        f"{layer.flops:,}",
        "-" if layer.dense_flops is None else f"{layer.dense_flops:,}",
        f"{layer.block_flops:,.0f}",
        "-" if layer.dense_block_flops is None else f"{layer.dense_block_flops:,.0f}",
        f"{layer.bytes / 1e6:.1f}",
        ""
        if usage is None
        else f"{usage.effective:.1f} of {usage.leaves}, {usage.dead} dead, {usage.least:.1%} to {usage.most:.1%}",
    )


def _pad(cell: str, width: int, column: int) -> str:
    return f"{cell:<{width}}" if column in (0, 1, 9) else f"{cell:>{width}}"


def _ratio(flops: float, dense: float | None) -> str:
    if dense is None or dense == flops or not flops:
        return f"{flops:.3g} FLOPs for an image and a caption"
    return f"{flops:.3g} FLOPs for an image and a caption against {dense:.3g} dense ({dense / flops:.2f} times fewer)"
