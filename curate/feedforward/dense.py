"""Find the dense feedforward layers of open_clip's towers, and read each as two matrices and a named activation.

A layer counts as read only if the formula act(x W1 + b1) W2 + b2 gives what the module gives on a probe; anything else
(a norm between the two, gated units, dropout, quantised weights) is refused with the names of what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import UsageError
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.kernels.fff import Activation
from curate.kernels.fff.activations import activate

# n inputs, D width in, H neurons, E width out
Tower = Literal["vision", "text"]
Where = Literal["all", "vision", "text"] | Sequence[int] | Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense feedforward layer: weights [D, H] and [H, E], biases [H] and [E], in float32 (or float64)."""

    w1_DH: Tensor
    b1_H: Tensor
    w2_HE: Tensor
    b2_E: Tensor
    activation: Activation

    @property
    def width(self) -> int:
        """The number of neurons."""
        return len(self.b1_H)

    def hidden(self, x_nD: Tensor) -> Tensor:
        """What the neurons give, [n, H]."""
        hidden_nH: Tensor = activate(torch.addmm(self.b1_H, x_nD, self.w1_DH), self.activation)
        return hidden_nH

    def __call__(self, x_nD: Tensor) -> Tensor:
        return torch.addmm(self.b2_E, self.hidden(x_nD), self.w2_HE)


@dataclass(frozen=True, slots=True)
class Site:
    """A block of a tower, and the name of its feedforward module, counted from the model."""

    name: str
    tower: Tower
    index: int
    block: nn.Module

    @property
    def module(self) -> Any:
        """The feedforward module that is there now."""
        return self.block.mlp


@dataclass(frozen=True, slots=True)
class DenseParts:
    """The modules of a dense feedforward layer, by what they do."""

    inward: nn.Linear
    outward: nn.Linear
    activation: Activation


def sites(model: nn.Module) -> tuple[Site, ...]:
    """Every numbered block with an `mlp` in the two towers, in order; `index` counts within a tower."""
    found = []
    for tower, (prefix, root) in _towers(model).items():
        blocks = [(name, block) for name, block in root.named_modules() if _is_block(name, block)]
        found += [Site(f"{prefix}.{name}.mlp", tower, n, block) for n, (name, block) in enumerate(blocks)]
    return tuple(found)


def choose(model: nn.Module, where: Where) -> tuple[Site, ...]:
    """The sites that `where` names. Errors: UsageError where it names none, or a tower without any."""
    there = sites(model)
    if isinstance(where, str):
        return _choose_towers(model, where, there)
    chosen = tuple(site for site in there if where(site.name)) if callable(where) else _choose_indices(where, there)
    if not chosen:
        names = ", ".join(site.name for site in there) or "no block with an mlp"
        raise UsageError(f"`where` chose no feedforward layer; the model has {names}")
    return chosen


def _choose_towers(model: nn.Module, where: str, there: tuple[Site, ...]) -> tuple[Site, ...]:
    if where not in ("all", "vision", "text"):
        raise UsageError(f"where={where!r} is none of all, vision, text, block indices, a function of a name")
    for tower, (prefix, root) in _towers(model).items():
        convolutional = type(root).__name__ == "ModifiedResNet" and where == "all"
        if where in ("all", tower) and not convolutional and not any(site.tower == tower for site in there):
            raise UsageError(
                f"the {tower} tower `{prefix}` is a {type(root).__name__}{_inside(root)}; it has no block with an `mlp`"
                + (", so choose the other tower" if where == "all" else "")
            )
    return tuple(site for site in there if where in ("all", site.tower))


def _choose_indices(where: Sequence[int], there: tuple[Site, ...]) -> tuple[Site, ...]:
    """Blocks by their place in each tower, from the end where negative."""
    if not all(isinstance(index, int) for index in where):
        raise UsageError(f"where={where!r} is none of all, vision, text, block indices, a function of a name")
    count = {tower: sum(site.tower == tower for site in there) for tower in get_args(Tower)}
    for index in where:
        for tower, n in count.items():
            if n and not -n <= index < n:
                raise UsageError(f"block {index}: the {tower} tower has {n} blocks, 0 to {n - 1}")
    return tuple(s for s in there if s.index in where or s.index - count[s.tower] in where)


def parts_of(site: Site) -> DenseParts:
    """The two linear layers and the activation of a site. Errors: UsageError naming the block and what was found."""
    mlp = site.module
    if isinstance(mlp, FastFeedforward | PathFeedforward):
        raise UsageError(f"{site.name} is a {type(mlp).__name__} already; build the dense model again to change it")
    parts = _parts(mlp)
    if parts is None:
        raise UsageError(
            f"{site.name} is {describe(mlp)}; only nn.Linear, an activation ({', '.join(get_args(Activation))}) and "
            "nn.Linear can be replaced: leave the block out with `where`"
        )
    return parts


def dense_of(parts: DenseParts) -> Dense:
    """The weights of a site, detached; float64 stays, everything else becomes float32."""
    dtype = torch.float64 if parts.inward.weight.dtype == torch.float64 else torch.float32

    def bias(linear: nn.Linear) -> Tensor:
        given = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
        return given.detach().to(dtype)

    w1_DH, w2_HE = (part.weight.detach().T.to(dtype).contiguous() for part in (parts.inward, parts.outward))
    return Dense(w1_DH, bias(parts.inward), w2_HE, bias(parts.outward), parts.activation)


def describe(module: nn.Module) -> str:
    """A module and its children in a line: "Sequential(c_fc: Linear, gelu: GELU, c_proj: Linear)"."""
    children = ", ".join(f"{name}: {type(child).__name__}" for name, child in module.named_children())
    return f"{type(module).__name__}({children})"


def _towers(model: nn.Module) -> dict[Tower, tuple[str, nn.Module]]:
    """The towers with their names in the model; open_clip has two layouts, CLIP and CustomTextCLIP."""
    text = next((name for name in ("text", "transformer") if isinstance(getattr(model, name, None), nn.Module)), None)
    if text is None or not isinstance(getattr(model, "visual", None), nn.Module):
        raise UsageError(f"a {type(model).__name__} is no open_clip model with a `visual` and a text tower")
    return {"vision": ("visual", model.get_submodule("visual")), "text": (text, model.get_submodule(text))}


def _is_block(name: str, module: nn.Module) -> bool:
    # numbered, so that a head or an attention pool with an `mlp` of its own does not count
    return name.rpartition(".")[2].isdigit() and isinstance(getattr(module, "mlp", None), nn.Module)


def _inside(root: nn.Module) -> str:
    """Of a wrapper around somebody else's model (timm, Hugging Face): what is wrapped."""
    inner = getattr(root, "trunk", getattr(root, "transformer", None))
    return f" around a {type(inner).__name__}" if isinstance(inner, nn.Module) else ""


def _parts(mlp: nn.Module) -> DenseParts | None:
    """None unless the module is Linear, activation, Linear, by its children and by its values."""
    children = [child for child in mlp.children() if not _does_nothing(child)]
    if len(children) != 3 or type(children[0]) is not nn.Linear or type(children[2]) is not nn.Linear:
        return None
    inward, outward = children[0], children[2]
    activation = _activation(children[1])
    if activation is None or inward.out_features != outward.in_features or not inward.weight.is_floating_point():
        return None
    parts = DenseParts(inward, outward, activation)
    return parts if _same(mlp, parts) else None


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _activation(module: nn.Module) -> Activation | None:
    """The activation by its values: open_clip, timm and transformers have a class each for the same function."""
    if next(module.parameters(), None) is not None:
        return None
    x = torch.linspace(-6, 6, 97)
    try:
        y = module(x.clone())
    except (RuntimeError, TypeError, ValueError):
        return None
    shaped = isinstance(y, Tensor) and y.shape == x.shape
    names: tuple[Activation, ...] = get_args(Activation)
    return next((name for name in names if shaped and torch.allclose(y, activate(x, name), 1e-5, 1e-6)), None)


def _same(mlp: nn.Module, parts: DenseParts) -> bool:
    """Is the module the formula? On one row, in the module's own arithmetic; weights on `meta` are taken on trust."""
    weight = parts.inward.weight
    if weight.is_meta:
        return True
    x_1D = torch.linspace(-1, 1, parts.inward.in_features, dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        try:
            y_1E = mlp(x_1D)
        except (RuntimeError, TypeError, ValueError):
            return False
        hidden_1H = activate(functional.linear(x_1D, weight, parts.inward.bias), parts.activation)
        expected_1E = functional.linear(hidden_1H, parts.outward.weight, parts.outward.bias)
    near = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05  # half precision: rounding at three places
    return y_1E.shape == expected_1E.shape and bool(
        (y_1E - expected_1E).abs().max() <= near * (1 + expected_1E.abs().max())
    )
