"""Perturbed activations within fast feedforward layers: exact in expectation, a literal draw, leaves left in peace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.errors import UsageError
from curate.estimators import noise
from curate.estimators.activity import ForwardActivity
from curate.estimators.names import make_estimator
from curate.estimators.penalised import Penalised
from curate.estimators.problem import DualEncoderProblem, ModuleProblem, Problem
from curate.estimators.replay import replay
from curate.estimators.signs import key_of, signs
from curate.estimators.swapping import Rewind
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.leaf import FastFeedforward
from curate.feedforward.path import PathFeedforward
from curate.feedforward.surgery import replace_feedforward
from tests.oracle.estimator_cases import dual_encoder, estimates, exact, gradient, pairs, with_leaves

# B examples, T tokens of one, C columns: activations of one example
ACTIVITY = ForwardActivity()
LEAF, PATH = {"depth": 2, "leaf_width": 3}, {"depth": 2, "trees": 2}


class Pooled(nn.Module):
    """Tokens [B, T, 3] through a linear layer, those given, a mean over tokens and a linear head of four classes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inward, self.layers, self.head = nn.Linear(3, 5), nn.ModuleList(layers), nn.Linear(5, 4)
        self.double().train()

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = self.inward(x_BTD)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def pooled(*kinds: dict[str, Any], examples: int = 4, tokens: int = 2) -> tuple[ModuleProblem, tuple[Tensor, Tensor]]:
    """A layer for each of the settings, and a batch."""
    dice = torch.Generator().manual_seed(3)
    made = [(PathFeedforward if "trees" in own else FastFeedforward)(5, generator=dice, **own) for own in kinds]
    x_BTD = torch.randn(examples, tokens, 3, generator=dice, dtype=torch.float64)
    return ModuleProblem(Pooled(*made), functional.cross_entropy), (
        x_BTD,
        torch.randint(0, 4, (examples,), generator=dice),
    )


class OneByOne:
    """In place of random signs one activation of every example, another at each turn, sqrt(total) long."""

    def __init__(self) -> None:
        self.first: dict[str, int] = {}
        self.total, self.turn = 0, 0

    def signs(self, noise: Any, label: str, like: Tensor, dim: int) -> Tensor:
        assert dim == 0
        columns = like.numel() // noise.examples
        if label not in self.first:
            self.first[label], self.total = self.total, self.total + columns
        u_BC = like.new_zeros(noise.examples, columns)
        place = self.turn - self.first[label]
        if 0 <= place < columns:
            u_BC[:, place] = self.total**0.5
        return u_BC.view(like.shape)


def expected(problem: Problem, batch: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The mean of estimates along every single activation, which is the expectation over independent signs."""
    one, again, found = OneByOne(), Rewind(problem.module), []
    monkeypatch.setattr(noise.Noise, "_signs", lambda *args: one.signs(*args))
    ACTIVITY.estimate(problem, batch, seed=0, step=0)  # counts them
    for turn in range(one.total):
        one.turn = turn
        again.rewind()
        ACTIVITY.estimate(problem, batch, seed=0, step=0)
        found.append(gradient(problem))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize(
    "kinds",
    [
        ({**LEAF, "gate": "log"},),
        ({**LEAF, "gate": "probability", "shared_width": 2, "activation": "quick_gelu"},),
        ({**LEAF, "gate": "none"},),
        ({**LEAF, "gate": "none", "kernel": "plain"},),
        ({**LEAF, "region_leak": 0.3},),
        ({"depth": 0, "leaf_width": 3},),
        (PATH,),
        (LEAF, PATH),
    ],
    ids=str,
)
def test_the_expectation_is_the_gradient(kinds: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all activations of an example the estimates add up to backprop's gradient, for nodes with every gate too."""
    problem, batch = pooled(*kinds)
    again = Rewind(problem.module)  # region leak counts its steps
    wanted_P = exact(problem, batch)
    again.rewind()
    torch.testing.assert_close(expected(problem, batch, monkeypatch), wanted_P, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gate", ["log", "none"])
@pytest.mark.parametrize("frozen", ["", "layers.1.node", "layers.0.w"])
def test_the_expectation_with_penalties(gate: Any, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Balance and hardening of two layers, the second's reaching through the first: the same, frozen parts or not."""
    weights = {"balance": 0.3, "hardening": 0.2, "gate": gate}
    inner, batch = pooled({**LEAF, **weights}, {**LEAF, **weights})
    for name, parameter in inner.module.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    problem = Penalised(inner)
    wanted_P = exact(problem, batch)
    assert not torch.allclose(wanted_P, exact(inner, batch), rtol=1e-3)
    torch.testing.assert_close(expected(problem, batch, monkeypatch), wanted_P, rtol=1e-5, atol=1e-7)  # float32 within


def test_a_mixture_of_leaves_is_like_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`soft` layers, with penalties too, are made of torch operations; their nodes have noise like the rest."""
    inner, batch = pooled({**LEAF, "balance": 0.3, "hardening": 0.2})
    inner.module.layers[0].soft = True
    problem = Penalised(inner)
    wanted_P = exact(problem, batch)
    torch.testing.assert_close(expected(problem, batch, monkeypatch), wanted_P, rtol=1e-5, atol=1e-7)


def test_one_draw_is_what_its_definition_says() -> None:
    """Token by token, with the same signs: shares from a derivative along the noise, outer products for the weights."""
    problem, batch = pooled(LEAF)
    report = ACTIVITY.estimate(problem, batch, seed=7, step=2)
    share_B, wanted = literal(problem.module, batch, seed=7, step=2)
    torch.testing.assert_close(torch.tensor(report.slopes, dtype=torch.float64), share_B, rtol=1e-8, atol=1e-12)
    for name, parameter in problem.module.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-8, atol=1e-12, msg=name)


def literal(module: Any, batch: tuple[Tensor, Tensor], *, seed: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Shares [B] and gradients by the definition in the module's docstring: one token after the other, log-gate."""
    (x_BTD, label_B), layer = batch, module.layers[0]
    B, T = x_BTD.shape[:2]
    made: dict[str, list[Tensor]] = {name: [] for name in ("inward", "node", "1", "2", "head")}  # outputs by operation
    pushed: dict[str, list[Tensor]] = {name: [] for name in made}  # zeros, along which the loss is differentiated
    used: list[dict[str, Any]] = []

    def disturbed(name: str, y: Tensor) -> Tensor:
        made[name].append(y.detach())
        pushed[name].append(torch.zeros_like(y, requires_grad=True))
        return y + pushed[name][-1]

    outputs = []
    for n in range(B):
        tokens = []
        for t in range(T):
            h = disturbed("inward", module.inward.weight @ x_BTD[n, t] + module.inward.bias)
            node, nodes, right = 0, [], []
            for _ in range(layer.depth):
                nodes.append(node)
                right.append(bool(layer.node_weight[node] @ h + layer.node_bias[node] > 0))
                node = 2 * node + 1 + right[-1]
            leaf = node - len(layer.node_bias)
            z = disturbed("node", torch.stack([layer.node_weight[i] @ h + layer.node_bias[i] for i in nodes]))
            log = sum(functional.logsigmoid(one if r else -one) for one, r in zip(z, right, strict=True))
            pre = disturbed("1", h @ layer.w1[leaf] + layer.b1[leaf])
            act = functional.gelu(pre)
            y = disturbed("2", act @ layer.w2[leaf] + layer.b2[leaf])
            tokens.append((log - log.detach()).exp() * y)
            used.append({"x": x_BTD[n, t], "h": h.detach(), "nodes": nodes, "leaf": leaf, "act": act.detach()})
        mean = sum(tokens) / T
        outputs.append(disturbed("head", module.head.weight @ mean + module.head.bias))
        used[-1]["mean"] = mean.detach()
    loss = functional.cross_entropy(torch.stack(outputs), label_B)
    labels = {"inward": "inward.bias", "node": "layers.0.node_bias", "1": "layers.0.b1", "2": "layers.0.b2",
              "head": "head.bias"}  # fmt: skip
    share_B, u, spread = torch.zeros(B, dtype=torch.float64), {}, {}
    for name, outs in made.items():
        out_tc = torch.stack(outs)
        spread[name] = out_tc.square().mean().sqrt()
        key = key_of(seed, step, 0, f"{labels[name]} activity 1")
        u[name] = spread[name] * signs(key, B, out_tc.numel() // B, device="cpu", dtype=out_tc.dtype).view(out_tc.shape)
        slopes = torch.autograd.grad(loss, pushed[name], retain_graph=True)
        for row, slope in enumerate(slopes):
            share_B[row * B // len(outs)] += slope @ u[name][row]
    found = {name: torch.zeros_like(p) for name, p in module.named_parameters()}

    def add(weight: str, bias: str, at: Any, outer: Tensor, own: Tensor) -> None:
        found[weight][at] += outer
        found[bias][at] += own

    for row, token in enumerate(used):
        n, leaf = row // T, token["leaf"]
        v = {name: share_B[n] / spread[name] ** 2 * u[name][row] for name in ("inward", "node", "1", "2")}
        add("inward.weight", "inward.bias", ..., torch.outer(v["inward"], token["x"]), v["inward"])
        for p, node in enumerate(token["nodes"]):
            add("layers.0.node_weight", "layers.0.node_bias", node, v["node"][p] * token["h"], v["node"][p])
        add("layers.0.w1", "layers.0.b1", leaf, torch.outer(token["h"], v["1"]), v["1"])
        add("layers.0.w2", "layers.0.b2", leaf, torch.outer(token["act"], v["2"]), v["2"])
        if "mean" in token:
            last = share_B[n] / spread["head"] ** 2 * u["head"][n]
            add("head.weight", "head.bias", ..., torch.outer(last, token["mean"]), last)
    return share_B, found


@pytest.mark.parametrize("kind", [{"depth": 4, "leaf_width": 3}, {"depth": 4, "trees": 1}], ids=["leaves", "paths"])
def test_untouched_leaves_and_nodes_get_exactly_zero(kind: dict[str, Any]) -> None:
    """Rows without tokens are zero to the bit; every row with tokens has a gradient."""
    problem, batch = pooled(kind, examples=2, tokens=3)
    exact(problem, batch)
    own = [(name, p) for name, p in problem.module.layers.named_parameters() if p.ndim > 1 or name.endswith("_bias")]
    true = {name: p.grad.clone() for name, p in own}
    ACTIVITY.estimate(problem, batch, seed=0, step=0)
    assert {name.split(".")[1] for name in true} >= (
        {"w1", "b1", "w2"} if "trees" in kind else {"w1", "b2", "node_bias"}
    )
    for name, parameter in own:
        rows = 2 if "trees" in kind else 1  # [trees, nodes, ...]
        touched = true[name].flatten(0, rows - 1).flatten(1) if true[name].ndim > rows else true[name].view(-1, 1)
        found = parameter.grad.view(touched.shape)
        assert torch.equal(found.abs().sum(1) != 0, touched.abs().sum(1) != 0), name
        assert 0 < int((touched.abs().sum(1) == 0).sum()) < len(touched), name


def unbiased(estimator: Any, problem: Problem, batch: Any, seeds: int) -> None:
    """Along the gradient, and in all directions together, the mean lies where so many estimates put it."""
    g_P, found_nP = exact(problem, batch), estimates(estimator, problem, batch, seeds)
    along_n = found_nP @ g_P / g_P.square().sum()
    assert abs(float(along_n.mean()) - 1) < 4 * float(along_n.std()) / seeds**0.5
    assert float((found_nP.mean(0) - g_P).square().sum()) < 1.5 * float(found_nP.var(0).sum()) / seeds


@pytest.mark.parametrize("penalties", [False, True])
def test_no_bias_in_two_towers(penalties: bool) -> None:
    """A dual encoder with leaves in both towers, its penalties in the loss or not."""
    module = dual_encoder(width=8)
    weights = {"balance": 0.5, "hardening": 0.5} if penalties else {}
    replace_feedforward(module, FeedforwardConfig(depth=2, leaf_width=4, **weights))
    problem: Problem = DualEncoderProblem(module)
    unbiased(ACTIVITY, Penalised(problem) if penalties else problem, pairs(4), 40)


def test_replay_gives_the_same_bits_with_penalties() -> None:
    """Another copy of the model and the batch are enough; a problem without the penalties is refused."""

    def made() -> Penalised:
        module = dual_encoder()
        replace_feedforward(module, FeedforwardConfig(depth=2, leaf_width=4, balance=0.5))
        return Penalised(DualEncoderProblem(module))

    problem, other, batch = made(), made(), pairs()
    report = make_estimator("forward-activity", tangents=2).estimate(problem, batch, seed=4, step=1)
    replay(report, other.module, problem=other, batch=batch)
    for mine, theirs in zip(problem.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    with pytest.raises(UsageError, match="one of the two has the penalties"):
        replay(report, other.module, problem=other.inner, batch=batch)


def test_leaves_alone_in_a_hybrid() -> None:
    """Leaves by activity and the rest by backprop: nothing but the leaves has noise."""
    problem, batch = with_leaves(), pairs()
    exact(problem, batch)
    true = {name: p.grad.clone() for name, p in problem.module.named_parameters()}
    rules = "*.mlp.w[12]:forward-activity,*.mlp.b[12]:forward-activity,*:backprop"
    make_estimator("hybrid", rules=rules).estimate(problem, batch, seed=0, step=0)
    for name, parameter in problem.module.named_parameters():
        leaf = name.rpartition(".")[2] in ("w1", "b1", "w2", "b2")
        close = torch.allclose(parameter.grad, true[name], rtol=1e-4, atol=1e-5 * float(true[name].abs().max()))
        assert close != leaf, name


def test_tokens_must_come_example_by_example() -> None:
    """A layer flattens what it is given, so that another order would not be seen in its outputs."""
    problem, (x_BTD, label_B) = pooled(LEAF, tokens=3)
    problem.module.inward.requires_grad_(False)
    problem.module.layers[0].register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),), prepend=True)
    with pytest.raises(UsageError, match=r"FastFeedforward was given \(3, 4, 5\), without rows for each of 4"):
        ACTIVITY.estimate(problem, (x_BTD, label_B), seed=0, step=0)
