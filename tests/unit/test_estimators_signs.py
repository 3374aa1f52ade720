"""Signs and tangents as functions of a key and a place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from curate.errors import UsageError
from curate.estimators import signs as module
from curate.estimators.signs import key_of, signs
from curate.estimators.tangents import Tangents

CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def parameters() -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.zeros(6, 4)), "b": nn.Parameter(torch.zeros(6)), "s": nn.Parameter(torch.zeros(()))}


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of SplitMix64 for seed 1234567, as its authors' program prints them."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [word % 2**64 for word in module._splitmix(torch.arange(3), 1234567).tolist()] == wanted


def test_signs_depend_on_their_place_alone() -> None:
    """Fewer columns, a later first row and another dtype give the same signs."""
    whole = signs(7, 5, 200, **CPU)
    assert torch.equal(signs(7, 5, 130, **CPU), whole[:, :130])
    assert torch.equal(signs(7, 2, 200, first_row=3, **CPU), whole[3:])
    assert torch.equal(signs(7, 5, 200, device="cpu", dtype=torch.float64), whole.double())
    assert not torch.equal(signs(8, 5, 200, **CPU), whole)


def test_few_and_many_signs_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's path and torch's, in one piece or in several, give the same bits for keys of either sign."""
    for key in (3, 2**63 + 11, 2**64 - 1):
        few = signs(key, 9, 300, first_row=2**31 - 4, **CPU)
        monkeypatch.setattr(module, "_FEW_BLOCKS", 0)
        assert torch.equal(signs(key, 9, 300, first_row=2**31 - 4, **CPU), few)
        monkeypatch.setattr(module, "_MOST_BLOCKS", 8)
        assert torch.equal(signs(key, 9, 300, first_row=2**31 - 4, **CPU), few)
        monkeypatch.undo()


@needs_gpu
def test_a_gpu_makes_the_same_signs() -> None:
    """Bit for bit what the CPU makes."""
    made = signs(2**64 - 5, 70, 3000, device="cuda", dtype=torch.float32).cpu()
    assert torch.equal(made, signs(2**64 - 5, 70, 3000, **CPU))


def test_signs_are_balanced_and_uncorrelated() -> None:
    """Means of 64 rows and products of neighbouring ones stay within 5 standard errors of zero."""
    made = signs(key_of(1, 2, 3, "w"), 64, 10_000, **CPU)
    assert set(made.unique().tolist()) == {-1.0, 1.0}
    assert float(made.mean(1).abs().max()) < 5 / 100
    assert float((made[1:] * made[:-1]).mean(1).abs().max()) < 5 / 100
    assert float((made[:, 1:] * made[:, :-1]).mean(1).abs().max()) < 5 / 100


def test_keys_tell_everything_apart() -> None:
    """Seed, step, tangent and name each change the key; numbers that do not fit are refused."""
    places = [(0, 0, 0, "w"), (1, 0, 0, "w"), (0, 1, 0, "w"), (0, 0, 1, "w"), (0, 0, 0, "v")]
    assert len({key_of(*place) for place in places}) == 5
    with pytest.raises(UsageError, match="step is -1"):
        key_of(0, -1, 0, "w")


@pytest.mark.parametrize("layout", ["rank-1", "dense"])
def test_tangents_have_unit_second_moment(layout: Any) -> None:
    """The mean of v v^T over 4,000 tangents is the identity within 5 standard errors, and |v|^2 is always d."""
    named = parameters()
    tangents = Tangents(named, layout, 0, 0, 4000)
    v_KP = torch.stack([torch.cat([tangents.whole(n, k).flatten() for n in named]) for k in range(4000)])
    moment_PP = v_KP.T @ v_KP / 4000
    assert float((moment_PP - torch.eye(31)).abs().max()) < 5 / 4000**0.5
    assert torch.equal(v_KP.square().sum(1), torch.full((4000,), 31.0))


@pytest.mark.parametrize("layout", ["rank-1", "dense"])
def test_disjoint_tangents_cover_every_number_once(layout: Any) -> None:
    """Their squares sum to one everywhere, so they are orthogonal."""
    named = parameters()
    tangents = Tangents(named, layout, 0, 0, 4, disjoint=True)
    for name in named:
        assert torch.equal(sum(tangents.whole(name, k).square() for k in range(4)), torch.ones_like(named[name]))


def test_a_rank_one_tangent_is_its_factors() -> None:
    """The dense form is the outer product, for matrices and for kernels laid out as [out, rest]."""
    named = {"conv": nn.Parameter(torch.zeros(3, 2, 2, 2))}
    tangents = Tangents(named, "rank-1", 0, 0, 1)
    a, b = tangents.factors("conv", 0)
    assert torch.equal(tangents.whole("conv", 0), torch.outer(a, b).view(3, 2, 2, 2))
