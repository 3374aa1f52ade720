"""Turning dense weights into leaves: the split, the copy, the fit, and what is left unexplained."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from curate.errors import UsageError
from curate.feedforward.config import FeedforwardConfig
from curate.feedforward.conversion import bisect, distil, ridge_fit, unexplained, upcycle
from curate.feedforward.dense import Dense


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def structured() -> tuple[Dense, Tensor, Tensor]:
    """A dense layer of 64 neurons of which each of 8 regions uses its own 8, with inputs from those regions."""
    centre_KD = 4 * torch.nn.functional.normalize(draw(8, 16, seed=1), dim=1)
    x_nD = centre_KD[torch.arange(1200) % 8] + 0.5 * draw(1200, 16, seed=2)
    w1_DH = (centre_KD.repeat_interleave(8, dim=0) + 0.7 * draw(64, 16, seed=3)).T.contiguous() / 4
    dense = Dense(w1_DH, torch.full((64,), -2.5), draw(64, 16, seed=4), draw(16, seed=5), "gelu")
    return dense, x_nD[:1000], x_nD[1000:]


@pytest.mark.parametrize(("inputs", "depth"), [(64, 3), (100, 3), (8, 3), (77, 4), (5, 0)])
def test_bisection_is_balanced(inputs: int, depth: int) -> None:
    """Leaf counts of distinct inputs differ by at most one."""
    count_L = torch.bincount(bisect(draw(inputs, 6), depth).leaf_n, minlength=2**depth)
    assert int(count_L.max() - count_L.min()) <= 1
    assert int(count_L.sum()) == inputs


def test_a_metric_keeps_the_bisection_balanced() -> None:
    """Looking at the inputs through the neurons turns the hyperplanes, not the counts."""
    plain, seen = bisect(draw(64, 6), 3), bisect(draw(64, 6), 3, metric_DH=draw(6, 9, seed=1))
    assert torch.bincount(seen.leaf_n).tolist() == [8] * 8
    assert not torch.equal(plain.leaf_n, seen.leaf_n)


def test_the_layer_routes_as_the_bisection_did() -> None:
    """The hyperplanes in the layer send the calibration inputs to the leaves they were counted in."""
    dense, x_nD, _ = structured()
    layer = upcycle(dense, FeedforwardConfig(depth=3, leaf_width=8), x_nD)
    tree = bisect(x_nD, 3, metric_DH=dense.w1_DH * dense.w2_HE.norm(dim=1))
    assert torch.equal(layer.leaf_indices(x_nD), tree.leaf_n)
    assert torch.bincount(tree.leaf_n).tolist() == [125] * 8


def test_equal_inputs_stay_together() -> None:
    """Inputs that are all alike cannot be parted; they go left, and no leaf is left without weights."""
    dense, x_nD, _ = structured()
    alike_nD = x_nD[:1].expand(40, -1)
    assert bisect(alike_nD, 2).leaf_n.tolist() == [0] * 40
    layer = upcycle(dense, FeedforwardConfig(depth=2, leaf_width=8), alike_nD)
    for weight in (layer.w1, layer.b1, layer.w2, layer.b2):
        torch.testing.assert_close(weight[3], weight[0])
    torch.testing.assert_close(layer(alike_nD), dense(alike_nD), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("depth", "leaf", "shared"), [(0, 64, 0), (3, 64, 0), (2, 48, 16), (1, 1, 63)])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_all_neurons_copied_are_the_dense_layer(depth: int, leaf: int, shared: int, activation: str) -> None:
    """Where leaf and shared part hold every neuron, the output is the dense one, whatever the depth."""
    given, x_nD, held_nD = structured()
    dense = Dense(given.w1_DH, given.b1_H, given.w2_HE, given.b2_E, activation)  # type: ignore[arg-type]
    layer = upcycle(dense, FeedforwardConfig(depth=depth, leaf_width=leaf, shared_width=shared), x_nD)
    assert float((layer(held_nD).detach() - dense(held_nD)).abs().max()) <= 1e-5 * float(dense(held_nD).abs().max())


def test_each_step_of_the_conversion_helps() -> None:
    """On inputs with structure, random > copied > refitted > distilled, and refitted beats equal active width."""
    dense, x_nD, held_nD = structured()
    config = FeedforwardConfig(depth=3, leaf_width=8)
    random = config.build(16, generator=torch.Generator().manual_seed(0))
    copied, refitted = (upcycle(dense, config, x_nD, refit=refit) for refit in (False, True))
    missed = [unexplained(layer, dense, held_nD) for layer in (random, copied, refitted)]
    distil(refitted, dense, x_nD, steps=60, lr=3e-3)
    missed.append(unexplained(refitted, dense, held_nD))
    narrow = upcycle(dense, FeedforwardConfig(depth=0, leaf_width=8), x_nD)
    assert missed[0] > 0.9
    assert missed[1] < 0.5 * missed[0]
    assert missed[2] < 0.5 * missed[1]
    assert missed[3] < missed[2]
    assert missed[2] < 0.25 * unexplained(narrow, dense, held_nD)
    shared = upcycle(dense, FeedforwardConfig(depth=3, leaf_width=8, shared_width=8), x_nD)
    assert unexplained(shared, dense, held_nD) < missed[2]


def test_neurons_that_are_always_active_are_shared() -> None:
    """A neuron that every region uses alike goes to the shared part, and no leaf repeats it."""
    dense, x_nD, _ = structured()
    bias_H = dense.b1_H.clone()
    bias_H[5] = 8.0
    weight_DH = dense.w1_DH.clone()
    weight_DH[:, 5] *= 0.1
    always = Dense(weight_DH, bias_H, dense.w2_HE, dense.b2_E, "gelu")
    layer = upcycle(always, FeedforwardConfig(depth=3, leaf_width=8, shared_width=1), x_nD)
    assert layer.shared_in is not None
    torch.testing.assert_close(layer.shared_in.weight[0], weight_DH[:, 5])
    assert float(layer.b1.detach().max()) < 8.0


def test_ridge_solves_the_penalised_least_squares() -> None:
    """The fit is the solution of the normal equations with an unpenalised shift."""
    a_rh, left_rE, ridge = draw(30, 5).double(), draw(30, 2, seed=1).double(), 0.3
    change_hE, shift_E = ridge_fit(a_rh, left_rE, ridge)
    centred = a_rh - a_rh.mean(0)
    penalty = ridge * torch.linalg.svdvals(centred).square().mean() * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (left_rE - left_rE.mean(0)))
    torch.testing.assert_close(change_hE, expected)
    torch.testing.assert_close(shift_E, (left_rE - a_rh @ expected).mean(0))


def test_ridge_without_anything_to_fit_changes_the_shift_only() -> None:
    """Activations that never change explain nothing, so the mean of what is left becomes the shift."""
    change_hE, shift_E = ridge_fit(torch.ones(4, 3), torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
    assert torch.equal(change_hE, torch.zeros(3, 1))
    assert shift_E.tolist() == [3.0]


def test_cross_validation_shrinks_noise_and_keeps_signal() -> None:
    """Nothing to learn and few inputs: the weights stay near the copied ones; a clear law is learnt exactly."""
    a_rh = draw(40, 20)
    noise, _ = ridge_fit(a_rh, draw(40, 3, seed=1))
    unpenalised, _ = ridge_fit(a_rh, draw(40, 3, seed=1), 1e-8)
    assert float(noise.norm()) < 0.7 * float(unpenalised.norm())
    law_hE = draw(20, 3, seed=2)
    learnt, _ = ridge_fit(a_rh, a_rh @ law_hE)
    torch.testing.assert_close(learnt, law_hE, atol=5e-3, rtol=5e-3)


def test_distilling_leaves_the_tree_and_frozen_flags_alone() -> None:
    """The hyperplanes stay where they are, and what was frozen is frozen afterwards."""
    dense, x_nD, _ = structured()
    layer = upcycle(dense, FeedforwardConfig(depth=2, leaf_width=8), x_nD)
    layer.w1.requires_grad_(False)
    before = layer.node_weight.detach().clone()
    distil(layer, dense, x_nD, steps=3)
    assert torch.equal(layer.node_weight, before)
    assert [name for name, p in layer.named_parameters() if not p.requires_grad] == ["w1"]
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_unexplained_by_hand() -> None:
    """The mean output for everything leaves 1 unexplained, the layer itself 0."""
    dense, x_nD, _ = structured()
    mean_E = dense(x_nD).mean(0)

    class Mean(torch.nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return mean_E.expand(len(rows), -1)

    assert unexplained(Mean(), dense, x_nD) == pytest.approx(1.0, abs=1e-4)
    assert unexplained(upcycle(dense, FeedforwardConfig(depth=0, leaf_width=64), x_nD), dense, x_nD) < 1e-9


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        (FeedforwardConfig(variant="path", depth=2), draw(50, 16), "only variant 'leaf'"),
        (FeedforwardConfig(depth=2, leaf_width=8, gate="probability"), draw(50, 16), "gate 'probability'"),
        (FeedforwardConfig(depth=2, leaf_width=60, shared_width=5), draw(50, 16), "the 64 of the dense layer"),
        (FeedforwardConfig(depth=2, leaf_width=8), draw(50, 15), r"not \[n, 16\]"),
        (FeedforwardConfig(depth=4, leaf_width=8), draw(15, 16), "15 calibration inputs for 16 leaves"),
        (FeedforwardConfig(depth=1, leaf_width=8), torch.full((4, 16), float("nan")), "not all finite"),
    ],
)
def test_what_cannot_be_converted_is_refused(config: FeedforwardConfig, inputs: Tensor, message: str) -> None:
    """Each refusal names the number that does not fit."""
    with pytest.raises(UsageError, match=message):
        upcycle(structured()[0], config, inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "tree"}, "variant 'tree' is none of leaf, path"),
        ({"leaf_width": 0}, "leaf_width 0"),
        ({"leaf_width": 4, "depth": 21}, "depth 21"),
        ({"leaf_width": 4, "shared_width": -1}, "shared_width -1"),
        ({"leaf_width": 4, "gate": "loud"}, "gate 'loud'"),
        ({"leaf_width": 4, "balance": -1.0}, "balance -1.0"),
        ({"leaf_width": 4, "region_leak": 0.5}, "region_leak 0.5"),
        ({"leaf_width": 4, "trees": 2}, "only variant 'path'"),
        ({"variant": "path", "trees": 0}, "trees 0"),
        ({"variant": "path", "leaf_width": 4, "balance": 0.1}, "has no balance, leaf_width"),
    ],
)
def test_impossible_configurations_are_refused(arguments: dict[str, object], message: str) -> None:
    """A configuration is checked when it is made."""
    with pytest.raises(UsageError, match=message):
        FeedforwardConfig(**arguments)  # type: ignore[arg-type]
