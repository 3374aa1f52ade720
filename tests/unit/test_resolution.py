"""Lower resolutions with the same weights: against a model that open_clip builds for the size, and against slopes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import resize_pos_embed
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from curate.costs.flops import sample_work
from curate.errors import UsageError
from curate.estimators.backprop import Backprop
from curate.estimators.forward import Forward
from curate.estimators.problem import DualEncoderProblem, trainable
from curate.estimators.swapping import attention_for_tangents, swapped
from curate.learner.embedding import embed_pairs
from curate.learner.resolution import (
    FlexiProblem,
    at_size,
    embed_low,
    full_size,
    low_cost,
    low_size,
    resize_positions,
    shrink,
    still_statistics,
)
from curate.models.build import build_untrained
from curate.models.configs import CONFIGS, PREPROCESS, with_loss
from tests.oracle.estimator_cases import CONTEXT, dual_encoder, gradient, pairs

# B images, m full, n low


def vision(size: int = 32, *, loss: Any = "sigmoid", convolutional: bool = False, **extra: Any) -> Any:
    """A dual encoder of 4 x 4 patches (or a ResNet of 2 x 2 cells), with positions that matter."""
    shape: dict[str, Any] = {"image_size": size, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
    if convolutional:
        shape = {"image_size": size, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    text = {"context_length": CONTEXT, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}
    config = with_loss({"embed_dim": 8, "vision_cfg": shape | extra, "text_cfg": text}, loss)
    module: Any = build_untrained(config, seed=0, preprocess=PREPROCESS)
    with torch.no_grad():
        module.token_embedding.weight.mul_(20)
        positions(module).mul_(4)
    return module.train()


def positions(module: Any) -> nn.Parameter:
    """Where the image tower keeps its positions."""
    found: nn.Parameter = getattr(module.visual, "attnpool", module.visual).positional_embedding
    return found


def images(batch: int, height: int, width: int) -> Tensor:
    """Random uint8 images."""
    dice = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, 3, height, width), generator=dice, dtype=torch.uint8)


def tokens(batch: int) -> Tensor:
    """Captions of the oracle's cases."""
    return pairs(batch)[1]


@contextmanager
def rebuilt(module: Any, size: int) -> Iterator[Any]:
    """The same weights in a model that open_clip builds for images of `size`, positions resized by open_clip."""
    other = vision(size)
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    resize_pos_embed(state, other)
    other.load_state_dict(state)
    yield other


def test_a_vision_transformer_equals_the_one_that_open_clip_builds_for_the_size() -> None:
    """Embeddings to 1e-5, and with them the gradients of every parameter but the positions."""
    module = vision()
    with rebuilt(module, 16) as other:
        batch = images(5, 16, 16), tokens(5)
        for mine, theirs in zip(embed_low(module, *batch), embed_pairs(other, *batch), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        loss = FlexiProblem(module).loss(*embed_low(module, *batch))
        expected = DualEncoderProblem(other).loss(*embed_pairs(other, *batch))
        loss.backward(), expected.backward()
        for (name, mine), theirs in zip(module.named_parameters(), other.parameters(), strict=True):
            if name != "visual.positional_embedding":
                torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)
        assert not torch.allclose(embed_low(module, *batch)[0], embed_low(vision(), *batch)[0] * 0)


@pytest.mark.parametrize("grid", [((4, 4), (2, 2)), ((7, 7), (4, 3)), ((6, 4), (3, 4)), ((3, 3), (1, 1))])
def test_positions_are_those_of_torchs_interpolation(grid: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """The matrix product equals `interpolate` (bicubic, antialiased); prefix tokens stay, and so does its gradient."""
    (G, H), smaller = grid
    stored = torch.randn(2 + G * H, 5, dtype=torch.float64, requires_grad=True)
    cells_1DGH = stored[2:].reshape(1, G, H, 5).permute(0, 3, 1, 2)
    resized = functional.interpolate(cells_1DGH, size=smaller, mode="bicubic", antialias=True)
    expected = torch.cat([stored[:2], resized[0].permute(1, 2, 0).reshape(-1, 5)])
    made = resize_positions(stored, (G, H), smaller)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(resize_positions(stored[None], (G, H), smaller)[0], expected)
    weight = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad((z * weight).sum(), stored)[0] for z in (made, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("convolutional", [False, True])
def test_slopes_at_low_resolution_are_finite_differences(convolutional: bool) -> None:
    """Backward pass and tangent agree along a random direction, and with finite steps of the positions."""
    size = 64 if convolutional else 32
    module = vision(size, convolutional=convolutional).eval()
    problem = FlexiProblem(module)
    batch = images(3, size, size), images(2, size // 2, size // 2), tokens(5)
    dice = torch.Generator().manual_seed(0)
    direction = {p: torch.randn(p.shape, generator=dice, dtype=p.dtype) for p in trainable(module).values()}

    def value(step: float) -> Tensor:
        place = positions(module)  # without kinks behind it, as a ResNet has elsewhere
        with swapped(module, {place: place + step * direction[place]}), torch.no_grad():
            return problem.loss(*problem.embed(batch))

    loss = problem.loss(*problem.embed(batch))
    loss.backward()
    slope = {p: float((p.grad * v).sum()) for p, v in direction.items() if p.grad is not None}
    with forward_ad.dual_level(), attention_for_tangents(), torch.no_grad():
        dual = {p: forward_ad.make_dual(p.detach(), v) for p, v in direction.items()}
        with swapped(module, dual):
            tangent = float(forward_ad.unpack_dual(problem.loss(*problem.embed(batch))).tangent)
    step = 1e-2  # float32: the loss has six digits
    difference = float(value(step) - value(-step)) / (2 * step)
    assert tangent == pytest.approx(sum(slope.values()), rel=1e-4)
    assert slope[positions(module)] == pytest.approx(difference, rel=2e-2)


@pytest.mark.parametrize("convolutional", [False, True])
def test_full_size_is_the_ordinary_embedding_bit_for_bit(convolutional: bool) -> None:
    """Nothing is interpolated where nothing is smaller; a batch of full images alone is an ordinary problem."""
    size = 64 if convolutional else 32
    module = vision(size, convolutional=convolutional).eval()
    batch = images(4, size, size), tokens(4)
    expected = embed_pairs(module, *batch)
    for made in (embed_low(module, *batch), FlexiProblem(module).embed((batch[0], batch[0][:0], batch[1]))):
        assert all(map(torch.equal, made, expected))


def test_images_of_both_sizes_meet_in_one_loss_in_their_order() -> None:
    """Rows 0 to m are the full images, the rest the low ones, and every caption stands beside its own image."""
    module = vision().eval()
    full, low, token = images(3, 32, 32), images(2, 16, 16), tokens(5)
    image_BD, text_BD = FlexiProblem(module).embed((full, low, token))
    torch.testing.assert_close(image_BD[:3], embed_pairs(module, full, token)[0])
    torch.testing.assert_close(image_BD[3:], embed_low(module, low, token)[0])
    torch.testing.assert_close(text_BD, embed_pairs(module, full, token)[1])
    alone = FlexiProblem(module).embed((full[:0], low, token[3:]))
    torch.testing.assert_close(alone[0], image_BD[3:])


@pytest.mark.parametrize("size", [(24, 16), (17, 30), (9, 8)])
def test_odd_and_oblong_sizes_are_taken(size: tuple[int, int]) -> None:
    """A vision transformer ignores the edge that fills no patch, as its convolution does."""
    module = vision().eval()
    image, token = images(3, *size), tokens(3)
    whole = image[:, :, : size[0] // 8 * 8, : size[1] // 8 * 8]
    torch.testing.assert_close(embed_low(module, image, token)[0], embed_low(module, whole, token)[0])


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (32, 64), (31, 31)])
def test_a_resnet_takes_whatever_leaves_a_cell(size: tuple[int, int]) -> None:
    """The grid is computed as the tower rounds: up in the first convolution, down in the poolings."""
    module = vision(64, convolutional=True).eval()
    assert embed_low(module, images(2, *size), tokens(2))[0].isfinite().all()


@pytest.mark.parametrize(("convolutional", "size"), [(True, (30, 64)), (False, (7, 32))])
def test_a_size_that_leaves_nothing_is_refused(convolutional: bool, size: tuple[int, int]) -> None:
    """The message names the tower and the least it needs."""
    module = vision(64, convolutional=convolutional)
    least = "32 x 32" if convolutional else "8 x 8"
    with pytest.raises(UsageError, match=f"leaves nothing in a .*; it needs at least {least}"):
        embed_low(module, images(2, *size), tokens(2))


def test_batch_norms_follow_full_images_only() -> None:
    """In training a low pass normalises by its own batch, and leaves running statistics as the full pass set them."""
    module = vision(64, convolutional=True)
    other = deepcopy(module)
    full, low, token = images(4, 64, 64), images(3, 32, 32), tokens(7)
    image_BD, _ = FlexiProblem(module).embed((full, low, token))
    embed_pairs(other, full, token)
    for mine, theirs in zip(module.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.allclose(image_BD[4:], embed_low(other.eval(), low, token)[0], atol=1e-3)
    norm = module.visual.bn1
    with still_statistics(module):
        assert norm.momentum == 0.0
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked is not None


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("convolutional", [False, True])
def test_backprop_takes_both_resolutions(convolutional: bool, checkpoint: bool) -> None:
    """`backprop-checkpoint` recomputes blocks after the swap is undone, and gets the gradient and the statistics."""
    size = 64 if convolutional else 32
    module = vision(size, convolutional=convolutional)
    plain = FlexiProblem(deepcopy(module))
    batch = images(4, size, size), images(3, size // 2, size // 2), tokens(7)
    Backprop().estimate(plain, batch, seed=0, step=0)
    problem = FlexiProblem(module)
    Backprop(checkpointed=checkpoint).estimate(problem, batch, seed=0, step=0)
    torch.testing.assert_close(gradient(problem), gradient(plain), atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(module.buffers(), plain.module.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_forward_gradients_take_both_resolutions() -> None:
    """The problem is one for any estimator that asks for embeddings and the loss alone."""
    report = Forward().estimate(
        FlexiProblem(vision()), (images(3, 32, 32), images(2, 16, 16), tokens(5)), seed=0, step=0
    )
    assert np.isfinite(report.loss)


def test_bf16_and_repeated_captions_work_as_at_full_size() -> None:
    """Autocast reaches both passes, but not the interpolation of positions; captions are told apart once."""
    module, batch = vision().eval(), (images(3, 32, 32), images(3, 16, 16), tokens(3).repeat(2, 1))
    exact = FlexiProblem(module).embed(batch)
    for problem, tolerance in ((FlexiProblem(module, bf16=True), 3e-2), (FlexiProblem(module, distinct=True), 1e-5)):
        for mine, theirs in zip(problem.embed(batch), exact, strict=True):
            torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert resize_positions(torch.randn(17, 8), (4, 4), (2, 2)).dtype == torch.float32


def test_low_sizes_are_whole_patches() -> None:
    """Nearest, ties to the larger; refused where nothing smaller is left."""
    assert low_size(vision(32)) == (16, 16)
    assert low_size(vision(40)) == (24, 24)
    assert low_size(vision(64, convolutional=True)) == (32, 32)
    assert low_size(build_untrained(CONFIGS["curate-small"], seed=0), 0.3) == (32, 32)
    with pytest.raises(UsageError, match="leaves no smaller image"):
        low_size(vision(32, convolutional=True))
    with pytest.raises(UsageError, match="not between 0 and 1"):
        low_size(vision(), 1.0)


def test_shrinking_is_a_mean_or_an_antialiased_picture() -> None:
    """Whole factors give exact means rounded half to even; others come near Pillow's box; the same size is itself."""
    image = images(2, 12, 12)
    blocks = image.double().reshape(2, 3, 6, 2, 4, 3).mean((3, 5)).round().to(torch.uint8)
    assert torch.equal(shrink(image, (6, 4)), blocks)
    assert shrink(image, (12, 12)) is image
    smooth = torch.arange(0, 240, 2, dtype=torch.uint8).expand(1, 3, 100, 120)
    assert shrink(smooth, (48, 50)).shape == (1, 3, 48, 50)
    assert (shrink(smooth, (48, 50)).double().mean() - smooth.double().mean()).abs() < 0.5
    assert torch.equal(shrink(image.contiguous(memory_format=torch.channels_last), (6, 6)), shrink(image, (6, 6)))
    with pytest.raises(UsageError, match="cannot shrink"):
        shrink(image, (24, 6))


def test_the_factor_counts_captions_as_they_are() -> None:
    """A text tower costs the same at either size, so that its share stays in the factor."""
    module = vision(64)
    full, low = sample_work(module), sample_work(module, size=(32, 32))
    assert low_cost(module, (32, 32)) == pytest.approx(low.step / full.step)
    assert low_cost(module, (32, 32), training=False) == pytest.approx(
        sample_work(module, size=(32, 32)).forward / full.forward, rel=0.05
    )
    assert 0.15 < low_cost(module, (32, 32), 4) < low_cost(module, (32, 32)) < 1
    assert low_cost(module, full_size(module)) == 1.0


def with_tower(name: str, **vision_cfg: Any) -> Any:
    """A dual encoder with a timm image tower."""
    shape = {"image_size": 64, "timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", **vision_cfg}
    text = {"context_length": CONTEXT, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}
    return build_untrained(
        {"embed_dim": 8, "vision_cfg": shape, "text_cfg": text}, seed=0, preprocess=PREPROCESS
    ).train()


def test_a_convolutional_tower_of_timm_sees_smaller_images() -> None:
    """Nothing to interpolate; the tower's own stride is what low sizes are multiples of."""
    module = with_tower("test_resnet")
    stride = max(stage["reduction"] for stage in module.visual.trunk.feature_info)
    low = low_size(module)
    assert low == (stride * round(32 / stride),) * 2
    batch = images(3, *low), tokens(3)
    made = embed_low(module, *batch)[0]
    assert torch.equal(made, embed_pairs(module, *batch)[0])
    assert module.visual.trunk.training
    assert 0 < low_cost(module, low) < 1


def test_a_transformer_of_timm_has_its_positions_interpolated() -> None:
    """As timm itself resamples them, with their gradient; afterwards it insists on its size as before."""
    from timm.layers import resample_abs_pos_embed

    module = with_tower("vit_tiny_patch16_224", image_size=224).eval()
    trunk = module.visual.trunk
    low = low_size(module, 0.3)
    assert low == (64, 64)
    grid = tuple(side // patch for side, patch in zip(low, trunk.patch_embed.patch_size, strict=True))
    prefix = trunk.pos_embed.shape[1] - trunk.patch_embed.num_patches
    expected = resample_abs_pos_embed(trunk.pos_embed, list(grid), list(trunk.patch_embed.grid_size), prefix)
    torch.testing.assert_close(resize_positions(trunk.pos_embed, trunk.patch_embed.grid_size, grid), expected)
    embed_low(module, images(2, *low), tokens(2))[0].sum().backward()
    assert float(trunk.pos_embed.grad.abs().sum()) > 0
    assert trunk.patch_embed.strict_img_size
    assert 0 < low_cost(module, low) < 1


def test_a_tower_that_takes_one_size_only_is_refused_by_name() -> None:
    """The message says what is wrong with which tower, and the way out; state and dice are as before."""
    module: Any = dual_encoder()

    class Rigid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_size, self.layer = (16, 16), nn.Linear(768, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1))

    rules = module.visual.preprocess_cfg
    module.visual = Rigid()
    module.visual.preprocess_cfg = rules
    with (
        pytest.raises(UsageError, match=r"a Rigid, takes no image of 8 x 8 pixels .*--scoring full"),
        at_size(module, (8, 8)),
    ):
        pass
    assert module.visual.training
