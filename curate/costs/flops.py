"""Count the FLOPs of open_clip's dual encoders, forward and backward, from shapes: attention and our layers included.

torch's counter sees no attention on a CPU and nothing inside a compiled kernel; this count sees both, and costs
milliseconds where the counter runs the model. Vision transformers, CLIP ResNets and text transformers are walked
product by product (`curate.costs.products` says what counts); any other tower (timm, Hugging Face, attention pools) is
run once on a blank sample under torch's counter, with our layers counted by their formula.
Source of 2 FLOPs forward and 4 backward for each weight and token: Kaplan et al. 2020, arXiv 2001.08361, section 2.1.
"""

# B super-batch, b sub-batch, T tokens, W width of the tower, C channels, K heads, E width per head, D embedding width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    PatchDropout,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

from curate.costs.counted import count_by_running
from curate.costs.products import Product, UnknownLayer, Walk
from curate.errors import UsageError

Size = tuple[int, int]
Optimiser = Literal["adamw", "adam", "momentum", "sgd"]

# Multiplications, additions, divisions and roots for each trained parameter. AdamW: decay 1, first moment 3, second
# moment 4, root 1, bias correction 1, epsilon 1, quotient 1, step size 1, subtraction 1.
OPTIMISER_OPERATIONS: Final[dict[Optimiser, int]] = {"adamw": 14, "adam": 13, "momentum": 4, "sgd": 2}


@dataclass(frozen=True, slots=True)
class Work:
    """What one sample costs in a tower or in both. `how` is "analytic", or "counter" where a tower had to be run."""

    products: tuple[Product, ...]
    how: Literal["analytic", "counter"]

    @property
    def forward(self) -> float:
        """FLOPs of one forward pass."""
        return sum(product.forward for product in self.products)

    @property
    def backward(self) -> float:
        """FLOPs of the way back, with what is trained now."""
        return sum(product.backward for product in self.products)

    @property
    def step(self) -> float:
        """Both. A pass that recomputes activations (checkpointing) adds `forward` once more."""
        return self.forward + self.backward

    def __add__(self, other: Work) -> Work:
        how: Literal["analytic", "counter"] = "analytic" if self.how == other.how == "analytic" else "counter"
        return Work(self.products + other.products, how)


def sample_work(
    model: nn.Module, tokens: int | None = None, *, size: Size | None = None, training: bool = True
) -> Work:
    """One image and one caption through open_clip's own forward; `tokens` None is the whole context.

    Example: ViT-B/32 at 224 pixels and 77 tokens is 14.8e9 forward, and 44.1e9 in a step with everything trained.
    """
    return image_work(model, size=size, training=training) + text_work(model, tokens, training=training)


def image_work(model: nn.Module, *, size: Size | None = None, training: bool = False, short: bool = False) -> Work:
    """One image. `size` (height, width) in place of the model's own, `short` for the path of `curate.models.towers`.

    With `training`, dropped patches and the gates of our layers count as they run then, and so does the way back, which
    is 0 otherwise. Errors: UsageError for a model without an image tower, or an image smaller than a patch; ModelError
    for a tower that has to be run and does not take a blank image.
    """
    tower: Any = getattr(model, "visual", None)
    if not isinstance(tower, nn.Module):
        raise UsageError(f"a {type(model).__name__} is no open_clip model with a `visual` tower")
    image_size = size or _size_of(tower)
    if type(tower) is VisionTransformer:
        return _walk(lambda walk: _vision(walk, tower, image_size, short), model, image_size, None, training)
    if type(tower) is ModifiedResNet:
        return _walk(lambda walk: _resnet(walk, tower, image_size, short), model, image_size, None, training)
    return count(model, image_size, None, training)


def text_work(model: nn.Module, tokens: int | None = None, *, training: bool = False, short: bool = False) -> Work:
    """One caption of `tokens` tokens, start and end included; None, or more than the context, is the whole context.

    A tower that has to be run takes the whole context in any case, as its tokenizer pads to it.
    """
    tower: Any = getattr(model, "text", model)
    context = getattr(tower, "context_length", None) or getattr(model, "context_length", None)
    if not isinstance(context, int):
        raise UsageError(f"a {type(model).__name__} is no open_clip model with a text tower")
    length = min(max(tokens or context, 1), context)
    if type(tower) is TextTransformer or (tower is model and hasattr(model, "token_embedding")):
        return _walk(lambda walk: _text(walk, tower, length, short), model, None, context, training)
    return count(model, None, context, training)


def contrastive_work(batch: int, width: int) -> Work:
    """The similarities of a batch of `batch` pairs, for each of its samples: 2 b D forward, twice that back."""
    return Work((Product("similarities", 2.0 * batch * width, 4.0 * batch * width),), "analytic")


def selection_flops(candidates: int, chosen: int, widths: int, chunks: int) -> float:
    """Drawing b of B candidates in N chunks: 4 B b FLOPs for each of the models' embedding widths together.

    The last chunk is drawn but not compared with, hence (N - 1) / N. Example: B = 163,840, b = 32,768, two models of
    width 768, 16 chunks: 4 * 5.37e9 * 1,536 * 15 / 16 = 3.1e13.
    """
    return 4.0 * candidates * chosen * widths * (chunks - 1) / chunks


def optimiser_flops(model: nn.Module, optimiser: Optimiser = "adamw") -> float:
    """One update of all trained parameters, whatever the batch; it is counted apart from the products."""
    if optimiser not in OPTIMISER_OPERATIONS:
        raise UsageError(f"{optimiser!r} is none of {', '.join(OPTIMISER_OPERATIONS)}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return float(OPTIMISER_OPERATIONS[optimiser] * trained)


def count(model: nn.Module, size: Size | None, tokens: int | None, training: bool) -> Work:
    """The same by running one blank image or caption; the way out for towers whose shapes are not known here."""
    return Work(count_by_running(model, size, tokens, training=training), "counter")


def _walk(
    visit: Callable[[Walk], None], model: nn.Module, size: Size | None, tokens: int | None, training: bool
) -> Work:
    walk = Walk(training=training)
    try:
        visit(walk)
    except UnknownLayer:
        return count(model, size, tokens, training)
    if training:
        return Work(tuple(walk.products), "analytic")
    return Work(tuple(Product(p.name, p.forward, 0.0) for p in walk.products), "analytic")


def _size_of(tower: Any) -> Size:
    size = tower.image_size
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _vision(walk: Walk, tower: Any, size: Size, short: bool) -> None:
    if tower.attn_pool is not None:
        raise UnknownLayer("an attention pool")
    height, width = walk.convolution("visual.conv1", tower.conv1, size)
    if min(height, width) < 1:
        raise UsageError(f"an image of {size[0]} x {size[1]} is smaller than a patch of {tower.conv1.kernel_size}")
    patches = height * width
    if walk.training and isinstance(tower.patch_dropout, PatchDropout):
        patches = max(1, int(patches * (1 - tower.patch_dropout.prob)))
    walk.passes(tower.class_embedding, tower.positional_embedding, tower.ln_pre)
    T = patches + 1
    _transformer(walk, "visual", tower.transformer, T, pooled=short)
    walk.passes(tower.ln_post)
    _project(walk, "visual.proj", tower.proj, T if tower.pool_type == "none" else 1)


def _text(walk: Walk, tower: Any, tokens: int, short: bool) -> None:
    appended = getattr(tower, "cls_emb", None)
    pool = getattr(tower, "pool_type", None) or getattr(tower, "text_pool_type", "argmax")
    T = tokens + (appended is not None)
    walk.passes(tower.token_embedding, tower.positional_embedding, appended)
    _transformer(walk, "text", tower.transformer, T, pooled=short)
    walk.passes(tower.ln_final)
    _project(walk, "text.proj", tower.text_projection, T if pool == "none" and appended is None else 1)


def _project(walk: Walk, name: str, projection: nn.Linear | Tensor | None, rows: int) -> None:
    if isinstance(projection, nn.Linear):
        walk.linear(name, projection, rows)
    elif projection is not None:
        walk.product(name, 2 * rows * projection.numel(), [projection])


def _transformer(walk: Walk, tower: str, transformer: Any, T: int, *, pooled: bool) -> None:
    """Every block; with `pooled` the last has one token that asks, and one that goes through its feedforward layer."""
    if type(transformer) is not Transformer:
        raise UnknownLayer(f"{tower}: {type(transformer).__name__}")
    blocks = list(transformer.resblocks)
    for n, block in enumerate(blocks):
        queries = 1 if pooled and n == len(blocks) - 1 else T
        _block(walk, f"{tower}.{n}", block, T, queries)


def _block(walk: Walk, name: str, block: Any, T: int, queries: int) -> None:
    attention = block.attn
    known = type(block) in (ResidualAttentionBlock, CustomResidualAttentionBlock) and not hasattr(block, "ln_1_kv")
    if not known or type(attention) not in (nn.MultiheadAttention, Attention) or attention.in_proj_weight is None:
        raise UnknownLayer(f"{name}: {type(block).__name__} with {type(attention).__name__}")
    W = attention.in_proj_weight.shape[1]
    walk.passes(block.ln_1)
    walk.product(f"{name}.attn.in_proj", 2 * (queries + 2 * T) * W * W, [attention.in_proj_weight])
    walk.passes(*(part for part_name, part in attention.named_parameters() if not part_name.startswith("out_proj")))
    walk.activations(f"{name}.attn", 4 * queries * T * W)
    walk.linear(f"{name}.attn.out_proj", attention.out_proj, queries)
    walk.passes(block.ls_1, block.ln_2, getattr(block, "ln_attn", None))
    walk.feedforward(f"{name}.mlp", block.mlp, queries)
    walk.passes(block.ls_2)


def _resnet(walk: Walk, tower: Any, size: Size, short: bool) -> None:
    for n in (1, 2, 3):
        size = walk.convolution(f"visual.conv{n}", getattr(tower, f"conv{n}"), size)
        walk.passes(getattr(tower, f"bn{n}"))
    size = (size[0] // 2, size[1] // 2)
    for n in (1, 2, 3, 4):
        for m, block in enumerate(getattr(tower, f"layer{n}")):
            size = _bottleneck(walk, f"visual.layer{n}.{m}", block, size)
    _attention_pool(walk, tower.attnpool, size[0] * size[1] + 1, short)


def _bottleneck(walk: Walk, name: str, block: Any, size: Size) -> Size:
    live, pooled = walk.live, (size[0] // block.stride, size[1] // block.stride)
    for n, at in ((1, size), (2, size), (3, pooled)):
        walk.convolution(f"{name}.conv{n}", getattr(block, f"conv{n}"), at)
        walk.passes(getattr(block, f"bn{n}"))
    if block.downsample is not None:
        with walk.beside(live):
            walk.convolution(f"{name}.downsample", block.downsample[1], pooled)
            walk.passes(block.downsample[2])
    return pooled


def _attention_pool(walk: Walk, pool: Any, T: int, short: bool) -> None:
    """open_clip lets every position ask, and keeps the first; the short path makes neither keys nor values."""
    C = pool.q_proj.in_features
    walk.passes(pool.positional_embedding)
    if short:
        walk.product("visual.attnpool", 2 * (3 * C * C + 2 * pool.num_heads * C * T), pool.parameters())
        walk.linear("visual.attnpool.c_proj", pool.c_proj, 1)
        return
    live = walk.live
    for part in ("q_proj", "k_proj", "v_proj"):
        with walk.beside(live):
            walk.linear(f"visual.attnpool.{part}", getattr(pool, part), T)
    walk.activations("visual.attnpool", 4 * T * T * C)
    walk.linear("visual.attnpool.c_proj", pool.c_proj, T)
