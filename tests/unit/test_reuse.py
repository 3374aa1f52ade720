"""The scoring pass as the forward pass of training: gradients against computing again, and what rules it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from curate.costs.flops import sample_work
from curate.estimators.backprop import Backprop
from curate.estimators.problem import DualEncoderProblem, Problem
from curate.estimators.swapping import swapped
from curate.learner.embedding import embed_pairs
from curate.learner.problem import LearnerProblem
from curate.learner.resolution import FlexiProblem, shrink
from curate.learner.reuse import WORTHWHILE, Reuse, ReusedProblem
from curate.learner.tape import Place
from curate.models.build import build_untrained
from curate.models.configs import CONFIGS, PREPROCESS, with_loss
from tests.oracle.estimator_cases import CONTEXT, dual_encoder, gradient, pairs, with_leaves

# B candidates, b chosen, P all numbers of a model
ROWS = torch.tensor([7, 2, 9, 0, 3])  # in the order drawn, over micro-batches of 4


def encoder(loss: Any = "sigmoid", *, text: dict[str, Any] | None = None, **vision: Any) -> Any:
    """Two towers of two blocks, with settings of open_clip's configurations."""
    shape: dict[str, Any] = {"image_size": 16, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
    captions = {"context_length": CONTEXT, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 8, "vision_cfg": shape | vision, "text_cfg": captions | (text or {})}
    config |= {"custom_text": True} if text else {}
    return build_untrained(with_loss(config, loss), seed=0, preprocess=PREPROCESS).train()


def compare(
    module: Any, reuse: Reuse, row_b: Tensor = ROWS, *, expected: Problem | None = None, size: int = 16
) -> float:
    """Largest difference of the two gradients over the largest entry; both by `Backprop`."""
    image_BCHW, token_BT = pairs(10, pixels=size)
    reuse.score(image_BCHW, token_BT)
    problem = ReusedProblem(module, reuse)
    Backprop().estimate(problem, (image_BCHW[:0], row_b), seed=0, step=0)
    reused_P = gradient(problem)
    plain = expected or LearnerProblem(module)
    Backprop().estimate(plain, (image_BCHW[row_b], token_BT[row_b]), seed=0, step=0)
    exact_P = gradient(plain)
    return float((reused_P - exact_P).abs().max() / exact_P.abs().max())


@pytest.mark.parametrize("micro", [1, 3, 64])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_gradients_are_those_of_computing_again(loss: str, micro: int) -> None:
    """With and without `logit_bias`, in any micro-batches, for rows in the order drawn."""
    module = dual_encoder(loss, layers=2)
    reuse = Reuse(module, micro=micro)
    assert reuse.why_not is None
    assert compare(module, reuse) < 1e-6
    assert reuse.refused is None
    assert reuse.saved_flops > 0


@pytest.mark.parametrize(
    "settings",
    [{"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
     {"ls_init_value": 0.1}, {"text": {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}},
     {"text": {"embed_cls": True}}, {"block_type": "custom", "qk_norm": True}, {"patch_dropout": 0.0}],
    ids=str,
)  # fmt: skip
def test_other_towers_of_open_clip_are_reused_exactly(settings: dict[str, Any]) -> None:
    """Pools, layer scale, towers that see their padding, an appended class token, blocks of another kind."""
    module = encoder(**settings)
    reuse = Reuse(module, micro=4)
    assert reuse.image.why_not is None
    assert reuse.text.why_not is None
    assert compare(module, reuse) < 2e-6
    assert reuse.refused is None


def test_nothing_that_was_computed_is_computed_again() -> None:
    """The FLOPs saved are all of the forward pass, by torch's own counter."""
    module = dual_encoder(layers=2)
    reuse, (image_BCHW, token_BT) = Reuse(module, micro=4), pairs(10)
    reuse.score(image_BCHW, token_BT)
    with FlopCounterMode(display=False) as again:
        reuse.embed(ROWS)
    attention = 2 * 2 * 5 * 2 * 2 * 8 * (5**2 + CONTEXT**2)  # an upper bound: unseen on a CPU, but counted as saved
    with FlopCounterMode(display=False) as plain:
        embed_pairs(module, image_BCHW[ROWS], token_BT[ROWS])
    assert again.get_total_flops() == 0
    assert plain.get_total_flops() < reuse.saved_flops <= plain.get_total_flops() + attention


def test_the_scoring_pass_gives_the_embeddings_without_a_graph() -> None:
    """As `embed_pairs` makes them, repeated captions embedded once where that was asked for."""
    module, (image_BCHW, token_BT) = dual_encoder(), pairs(10)
    token_BT[5:] = token_BT[:5]
    with torch.no_grad():
        expected = embed_pairs(module, image_BCHW, token_BT)
    for distinct in (False, True):
        reuse = Reuse(module, micro=4, distinct=distinct)
        for mine, theirs in zip(reuse.score(image_BCHW, token_BT), expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
            assert not mine.requires_grad
        for mine, theirs in zip(reuse.embed(ROWS), expected, strict=True):
            torch.testing.assert_close(mine, theirs[ROWS], atol=1e-6, rtol=1e-5)
            assert mine.requires_grad
    assert reuse.refused is None


def test_captions_are_run_at_the_length_they_were_scored_at() -> None:
    """The longest caption of the super-batch is not among the chosen."""
    module = dual_encoder(layers=2)
    reuse = Reuse(module, micro=3)
    assert compare(module, reuse, torch.tensor([0, 4, 8])) < 1e-6
    assert reuse.refused is None


def test_repeated_rows_and_single_rows_are_taken() -> None:
    """A row drawn twice has its gradient twice."""
    module = dual_encoder(layers=2)
    reuse = Reuse(module, micro=4)
    assert compare(module, reuse, torch.tensor([5, 5, 1])) < 1e-6
    assert compare(module, reuse, torch.tensor([6])) < 1e-6  # computed: torch takes other operations


def test_our_layers_compute_inside_and_are_exact_around() -> None:
    """Fast feedforward layers are run again; the gradients are those without reuse."""
    problem = with_leaves(layers=2)
    reuse = Reuse(problem.module, micro=4)
    assert reuse.why_not is None
    assert compare(problem.module, reuse) < 1e-6
    assert reuse.saved_flops > 0
    assert reuse.refused is None


def test_bf16_is_reused_in_bf16() -> None:
    """Autocast in both passes: the kept products are those that autocast makes."""
    module = dual_encoder(layers=2)
    reuse = Reuse(module, micro=4, bf16=True)
    assert reuse.why_not is None
    assert compare(module, reuse, expected=LearnerProblem(module, bf16=True)) < 2e-2
    assert reuse.refused is None


def test_backprop_checkpoint_saves_its_first_forward_pass() -> None:
    """Blocks are recomputed in the backward pass as ever; the gradient is exact."""
    module, (image_BCHW, token_BT) = dual_encoder(layers=2), pairs(10)
    reuse = Reuse(module, micro=4)
    reuse.score(image_BCHW, token_BT)
    problem, plain = ReusedProblem(module, reuse), DualEncoderProblem(module)
    Backprop("backprop-checkpoint", checkpointed=True).estimate(problem, (image_BCHW[:0], ROWS), seed=0, step=0)
    reused_P = gradient(problem)
    Backprop().estimate(plain, (image_BCHW[ROWS], token_BT[ROWS]), seed=0, step=0)
    torch.testing.assert_close(reused_P, gradient(plain), atol=1e-6, rtol=1e-4)
    assert reuse.saved_flops > 0


def test_flexi_reuses_low_images_and_all_captions() -> None:
    """The first pairs of the batch see full images; the rest were scored at the size they are trained at."""
    module = encoder(image_size=32)
    image_BCHW, token_BT = pairs(10, pixels=32)
    low_BChw = shrink(image_BCHW, (16, 16))
    reuse = Reuse(module, size=(16, 16), micro=4)
    reuse.score(low_BChw, token_BT)
    problem, plain = ReusedProblem(module, reuse), FlexiProblem(module)
    Backprop().estimate(problem, (image_BCHW[ROWS[:2]], ROWS), seed=0, step=0)
    reused_P = gradient(problem)
    Backprop().estimate(plain, (image_BCHW[ROWS[:2]], low_BChw[ROWS[2:]], token_BT[ROWS]), seed=0, step=0)
    torch.testing.assert_close(reused_P, gradient(plain), atol=1e-6, rtol=1e-4)
    assert reuse.refused is None
    assert reuse.saved_flops > 0
    reuse.score(low_BChw, token_BT)
    assert problem.embed((image_BCHW[ROWS], ROWS))[0].shape == (5, 8)


def test_what_was_kept_is_used_once() -> None:
    """A second pass over the same rows computes, and gives the same."""
    module, (image_BCHW, token_BT) = dual_encoder(), pairs(10)
    reuse = Reuse(module, micro=4)
    reuse.score(image_BCHW, token_BT)
    first, saved = reuse.embed(ROWS), reuse.saved_flops
    for mine, theirs in zip(reuse.embed(ROWS), first, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert reuse.saved_flops == saved
    reuse.release()
    with pytest.raises(RuntimeError, match="no super-batch"):
        reuse.embed(ROWS)


@pytest.mark.parametrize("swap", [False, True])
def test_other_weights_are_noticed(swap: bool) -> None:
    """A step in between, or tensors in the place of parameters: rows are computed with what is there now."""
    module, (image_BCHW, token_BT) = dual_encoder(), pairs(10)
    reuse = Reuse(module, micro=4)
    reuse.score(image_BCHW, token_BT)
    weight = module.visual.conv1.weight
    other = weight.detach() + 0.1
    if not swap:
        with torch.no_grad():
            weight.copy_(other)
    with swapped(module, {weight: other} if swap else {}):
        made = reuse.embed(ROWS)[0]
        torch.testing.assert_close(made, embed_pairs(module, image_BCHW[ROWS], token_BT[ROWS])[0])
    assert "weights have changed" in str(reuse.refused)
    assert reuse.saved_flops == 0


def test_beyond_the_limit_nothing_is_kept() -> None:
    """The reason has the figures; the numbers are those of computing, and a smaller super-batch is kept again."""
    module = dual_encoder(layers=2)
    reuse = Reuse(module, micro=4)
    reuse.limit_bytes = reuse.nbytes(6, CONTEXT)
    assert compare(module, reuse) < 1e-6
    assert reuse.saved_flops == 0
    assert "GB to keep for 10 candidates, above the limit of" in str(reuse.refused)
    image_BCHW, token_BT = pairs(5)
    reuse.score(image_BCHW, token_BT)
    assert reuse.refused is None


def test_the_bytes_are_those_that_are_kept() -> None:
    """The estimate equals what the tapes hold, with captions of the whole context."""
    module, (image_BCHW, token_BT) = dual_encoder(layers=2), pairs(10)
    token_BT[0] = torch.tensor([*range(1, CONTEXT), 59])
    reuse = Reuse(module, micro=4)
    reuse.score(image_BCHW, token_BT)
    scored = reuse._scored
    assert scored is not None
    held = [x for tape in (scored.image, scored.text) for part in tape.kept for made in part for x in made]
    assert sum(x.nbytes for x in held) == reuse.nbytes(10, CONTEXT)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"layers": [1, 1, 1, 1], "image_size": 32, "width": 8}, "image tower: BatchNorm2d in training normalises"),
     ({"patch_dropout": 0.5}, "image tower: PatchDropout drops at random")],
)  # fmt: skip
def test_a_tower_that_cannot_be_reused_leaves_the_other(settings: dict[str, Any], reason: str) -> None:
    """The reason is given, captions are reused, and gradients are exact; scoring leaves batch norms alone."""
    module = encoder(**settings)
    reuse = Reuse(module, micro=4)
    assert reason in str(reuse.image.why_not)
    assert reuse.why_not is None
    if "layers" in settings:
        before = module.visual.bn1.running_mean.clone()
        reuse.score(*pairs(10, pixels=32))
        assert torch.equal(module.visual.bn1.running_mean, before)
        assert compare(module, reuse, size=32) < 1e-5
        assert reuse.saved_flops > 0


def test_the_saving_is_known_beforehand() -> None:
    """b F of (B + 3 b) F where both towers are reused; less where one is, as for our own convolutional models."""
    module = dual_encoder(layers=2)
    F = sample_work(module)
    expected = 64 * F.forward / (320 * F.forward + 64 * F.step)
    assert Reuse(module).saving(320, 64) == pytest.approx(expected)
    assert expected == pytest.approx(0.125, rel=0.02)
    tiny = Reuse(build_untrained(CONFIGS["curate-tiny"], seed=0, preprocess=PREPROCESS).train())
    assert 0 < tiny.saving(640, 128, 12) < WORTHWHILE


def rewritten(module: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A model with something between the last norm and the projection of its image tower."""

    class Changed(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return change(self.norm(x))

    module.visual.ln_post = Changed(module.visual.ln_post)
    return module


@pytest.mark.parametrize("change", [lambda x: x - x.mean(0), lambda x: nn.functional.dropout(x, 0.5)])
def test_the_trial_finds_rows_that_depend_on_others_or_on_chance(change: Callable[[Tensor], Tensor]) -> None:
    """Without a module that could be named."""
    reuse = Reuse(rewritten(dual_encoder(), change))
    assert "depend on other rows or on chance" in str(reuse.image.why_not)
    assert reuse.text.why_not is None


def test_products_that_are_written_to_are_computed() -> None:
    """A kept output that is changed in place afterwards would be the wrong answer."""
    module = dual_encoder(layers=2)
    linear = module.visual.transformer.resblocks[0].mlp.c_proj
    linear.register_forward_hook(lambda _, __, y: y.mul_(2))
    reuse = Reuse(module, micro=4)
    assert sum(not operation.places for operation in reuse.image.operations) == 1
    assert compare(module, reuse) < 1e-6


def test_a_change_of_course_is_noticed() -> None:
    """Modes, and operations that the trial has not seen: rows are computed, and the reason is given."""
    module, (image_BCHW, token_BT) = dual_encoder(), pairs(10)
    reuse = Reuse(module, micro=4)
    module.eval()
    reuse.score(image_BCHW, token_BT)
    assert "from training to evaluation" in str(reuse.refused)
    module.train()
    extra = module.visual.ln_post.register_forward_hook(lambda _, __, y: y @ torch.eye(y.shape[-1]))
    reuse.score(image_BCHW, token_BT)
    assert "another course" in str(reuse.refused)
    extra.remove()
    reuse.score(image_BCHW, token_BT)
    module.visual.ln_post.register_forward_hook(lambda _, __, y: y @ torch.eye(y.shape[-1]))
    made = reuse.embed(ROWS)[0]
    assert "another course" in str(reuse.refused)
    torch.testing.assert_close(made, embed_pairs(module, image_BCHW[ROWS], token_BT[ROWS])[0])


@pytest.mark.parametrize("layout", [(0, True), (0, False), (1, True), (1, False)])
def test_places_select_and_join_as_rows_say(layout: tuple[int, bool]) -> None:
    """Against one row at a time, for tensors whose memory runs in another order too."""
    place = Place(*layout)
    x_RkA = torch.randn(5, 3, 4)
    shape = x_RkA if place.outer else x_RkA.transpose(0, 1)
    flat = shape.reshape(15, 4)
    whole = flat if place.dim == 0 else flat.T
    row_b = torch.tensor([4, 1, 1])
    for tensor in (whole, whole.contiguous(), whole.T.contiguous().T):
        taken = place.select(tensor, 5, row_b)
        expected = x_RkA[row_b] if place.outer else x_RkA[row_b].transpose(0, 1)
        expected = expected.reshape(9, 4) if place.dim == 0 else expected.reshape(9, 4).T
        assert torch.equal(taken, expected)
        assert (taken.stride(0) > taken.stride(1)) == (tensor.stride(0) > tensor.stride(1))
        parts = [place.select(tensor, 5, row) for row in (row_b[:1], row_b[1:])]
        assert torch.equal(place.join(parts, [1, 2]), expected)


def test_it_pays_where_few_bytes_are_kept_for_many_products() -> None:
    """A transformer of width 192 is worth keeping; one of width 16 moves more bytes than it saves products."""
    wide = encoder(width=192, head_width=64, text={"width": 192, "heads": 3})
    assert Reuse(wide).pays(320, 64, 8)
    assert not Reuse(encoder()).pays(320, 64, 8)
    assert not Reuse(wide).pays(6400, 64, 8)  # hardly any of so many is trained on
