"""The fast feedforward layers: what they promise whatever kernel computes them."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import UsageError
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.feedforward.penalties import (
    balance_loss,
    hardening_loss,
    leaf_probabilities,
    log_path_probability,
    penalty,
)
from curate.kernels.fff import leaf_of, native

# T tokens, D width
needs_cpp = pytest.mark.skipif(not native.supports(torch.zeros(1)), reason="no C++ kernels: no compiler here")
KERNELS = ["plain", "grouped", "masked", pytest.param("native", marks=needs_cpp), "auto"]


def layer(**changes: object) -> FastFeedforward:
    settings: dict[str, object] = {"depth": 3, "leaf_width": 8, "generator": torch.Generator().manual_seed(0)}
    return FastFeedforward(24, **(settings | changes))  # type: ignore[arg-type]


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gate", ["none", "log", "probability"])
@pytest.mark.parametrize("count", [1, 3, 70])
def test_hard_training_equals_evaluation_exactly(kernel: str, gate: str, count: int) -> None:
    """The bits of a training forward are those of evaluation, with and without gradients, for few and many tokens."""
    for depth in (0, 3):
        ffn = layer(depth=depth, gate=gate, kernel=kernel, shared_width=4, balance=0.1)
        x = tokens(count)
        trained = ffn.train()(x).detach()
        assert torch.equal(ffn.eval()(x).detach(), trained)
        with torch.inference_mode():
            assert torch.equal(ffn(x), trained)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_mixture_of_one(kernel: str) -> None:
    """The output is the leaf that the tree's definition picks, plus the shared part."""
    ffn, x = layer(kernel=kernel, shared_width=4).eval(), tokens(30)
    leaf = leaf_of(functional.linear(x, ffn.node_weight, ffn.node_bias))
    assert torch.equal(ffn.leaf_indices(x), leaf)
    rows = [functional.gelu(x[t] @ ffn.w1[e] + ffn.b1[e]) @ ffn.w2[e] + ffn.b2[e] for t, e in enumerate(leaf.tolist())]
    shared = functional.gelu(ffn.shared_in(x)) @ ffn.shared_out.weight.T
    torch.testing.assert_close(ffn(x), torch.stack(rows) + shared, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["plain", "grouped", pytest.param("native", marks=needs_cpp)])
def test_log_gate_gives_nodes_the_published_gradient(kernel: str) -> None:
    """dL/dz of a node on the path is +-(1 - p of the branch taken) <dL/dy, leaf output>, and 0 off the path."""
    ffn, x = layer(kernel=kernel), tokens(20)
    ffn(x).pow(2).sum().backward()
    with torch.no_grad():
        y = ffn(x)
        logits = functional.linear(x, ffn.node_weight, ffn.node_bias)
        along = (2 * y * y).sum(1)
        wanted = torch.zeros_like(logits)
        for token, leaf in enumerate(ffn.leaf_indices(x).tolist()):
            for level in range(3):
                node = ((leaf + 8) >> (3 - level)) - 1
                right = (leaf >> (2 - level)) & 1
                taken = torch.sigmoid(logits[token, node] if right else -logits[token, node])
                wanted[token, node] = (1 if right else -1) * (1 - taken) * along[token]
    torch.testing.assert_close(ffn.node_bias.grad, wanted.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ffn.node_weight.grad, wanted.T @ x, rtol=1e-4, atol=1e-4)


def test_without_a_gate_nodes_get_nothing() -> None:
    """Hard routing alone has no gradient for the tree."""
    ffn = layer(gate="none")
    ffn(tokens(20)).sum().backward()
    assert ffn.node_weight.grad is None


def test_leaves_without_tokens_have_zero_gradient() -> None:
    """Exactly zero, for every parameter of a leaf that no token reached."""
    ffn, x = layer(depth=5), tokens(6)
    ffn(x).sum().backward()
    idle = torch.ones(32, dtype=torch.bool)
    idle[ffn.leaf_indices(x)] = False
    for parameter in (ffn.w1, ffn.b1, ffn.w2, ffn.b2):
        assert torch.count_nonzero(parameter.grad[idle]) == 0
        assert torch.count_nonzero(parameter.grad[~idle]) > 0


def test_depth_0_is_the_dense_layer() -> None:
    """One leaf holds the weights of Linear-GELU-Linear and gives what that gives."""
    dense = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
    ffn = layer(depth=0, leaf_width=40)
    with torch.no_grad():
        for own, other in zip((ffn.w1, ffn.b1, ffn.w2, ffn.b2), dense.parameters(), strict=True):
            own.copy_((other.T if other.ndim == 2 else other)[None])
    x = tokens(4, 9)
    torch.testing.assert_close(ffn(x), dense(x), rtol=1e-5, atol=1e-5)


def test_soft_mode_mixes_all_leaves() -> None:
    """The mixture is the probability-weighted sum of every leaf's output, and its gradients reach every leaf."""
    ffn, x = layer(), tokens(5)
    ffn.soft = True
    share = leaf_probabilities(functional.linear(x, ffn.node_weight, ffn.node_bias))
    every = [functional.gelu(x @ ffn.w1[e] + ffn.b1[e]) @ ffn.w2[e] + ffn.b2[e] for e in range(8)]
    y = ffn(x)
    torch.testing.assert_close(y, (share[:, :, None] * torch.stack(every, 1)).sum(1), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert (ffn.w1.grad.flatten(1).abs().sum(1) > 0).all()
    assert ffn.penalty is None


def test_soft_training_is_penalised_as_well() -> None:
    """Hardening, which soft training was published with, reaches the nodes of a mixture."""
    ffn = layer(hardening=1.0)
    ffn.soft = True
    ffn(tokens(5))
    ffn.penalty.backward()
    assert ffn.node_weight.grad.abs().max() > 0


def test_region_leak_turns_decisions_round_in_training_only() -> None:
    """Training sends a share of tokens elsewhere, by the step's own number; evaluation does not."""
    ffn, x = layer(region_leak=0.2), tokens(200)
    still = ffn.eval()(x)
    assert torch.equal(ffn(x), still)
    ffn.train()
    first, second = ffn(x), ffn(x)
    moved = (first != still).any(1).float().mean().item()
    assert moved == pytest.approx(1 - 0.8**3, abs=0.12)
    assert not torch.equal(first, second)
    again = layer(region_leak=0.2)
    again.load_state_dict(ffn.state_dict())
    again.leak_step.zero_()
    assert torch.equal(again.train()(x), first)


def test_leaf_probabilities_sum_to_one_and_match_the_path() -> None:
    """Each row is a distribution, and the log-probability of a path is the log of its leaf's entry."""
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = leaf_probabilities(logits)
    torch.testing.assert_close(share.sum(1), torch.ones(9, dtype=torch.float64))
    leaf = leaf_of(logits)
    torch.testing.assert_close(log_path_probability(logits, leaf).exp(), share.gather(1, leaf[:, None])[:, 0])
    assert leaf_probabilities(torch.empty(3, 0)).tolist() == [[1.0]] * 3


def test_penalties_have_their_stated_extremes() -> None:
    """Balance is 1 when tokens are spread evenly and L when all sit in one leaf; hardening is log 2 at indecision."""
    even = torch.tensor([[0.0], [0.0]])
    assert balance_loss(even, torch.tensor([0, 1])).item() == pytest.approx(1)
    sure = torch.full((4, 3), -40.0)
    assert balance_loss(sure, leaf_of(sure)).item() == pytest.approx(4)
    assert hardening_loss(torch.zeros(3, 1)).item() == pytest.approx(math.log(2))
    assert hardening_loss(sure).item() < 1e-4
    assert balance_loss(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)).item() == 0
    for extreme in (torch.full((2, 3), 1e4), torch.full((2, 3), -1e4)):
        extreme.requires_grad_()
        (hardening_loss(extreme) + balance_loss(extreme, leaf_of(extreme.detach()))).backward()
        assert extreme.grad.isfinite().all()


def test_penalties_are_left_by_training_and_summed_over_a_model() -> None:
    """A forward pass in training leaves a penalty; a model's are summed; its gradient reaches the nodes alone."""
    model = nn.Sequential(layer(balance=0.5, hardening=0.1), layer(balance=0.5, gate="none"))
    assert penalty(model) == 0.0
    model(tokens(30))
    total = penalty(model)
    assert isinstance(total, Tensor)
    assert total.item() > 0.9
    total.backward()
    assert model[0].node_weight.grad.abs().sum() > 0
    assert model[1].w1.grad is None
    assert penalty(copy.deepcopy(model)) == 0.0


def test_usage_is_counted_when_asked() -> None:
    """`usage` counts tokens per leaf over forward passes while `count_usage` is on."""
    ffn, x = layer().eval(), tokens(50)
    ffn(x)
    assert ffn.usage.sum() == 0
    ffn.count_usage = True
    with torch.inference_mode():
        ffn(x)
    assert torch.equal(ffn.usage, torch.bincount(ffn.leaf_indices(x), minlength=8))


@pytest.mark.parametrize("make", [layer, lambda: PathFeedforward(24, depth=3, trees=2)])
def test_layers_survive_copying_and_saving(make: object) -> None:
    """deepcopy, state dicts and weights-only files give the same output; the state dict holds parameters only."""
    ffn, x = make(), tokens(2, 6)  # type: ignore[operator]
    wanted = ffn(x)
    assert torch.equal(copy.deepcopy(ffn)(x), wanted)
    file = io.BytesIO()
    torch.save(ffn.state_dict(), file)
    file.seek(0)
    other = type(ffn)(
        24, **({"depth": 3, "leaf_width": 8} if isinstance(ffn, FastFeedforward) else {"depth": 3, "trees": 2})
    )
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), wanted)
    assert set(ffn.state_dict()) == dict(ffn.named_parameters()).keys()


@pytest.mark.parametrize("make", [layer, lambda: PathFeedforward(24, depth=3, trees=2)])
def test_layers_follow_autocast(make: object) -> None:
    """Under autocast the output is bfloat16, near the fp32 one where routing agrees, and gradients are fp32."""
    ffn, x = make(), tokens(40)  # type: ignore[operator]
    wanted = ffn(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = ffn(x)
    assert y.dtype == torch.bfloat16
    assert ((y.float() - wanted).abs().amax(1) < 0.05).float().mean() > 0.85
    y.float().sum().backward()
    assert ffn.w1.grad.dtype == torch.float32
    assert ffn.w1.grad.isfinite().all()


def test_a_generator_is_the_only_source_of_weights() -> None:
    """Two layers from equal generators are equal, and torch's own generator is left alone."""
    before = torch.get_rng_state()
    one, other = layer(shared_width=4), layer(shared_width=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("make", [layer, lambda: PathFeedforward(24, depth=3, trees=2)])
def test_a_prepared_call_never_outlives_its_weights(make: object) -> None:
    """What one-token calls remember is dropped when weights move, change type or are exchanged, or modes change."""
    x = tokens(1)

    def check(ffn: FastFeedforward | PathFeedforward, x: Tensor) -> None:
        with torch.inference_mode():
            found = ffn(x)
        fresh = copy.deepcopy(ffn)
        fresh.kernel = "plain"
        torch.testing.assert_close(
            found, fresh(x).detach(), rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-2
        )

    def moved(ffn: FastFeedforward | PathFeedforward) -> None:
        ffn.w1.data = torch.randn_like(ffn.w1.data)

    def exchanged(ffn: FastFeedforward | PathFeedforward) -> None:
        ffn.w2 = nn.Parameter(torch.randn_like(ffn.w2))

    def in_place(ffn: FastFeedforward | PathFeedforward) -> None:
        with torch.no_grad():
            ffn.w1.mul_(-3)

    def turned(ffn: FastFeedforward | PathFeedforward) -> None:
        wide = torch.randn(ffn.w1.numel())
        ffn.w1.data = wide.view(*ffn.w1.shape[:-2], ffn.w1.shape[-1], ffn.w1.shape[-2]).mT

    for change in (moved, exchanged, in_place, turned, lambda ffn: ffn.double(), lambda ffn: ffn.bfloat16()):
        ffn = make()  # type: ignore[operator]
        check(ffn, x)
        check(ffn, x)
        change(ffn)
        for _ in range(2):
            check(ffn, x.to(ffn.w1.dtype))
    ffn = make()  # type: ignore[operator]
    check(ffn, x)
    assert ffn(x).grad_fn is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ffn(x).dtype == torch.bfloat16
    dy = torch.func.jvp(ffn, (x,), (torch.ones_like(x),))[1]
    assert dy.abs().max() > 0
    with torch.inference_mode():
        assert ffn(tokens(2, 3, 4)).shape == (2, 3, 4, 24)
        assert ffn(x.T.contiguous().T).shape == x.shape


@needs_cpp
@pytest.mark.parametrize("make", [layer, lambda: PathFeedforward(24, depth=3, trees=2)])
def test_a_second_token_finds_its_call_prepared(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """One quiet token after another goes straight to C++; nothing is looked up or checked twice."""
    ffn = make()  # type: ignore[operator]
    with torch.inference_mode():
        wanted = ffn(tokens(1))
        monkeypatch.setattr(type(ffn), "_any", None)
        assert torch.equal(ffn(tokens(1)), wanted)


@pytest.mark.parametrize("kernel", ["plain", "grouped", "masked", pytest.param("native", marks=needs_cpp)])
@pytest.mark.parametrize("gate", ["none", "log", "probability"])
def test_layers_have_tangents_for_every_gate_and_kernel(gate: str, kernel: str) -> None:
    """jvp and vmap of jvp over x and all parameters: adjoint to backward, and the plain kernel's numbers."""
    ffn, x = layer(gate=gate, kernel=kernel, shared_width=3), tokens(2, 9)
    grad = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3))
    names = [name for name, _ in ffn.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(ffn, dict(zip(names, weights, strict=True)), (x,))

    inputs = (x, *(parameter.detach() for parameter in ffn.parameters()))
    dice = torch.Generator().manual_seed(4)
    directions = tuple(torch.randn(3, *tensor.shape, generator=dice) for tensor in inputs)
    dy_V = torch.func.vmap(lambda *v: torch.func.jvp(call, inputs, v)[1])(*directions)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    backward = torch.autograd.grad(call(*leaves), leaves, grad, allow_unused=True)
    for item in range(3):
        pairs = [(g, d[item]) for g, d in zip(backward, directions, strict=True) if g is not None]
        across = sum(float((g.double() * d.double()).sum()) for g, d in pairs)
        assert float((grad.double() * dy_V[item].double()).sum()) == pytest.approx(across, rel=1e-4, abs=1e-3)
    one = torch.func.jvp(call, inputs, tuple(direction[1] for direction in directions))[1]
    torch.testing.assert_close(dy_V[1], one, rtol=1e-4, atol=1e-5)
    ffn.kernel = "plain"
    torch.testing.assert_close(
        torch.func.jvp(call, inputs, tuple(d[0] for d in directions))[1], dy_V[0], rtol=1e-4, atol=1e-4
    )


def test_empty_inputs_pass_through() -> None:
    """No tokens in, no tokens out, in every mode."""
    for ffn in (layer(), layer(balance=0.1, shared_width=3), PathFeedforward(24, depth=2)):
        assert ffn(torch.empty(0, 5, 24)).shape == (0, 5, 24)
        assert ffn.eval()(torch.empty(0, 24)).shape == (0, 24)


def test_impossible_sizes_are_refused() -> None:
    """Sizes and names that make no layer are usage errors naming the value."""
    for wrong in (
        {"depth": -1},
        {"leaf_width": 0},
        {"activation": "selu"},
        {"gate": "soft"},
        {"region_leak": 0.5},
        {"depth": 40},
    ):
        with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
            layer(**wrong)
    with pytest.raises(UsageError):
        PathFeedforward(24, depth=2, trees=0)
    with pytest.raises(ValueError, match="kernel 'cuda'"):
        layer(kernel="cuda")(tokens(1))


def test_path_layer_follows_its_paths() -> None:
    """Training and evaluation give the same bits, and only nodes on some token's path get a gradient."""
    ffn, x = PathFeedforward(24, depth=5, generator=torch.Generator().manual_seed(0)), tokens(3)
    y = ffn(x)
    with torch.inference_mode():
        assert torch.equal(ffn.eval()(x), y)
    y.sum().backward()
    touched = (ffn.w1.grad[0].abs().sum(1) > 0).sum().item()
    assert 6 <= touched <= 3 * 6
