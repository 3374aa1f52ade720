"""Put fast feedforward layers into a built open_clip model, in place: dtype, device, mode and what learns are kept.

`init="random"` costs nothing. `init="upcycle"` converts the dense weights (`curate.feedforward.conversion`), layer by
layer from the first block to the last: each layer is converted on the inputs that the layers before it, already
converted, now give, because those are the inputs it will be routed on, and one layer's inputs are all that memory
holds. That runs the calibration batches once per block; `sequential=False` runs them once and keeps the inputs of all
layers, as the dense model gives them (on a vision transformer of three blocks both moved the logits by 13%). The two
towers are converted side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from curate.errors import UsageError
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.conversion import check_config, distil, unexplained, upcycle
from curate.feedforward.dense import DenseParts, Site, Where, choose, dense_of, parts_of
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.models.modes import evaluating

# n inputs kept, t those of one call, D width in
Init = Literal["random", "upcycle"]
Calibration = Callable[[nn.Module], object] | Iterable[Any]
HELD_OUT = 8  # one input of so many measures the conversion and is not used for it


@dataclass(frozen=True, slots=True)
class Replaced:
    """One layer that was replaced. `unexplained` is the held-out share of the dense output's variance that the new
    layer misses, None where it started at random; `inputs` is how many inputs it was converted from."""

    name: str
    neurons: int
    kind: str
    inputs: int = 0
    unexplained: float | None = None


@dataclass(frozen=True, slots=True)
class Replacement:
    """What `replace_feedforward` did, layer by layer."""

    layers: tuple[Replaced, ...]

    def __str__(self) -> str:
        widest = max(len(layer.name) for layer in self.layers)
        return "\n".join(
            f"{layer.name:<{widest}}  {layer.neurons} neurons -> {layer.kind}"
            + ("" if layer.unexplained is None else f"  {layer.unexplained:.3f} unexplained")
            for layer in self.layers
        )


def replace_feedforward(
    model: nn.Module,
    config: FeedforwardConfig,
    *,
    where: Where = "all",
    init: Init = "random",
    calibration: Calibration | None = None,
    sequential: bool = True,
    max_inputs: int = 16_384,
    ridge: float | None = None,
    distil_steps: int = 0,
    distil_lr: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Replacement:
    """Replace the dense feedforward layers of an open_clip model's blocks; nothing is changed if any is refused.

    `where`: "all" (every block of both towers; a ModifiedResNet has none), "vision", "text", places of blocks in both
    towers (from the end where negative), or a function of a name such as "visual.transformer.resblocks.3.mlp".
    `calibration`, for "upcycle": a function that runs a few batches through the model it is given, or the batches
    themselves (a tuple is called as model(*batch), a mapping as model(**batch), a tensor as model(batch)). Of each
    layer's inputs a uniform sample of `max_inputs` is kept, an eighth of it to measure `unexplained`; then
    `distil_steps` steps of `distil`. `generator` draws random weights and the sample; None is seed 0.

    A saved state dict is read by the same model built anew and replaced with the same configuration and `where`.
    Optimizers made before hold parameters that are gone.

    Example: replace_feedforward(model, FeedforwardConfig(depth=5, leaf_width=96), where="vision", init="upcycle",
    calibration=lambda model: model.encode_image(images)). Errors: UsageError naming the block that cannot be replaced
    and what it is, or an option that does not fit.
    """
    if init not in get_args(Init):
        raise UsageError(f"init {init!r} is none of {', '.join(get_args(Init))}")
    if init == "upcycle" and calibration is None:
        raise UsageError("init='upcycle' needs `calibration`: a function that runs batches through the model")
    generator = generator or torch.Generator().manual_seed(0)
    found = [(site, parts_of(site)) for site in choose(model, where)]
    if calibration is None or init == "random":
        return Replacement(tuple(_place_random(site, parts, config, generator) for site, parts in found))
    _check_upcycle(config, found)
    batches = calibration if callable(calibration) else list(calibration)
    done: dict[str, Replaced] = {}
    with _undone_on_error(found):
        for group in _groups(found, sequential):
            with inputs_of({site.name: site.module for site, _ in group}, most=max_inputs, generator=generator) as kept:
                _run(model, batches)
            for site, parts in group:
                layer, row = _converted(site, parts, config, kept.pop(site.name, None), ridge, distil_steps, distil_lr)
                _place(site, parts, layer)
                done[site.name] = row
    return Replacement(tuple(done[site.name] for site, _ in found))


@contextmanager
def inputs_of(
    modules: Mapping[str, nn.Module], *, most: int = 16_384, generator: torch.Generator | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect what goes into modules while the block runs: {name: [n, D] float32}, filled when it ends.

    Of more than `most` inputs a uniform sample stays, in the order they came (each input draws a number, the largest
    stay). Memory: twice `most` inputs per module.
    """
    generator = generator or torch.Generator().manual_seed(0)
    samples = {name: _Sample(most, generator) for name in modules}
    collected: dict[str, Tensor] = {}
    hooks = [module.register_forward_pre_hook(samples[name].take) for name, module in modules.items()]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
    collected.update({name: sample.x_nD for name, sample in samples.items() if sample.x_nD.numel()})


class _Sample:
    """A uniform sample of rows from a stream of unknown length."""

    def __init__(self, most: int, generator: torch.Generator) -> None:
        self.most, self.generator = most, generator
        self.x_nD, self.key_n = torch.empty(0), torch.empty(0)

    def take(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_tD = args[0].detach().flatten(0, -2)
        x_tD = x_tD if x_tD.dtype == torch.float64 else x_tD.float()
        key_n = torch.cat((self.key_n, torch.rand(len(x_tD), generator=self.generator)))
        x_nD = torch.cat((self.x_nD.to(x_tD), x_tD)) if self.x_nD.numel() else x_tD.clone()
        if len(key_n) > self.most:
            stay_n = key_n.topk(self.most).indices.sort().values
            key_n, x_nD = key_n[stay_n], x_nD[stay_n.to(x_nD.device)]
        self.x_nD, self.key_n = x_nD, key_n


def _run(model: nn.Module, calibration: Callable[[nn.Module], object] | list[Any]) -> None:
    with evaluating(model), torch.no_grad():
        if callable(calibration):
            calibration(model)
            return
        for batch in calibration:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*(batch if isinstance(batch, tuple | list) else (batch,)))


@contextmanager
def _undone_on_error(found: list[tuple[Site, DenseParts]]) -> Iterator[None]:
    before = [(site, site.module) for site, _ in found]
    try:
        yield
    except BaseException:
        for site, module in before:
            site.block.mlp = module
        raise


def _check_upcycle(config: FeedforwardConfig, found: list[tuple[Site, DenseParts]]) -> None:
    """Before any block is touched: what `upcycle` would refuse for one of them."""
    for site, parts in found:
        if parts.inward.weight.is_meta:
            raise UsageError(f"{site.name} has no weights yet (device meta); load them first")
        try:
            check_config(config, parts.inward.out_features)
        except UsageError as error:
            raise UsageError(f"{site.name}: {error}") from error


def _groups(found: list[tuple[Site, DenseParts]], sequential: bool) -> list[list[tuple[Site, DenseParts]]]:
    """What is converted after one run of the calibration batches: the same block of both towers, or everything."""
    if not sequential:
        return [found]
    places = sorted({site.index for site, _ in found})
    return [[(site, parts) for site, parts in found if site.index == place] for place in places]


def _place_random(site: Site, parts: DenseParts, config: FeedforwardConfig, generator: torch.Generator) -> Replaced:
    layer = config.build(
        parts.inward.in_features,
        width_out=parts.outward.out_features,
        activation=parts.activation,
        generator=generator,
    )
    _place(site, parts, layer)
    return Replaced(site.name, parts.inward.out_features, kind_of(layer))


def _converted(
    site: Site,
    parts: DenseParts,
    config: FeedforwardConfig,
    inputs_nD: Tensor | None,
    ridge: float | None,
    distil_steps: int,
    distil_lr: float,
) -> tuple[FastFeedforward, Replaced]:
    """The layer and its row of the report; the last inputs are held out, since neighbours in a batch are alike."""
    if inputs_nD is None:
        raise UsageError(f"the calibration batches never reached {site.name}; leave it out with `where`")
    dense = dense_of(parts)
    used_nD, held_nD = inputs_nD.tensor_split([len(inputs_nD) - len(inputs_nD) // HELD_OUT])
    try:
        layer = upcycle(dense, config, used_nD, ridge=ridge)
    except UsageError as error:
        raise UsageError(f"{site.name}: {error}") from error
    if distil_steps:
        distil(layer, dense, used_nD, steps=distil_steps, lr=distil_lr)
    missed = unexplained(layer.eval(), dense, held_nD) if len(held_nD) > 1 else None
    return layer, Replaced(site.name, dense.width, kind_of(layer), len(inputs_nD), missed)


def _place(site: Site, parts: DenseParts, layer: FastFeedforward | PathFeedforward) -> None:
    """Put the layer where the dense one was, with its dtype, device, mode and frozen parts."""
    old = site.module
    layer.to(device=parts.inward.weight.device, dtype=parts.inward.weight.dtype)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(_counterpart(name, parts).requires_grad)
    layer.train(old.training)
    placed: Any = layer
    placed.dense_width = parts.inward.out_features  # for the report's comparison; not part of the state dict
    site.block.mlp = placed


def _counterpart(name: str, parts: DenseParts) -> Tensor:
    """The dense parameter that a new one follows in whether it learns; the nodes follow the first weight."""
    of = {
        "b1": parts.inward.bias,
        "shared_in.bias": parts.inward.bias,
        "w2": parts.outward.weight,
        "shared_out.weight": parts.outward.weight,
        "b2": parts.outward.bias,
    }
    found = of.get(name)
    return parts.inward.weight if found is None else found


def kind_of(layer: nn.Module) -> str:
    """A layer's shape: "leaf 5 x 96 + 64" (depth, leaf width, shared width), "path 1 x 11" (trees, depth), "dense"."""
    if isinstance(layer, FastFeedforward):
        return f"leaf {layer.depth} x {layer.leaf_width}" + (f" + {layer.shared_width}" if layer.shared_width else "")
    if isinstance(layer, PathFeedforward):
        return f"path {layer.trees} x {layer.depth}"
    return "dense"
