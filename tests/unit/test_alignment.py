"""Alignment scores by one pass with tangents, against a backward pass per candidate."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import curate
from curate.errors import UsageError
from curate.feedforward.config import FeedforwardConfig
from curate.learner.losses import softmax_loss
from curate.models.build import build_untrained
from curate.models.configs import CONFIGS, PREPROCESS, with_loss
from curate.selection import alignment
from curate.selection.alignment import (
    alignment_scores,
    directional_derivatives,
    own_terms,
    trusted_gradient,
)
from tests.conftest import MINI

# B candidates, D embedding width
CANDIDATES, TRUSTED = 12, 6
VIT: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 500, "width": 32, "heads": 2, "layers": 2},
}
Make = Callable[[str], Any]


def make_tiny(loss: str) -> Any:
    return build_untrained(with_loss(CONFIGS["curate-tiny"], loss), seed=0, preprocess=PREPROCESS)  # type: ignore[arg-type]


def make_vit(loss: str) -> Any:
    return build_untrained(with_loss(VIT, loss), seed=1, preprocess=PREPROCESS)  # type: ignore[arg-type]


def make_custom(loss: str) -> Any:
    """The same with open_clip's other layout, a text tower of its own."""
    config = with_loss({**VIT, "custom_text": True}, loss)  # type: ignore[arg-type]
    return build_untrained(config, seed=1, preprocess=PREPROCESS)


def make_fast(loss: str) -> Any:
    """The transformer with routed layers in both towers."""
    model = make_vit(loss)
    curate.replace_feedforward(model, FeedforwardConfig(depth=2, leaf_width=12, shared_width=4), init="random")
    return model


def make_tiny_fast(loss: str) -> Any:
    """curate-tiny with routed layers in its text tower; its image tower is a ResNet."""
    model = make_tiny(loss)
    curate.replace_feedforward(model, FeedforwardConfig(depth=2, leaf_width=16), where="text", init="random")
    return model


MODELS: dict[str, Make] = {
    "tiny": make_tiny,
    "tiny-fast": make_tiny_fast,
    "vit": make_vit,
    "custom": make_custom,
    "fast": make_fast,
}


def drawn(model: Any, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pictures and captions of different lengths."""
    dice = torch.Generator().manual_seed(seed)
    side = int(model.visual.preprocess_cfg["size"][0] if isinstance(model.visual.preprocess_cfg["size"], tuple) else 0)
    side = side or int(model.visual.preprocess_cfg["size"])
    image = torch.randint(0, 256, (count, 3, side, side), generator=dice, dtype=torch.uint8)
    token = torch.zeros(count, model.context_length, dtype=torch.int64)
    for row in range(count):
        length = 3 + int(torch.randint(0, 8, (), generator=dice))
        token[row, :length] = torch.randint(1, 400, (length,), generator=dice)
        token[row, length] = model.vocab_size - 1
    return image, token


def stirred(model: Any) -> Any:
    """Weights far from their start: batch norms with statistics, residual blocks that are no identities."""
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.fill_(0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=dice))
    return model


def one_by_one(model: Any, direction: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """A backward pass per candidate through open_clip's own forward, the terms written out as two loops."""
    image, token = batch
    mean, std = (torch.tensor(model.visual.preprocess_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    was, named = model.training, dict(model.named_parameters())
    model.eval()
    x = model.encode_image((image.float() / 255 - mean) / std, normalize=True)
    y = model.encode_text(token, normalize=True)
    logit = model.logit_scale.exp() * x @ y.T + (0 if model.logit_bias is None else model.logit_bias)
    slopes = []
    for i in range(len(image)):
        if model.logit_bias is None:
            own = (logit[i].logsumexp(0) + logit[:, i].logsumexp(0)) / 2 - logit[i, i]
        else:
            own = -functional.logsigmoid(logit[i, i])
            for j in set(range(len(image))) - {i}:
                own = own - functional.logsigmoid(-logit[i, j]) - functional.logsigmoid(-logit[j, i])
        gradients = torch.autograd.grad(own, [named[name] for name in direction], retain_graph=True, allow_unused=True)
        pairs = zip(gradients, direction.values(), strict=True)
        slopes.append(sum(float((g.double() * v.double()).sum()) for g, v in pairs if g is not None))
    model.train(was)
    return torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_a_backward_pass_per_candidate(name: str, loss: str) -> None:
    """On a ResNet, a transformer and routed layers, with either loss, scores agree to 1e-4 of their size."""
    model = stirred(MODELS[name](loss))
    count = 5 if "tiny" in name else CANDIDATES  # each backward pass there fills a vocabulary of 49,408 rows
    trusted, candidates = drawn(model, TRUSTED, 1), drawn(model, count, 2)
    direction = trusted_gradient(model, trusted)
    expected = one_by_one(model, direction, candidates)
    score = alignment_scores(model, trusted, candidates)
    assert score.shape == (count,)
    assert score.dtype == torch.float32
    assert not score.requires_grad
    assert (score - expected).abs().max() <= 1e-4 * expected.square().mean().sqrt(), (score, expected)
    assert expected.std() > 1e-3 * expected.abs().mean()  # candidates differ, or agreement would be cheap


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_neither_micro_batches_nor_tiles_change_a_score(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One candidate at a time in tiles of five gives what all at once gives."""
    model = stirred(build_untrained(with_loss(MINI, loss), seed=0, preprocess=PREPROCESS))  # type: ignore[arg-type]
    trusted, candidates = drawn(model, TRUSTED, 1), drawn(model, CANDIDATES, 2)
    whole = alignment_scores(model, trusted, candidates)
    monkeypatch.setattr(alignment, "TILE_ROWS", 5)
    torch.testing.assert_close(alignment_scores(model, trusted, candidates, micro_batch=1), whole, rtol=1e-4, atol=1e-5)


def test_the_mean_of_softmax_terms_is_the_loss_and_sigmoid_terms_leave_with_their_pair() -> None:
    """Softmax terms average to the loss; a sigmoid term is what the sum over all pairs loses without the pair."""
    dice = torch.Generator().manual_seed(0)
    image, text = (functional.normalize(torch.randn(7, 4, generator=dice, dtype=torch.float64), dim=1) for _ in "it")
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    assert float(own_terms(image, text, scale, None).mean()) == pytest.approx(float(softmax_loss(image, text, scale)))

    def total(rows: list[int]) -> float:
        logit = scale * image[rows] @ text[rows].T + bias
        sign = 2 * torch.eye(len(rows)) - 1
        return float(-functional.logsigmoid(sign * logit).sum())

    terms = own_terms(image, text, scale, bias)
    for i in range(7):
        rest = [j for j in range(7) if j != i]
        assert float(terms[i]) == pytest.approx(total([*rest, i]) - total(rest))


def test_the_example_of_the_docstring() -> None:
    """Two orthonormal matched pairs give the numbers that the docstring shows."""
    eye, one = torch.eye(2), torch.tensor(1.0)
    torch.testing.assert_close(own_terms(eye, eye, one, None), torch.full((2,), 0.3133), atol=1e-4, rtol=0)
    torch.testing.assert_close(own_terms(eye, eye, one, 0 * one), torch.full((2,), 1.6996), atol=1e-4, rtol=0)


def test_the_model_is_left_as_it_was() -> None:
    """Weights, gradients, buffers, training mode part by part, and the attention switch are as before."""
    model = stirred(make_fast("sigmoid")).train()
    model.visual.eval()
    model.logit_scale.grad = torch.ones(())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    alignment_scores(model, drawn(model, TRUSTED, 1), drawn(model, CANDIDATES, 2))
    assert [part.training for part in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["logit_scale"]
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_an_exception_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails inside, parameters, training mode and attention come back, and the next call works."""
    model = stirred(make_vit("sigmoid")).train()
    trusted, candidates = drawn(model, TRUSTED, 1), drawn(model, CANDIDATES, 2)
    expected, direction = alignment_scores(model, trusted, candidates), trusted_gradient(model, trusted)
    parameters = [id(p) for p in model.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(alignment, "own_terms", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            directional_derivatives(model, direction, candidates)
    assert model.training
    assert all(part.training for part in model.modules())
    assert [id(p) for p in model.parameters()] == parameters
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(alignment_scores(model, trusted, candidates), expected)


def test_mixed_precision_outside_does_not_reach_the_scores() -> None:
    """Under autocast to bfloat16 the scores are still computed in float32."""
    model = stirred(make_vit("sigmoid"))
    trusted, candidates = drawn(model, TRUSTED, 1), drawn(model, CANDIDATES, 2)
    expected = alignment_scores(model, trusted, candidates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(alignment_scores(model, trusted, candidates), expected)


def test_the_trusted_batch_itself_scores_its_gradient_squared() -> None:
    """Softmax terms average to the loss, so the scores of the trusted pairs average to the gradient's squared norm."""
    model = stirred(make_vit("softmax"))
    trusted = drawn(model, TRUSTED, 1)
    squared = sum(float(v.double().square().sum()) for v in trusted_gradient(model, trusted).values())
    assert float(alignment_scores(model, trusted, trusted).double().mean()) == pytest.approx(squared, rel=1e-4)


def test_frozen_parts_stand_still() -> None:
    """A frozen tower takes no part in the direction, and the scores still equal the backward passes."""
    model = stirred(make_vit("sigmoid"))
    model.visual.requires_grad_(False)
    direction = trusted_gradient(model, drawn(model, TRUSTED, 1))
    assert not any(name.startswith("visual") for name in direction)
    candidates = drawn(model, CANDIDATES, 2)
    expected = one_by_one(model, direction, candidates)
    score = directional_derivatives(model, direction, candidates)
    assert (score - expected).abs().max() <= 1e-4 * expected.square().mean().sqrt()


def test_what_cannot_be_scored_is_refused() -> None:
    """Half precision, empty and unequal batches, foreign names, wrong shapes and NaN each say what is wrong."""
    model = build_untrained(with_loss(MINI, "sigmoid"), seed=0, preprocess=PREPROCESS)
    image, token = drawn(model, 4, 1)
    direction = trusted_gradient(model, (image, token))
    for call, message in (
        (lambda: alignment_scores(model, (image[:0], token[:0]), (image, token)), "trusted: 0 images and 0 captions"),
        (lambda: alignment_scores(model, (image, token), (image, token[:3])), "candidates: 4 images and 3 captions"),
        (lambda: directional_derivatives(model, {"nosuch": image}, (image, token)), "is called nosuch"),
        (lambda: directional_derivatives(model, {"logit_scale": image}, (image, token)), r"logit_scale is \(4, 3"),
        (lambda: directional_derivatives(model, direction, (image, token), micro_batch=0), "micro_batch 0"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    with torch.no_grad():
        model.logit_scale.fill_(float("nan"))
    with pytest.raises(UsageError, match="not finite"):
        alignment_scores(model, (image, token), (image, token))
    with pytest.raises(UsageError, match=r"these are torch\.bfloat16; load with precision fp32"):
        alignment_scores(model.bfloat16(), (image, token), (image, token))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_a_trusted_gradient_in_micro_batches_is_that_of_the_whole_batch(loss: str) -> None:
    """Two pairs at a time give what one backward pass of the loss gives."""
    model = stirred(make_vit(loss))
    image, token = drawn(model, TRUSTED, 1)
    problem = alignment.DualEncoderProblem(model.eval())
    named = dict(model.named_parameters())
    whole = torch.autograd.grad(problem.loss(*problem.embed((image, token))), list(named.values()), allow_unused=True)
    found = trusted_gradient(model, (image, token), micro_batch=2)
    for name, gradient in zip(named, whole, strict=True):
        assert (name in found) == (gradient is not None)
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_threads_share_a_direction_while_the_model_embeds() -> None:
    """Four threads score and embed at once: each gets the numbers it gets alone, and the model stays as it was."""
    model = stirred(make_vit("sigmoid")).eval()
    direction = trusted_gradient(model, drawn(model, TRUSTED, 1))
    batches = [drawn(model, CANDIDATES, seed) for seed in range(2, 10)]
    alone = [directional_derivatives(model, direction, batch) for batch in batches]
    with torch.no_grad():
        expected = model.encode_image(batches[0][0].float() / 255)
    with alignment.moving(model, direction) as derive, ThreadPoolExecutor(4) as pool:

        def embed(_: int) -> Tensor:
            with torch.no_grad():
                return torch.as_tensor(model.encode_image(batches[0][0].float() / 255))

        embedding = pool.map(embed, range(8))
        together = list(pool.map(derive, batches))
        for embedded in embedding:
            assert torch.autograd.forward_ad.unpack_dual(embedded).tangent is None
            torch.testing.assert_close(embedded, expected)
    for score, own in zip(together, alone, strict=True):
        torch.testing.assert_close(score, own, rtol=1e-4, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
