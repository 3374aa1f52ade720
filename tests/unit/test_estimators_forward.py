"""What forward estimators leave alone, put back, mask and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.backends.cuda import flash_sdp_enabled, math_sdp_enabled, mem_efficient_sdp_enabled
from torch.nn import functional

from curate.errors import UsageError
from curate.estimators.forward import Forward
from curate.estimators.names import NAMES, make_estimator
from curate.estimators.problem import DualEncoderProblem, ModuleProblem
from curate.estimators.swapping import attention_for_tangents, only_trainable, swapped
from curate.feedforward.leaf import FastFeedforward
from tests.oracle.estimator_cases import classifier, dual_encoder, exact, gradient, pairs

BATCHED = [name for name in NAMES if name not in ("hybrid", "forward-exact")]


def switches() -> tuple[bool, ...]:
    return (
        torch.backends.mha.get_fastpath_enabled(),
        flash_sdp_enabled(),
        math_sdp_enabled(),
        mem_efficient_sdp_enabled(),
    )


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", BATCHED)
def test_weights_and_switches_are_as_before(name: str) -> None:
    """An estimate fills .grad with finite numbers and changes nothing else, not even a bit of a weight."""
    problem, batch = DualEncoderProblem(dual_encoder()), pairs()
    before, owned, found = state(problem.module), dict(problem.module.named_parameters()), switches()
    report = make_estimator(name).estimate(problem, batch, seed=0, step=0)
    assert all(torch.equal(value, before[key]) for key, value in problem.module.state_dict().items())
    assert all(value is owned[key] for key, value in problem.module.named_parameters())
    assert switches() == found
    assert torch.isfinite(gradient(problem)).all()
    assert report.names == tuple(owned)
    assert report.dimensions == len(gradient(problem))


@pytest.mark.parametrize("name", BATCHED)
def test_everything_comes_back_after_an_exception(name: str) -> None:
    """A loss that fails in the middle leaves weights, parameters, hooks and switches as they were."""
    problem, batch = DualEncoderProblem(dual_encoder()), pairs()
    before, owned, found = state(problem.module), dict(problem.module.named_parameters()), switches()

    def fails(*_: Any) -> None:
        raise RuntimeError("planted")

    problem.module.ln_final.register_forward_pre_hook(fails)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in problem.module.modules())
    with pytest.raises(RuntimeError, match="planted"):
        make_estimator(name).estimate(problem, batch, seed=0, step=0)
    assert all(torch.equal(value, before[key]) for key, value in problem.module.state_dict().items())
    assert all(value is owned[key] for key, value in problem.module.named_parameters())
    assert switches() == found
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in problem.module.modules())
    assert not any("forward" in vars(m) for m in problem.module.modules())


def test_contexts_put_things_back() -> None:
    """Inside, a parameter is another tensor, others are frozen and attention has forward derivatives; after, not."""
    layer, found = nn.Linear(2, 2), switches()
    weight = layer.weight
    with attention_for_tangents(), swapped(layer, {weight: torch.ones(2, 2)}):
        assert float(layer.weight.sum()) == 4
        assert switches() == (False, False, True, False)
    with only_trainable(layer, {"bias"}):
        assert not layer.weight.requires_grad
    assert layer.weight is weight
    assert weight.requires_grad
    assert switches() == found


def test_batch_statistics_move_once_for_many_tangents() -> None:
    """Three tangents and a second pass leave the running statistics of one forward pass."""
    batch = pairs(pixels=32)
    problem = DualEncoderProblem(dual_encoder(convolutional=True))
    start = state(problem.module)
    problem.embed(batch)
    wanted = state(problem.module)
    problem.module.load_state_dict(start)
    Forward(tangents=3).estimate(problem, batch, seed=0, step=0)
    for name, value in problem.module.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


def test_activity_refuses_coupled_examples() -> None:
    """BatchNorm in training is refused by name; in evaluation it is a layer like others."""
    problem, batch = DualEncoderProblem(dual_encoder(convolutional=True)), pairs(pixels=32)
    with pytest.raises(UsageError, match="BatchNorm in training couples"):
        make_estimator("forward-activity").estimate(problem, batch, seed=0, step=0)
    problem.module.eval()
    assert make_estimator("forward-activity").estimate(problem, batch, seed=0, step=0).loss > 0


@pytest.mark.parametrize("layout", ["rank-1", "dense"])
@pytest.mark.parametrize("what", ["leaves", "words"])
def test_untouched_leaves_nodes_and_words_get_exactly_zero(layout: Any, what: str) -> None:
    """Rows whose true gradient is zero because nothing went there are zero in the estimate; others are not."""
    problem, batch = classifier(fast=True) if what == "leaves" else (DualEncoderProblem(dual_encoder()), pairs(2))
    batch = (batch[0][:3], batch[1][:3])
    exact(problem, batch)
    true = {name: p.grad.clone() for name, p in problem.module.named_parameters()}
    report = Forward(layout=layout).estimate(problem, batch, seed=0, step=0)
    masked = {name for rows in report.rows for name in rows.names}
    leaves = {"1.w1", "1.b1", "1.w2", "1.b2", "1.node_weight", "1.node_bias"}
    assert masked == (leaves if what == "leaves" else {"token_embedding.weight"})
    for name in masked:
        untouched = true[name].reshape(len(true[name]), -1).abs().sum(1) == 0
        found = problem.module.get_parameter(name).grad
        assert torch.equal(found.reshape(len(found), -1).abs().sum(1) == 0, untouched), name
        assert 0 < int(untouched.sum()) < len(untouched), name


def test_nodes_without_a_gate_have_no_gradient() -> None:
    """With gate "none" no node is ever touched."""
    layer = FastFeedforward(3, depth=2, leaf_width=2, width_out=4, gate="none")
    batch = (torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))
    Forward().estimate(ModuleProblem(layer, functional.cross_entropy), batch, seed=0, step=0)
    assert not layer.node_weight.grad.any()
    assert layer.w1.grad.any()


def test_leaves_that_cannot_be_followed_are_refused() -> None:
    """Region leak in training is refused with what to do; a mixture of leaves has no rows of its own."""
    leaky = FastFeedforward(3, depth=2, leaf_width=2, region_leak=0.1, width_out=4)
    batch = (torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(UsageError, match="region_leak"):
        Forward().estimate(ModuleProblem(leaky, functional.cross_entropy), batch, seed=0, step=0)
    soft = FastFeedforward(3, depth=2, leaf_width=2, width_out=4)
    soft.soft = True
    assert Forward().estimate(ModuleProblem(soft, functional.cross_entropy), batch, seed=0, step=0).rows == ()


class Hidden(nn.Module):
    """Uses a linear layer's weight where torch functions cannot be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x @ self.layer.weight


def test_activity_refuses_what_it_cannot_perturb() -> None:
    """The first parameter that meets no torch operation is named."""
    problem = ModuleProblem(Hidden(), functional.cross_entropy)
    with pytest.raises(UsageError, match=r"layer\.weight meets no torch operation"):
        make_estimator("forward-activity").estimate(
            problem, (torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])), seed=0, step=0
        )


def test_a_weight_that_no_rule_meets_is_an_error() -> None:
    """A tangent that would be lost is refused by name, instead of a gradient of noise."""
    batch = (torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]))
    problem = ModuleProblem(Hidden(), functional.cross_entropy)
    with pytest.raises(UsageError, match=r"layer\.weight: no rule"):
        Forward().estimate(problem, batch, seed=0, step=0)
    assert make_estimator("forward-dense").estimate(problem, batch, seed=0, step=0).slopes[0] != 0


def test_recurrent_layers_are_refused() -> None:
    """torch's LSTM keeps its weights where a swap does not reach."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0][:, -1]  # type: ignore[no-any-return]

    problem = ModuleProblem(Last(), functional.cross_entropy)
    with pytest.raises(UsageError, match="lstm: recurrent"):
        Forward().estimate(problem, (torch.randn(2, 5, 3), torch.tensor([0, 1])), seed=0, step=0)


def test_impossible_settings_are_refused() -> None:
    """No tangents, too many numbers for the basis, and nothing to learn."""
    problem, batch = DualEncoderProblem(dual_encoder()), pairs()
    with pytest.raises(UsageError, match="0 tangents"):
        Forward(tangents=0)
    with pytest.raises(UsageError, match="at most 2,048"):
        make_estimator("forward-exact").estimate(problem, batch, seed=0, step=0)
    problem.module.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter"):
        Forward().estimate(problem, batch, seed=0, step=0)
