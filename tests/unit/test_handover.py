"""The rule on streams of observations, fixed schedules, and the state that a resumed run goes on from."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from curate.errors import UsageError
from curate.learner.handover import Controller, Observation, controller, from_json, observe, parse_schedule
from curate.learner.plan import Plan
from curate.learner.watch import Estimate, Measure, View, calibrate, measure

FIRST = Plan("selecting", "learnability", 100.0, 0.2)
CHANCE = math.log(10)


def known(nats: float, error: float = 0.03) -> Measure:
    """A model that knows so many nats of a caption among ten."""
    return Measure(CHANCE - nats, error, 0.4, 10 * nats, CHANCE)


def seen(step: int, learner: float, reference: float = 0.8, noise: float = 0.4, error: float = 0.02) -> Observation:
    """An observation of a pool with that share of noise."""
    return Observation(step, known(learner), known(reference), Estimate(noise, error), (10 * learner, 2.0))


def run(*stream: Observation, text: str = "auto") -> Controller:
    """The controller after a stream of observations."""
    state = controller(text, FIRST)
    for one in stream:
        state = state.observe(one)
    return state


def test_a_young_learner_is_selected_for() -> None:
    """Below three quarters of the reference's information nothing changes and nothing is told."""
    state = run(seen(0, 0.0), seen(50, 0.25), seen(100, 0.59))
    assert state.plan == FIRST
    assert state.events == ()


def test_a_noisy_pool_is_trimmed_afterwards() -> None:
    """At three quarters the run trims, with the share and the scales of the observation, and says why with figures."""
    state = run(seen(50, 0.25), seen(100, 0.61))
    assert state.plan.phase == "trimming"
    assert state.plan.criterion == "trim"
    assert (state.plan.learner_scale, state.plan.reference_scale, state.plan.keep) == (6.1, 2.0, 0.6)
    (event,) = state.events
    assert (event.step, event.before, event.after) == (100, "selecting", "trimming")
    assert "0.61 nats" in event.why
    assert "0.80" in event.why
    assert "40%" in event.why
    assert event.as_json()["kind"] == "handover"
    assert event.as_json()["to"] == "trimming"


def test_a_clean_pool_is_trained_on_uniformly() -> None:
    """Without noise to speak of no candidate is scored after the handover."""
    state = run(seen(100, 0.7, noise=0.04))
    assert state.plan == Plan("uniform", "uniform")
    assert "too little to trim" in state.events[0].why


def test_there_is_no_way_back() -> None:
    """A learner that falls behind again stays where it is; uniform ends the watching."""
    trimming = run(seen(100, 0.7), seen(150, 0.2))
    assert trimming.plan.phase == "trimming"
    assert len(trimming.events) == 1
    uniform = run(seen(100, 0.7, noise=0.0), seen(150, 0.1), seen(200, 0.9))
    assert uniform.plan.phase == "uniform"
    assert len(uniform.events) == 1


def test_trimming_follows_the_models() -> None:
    """Later observations move scales and the kept share silently."""
    state = run(seen(100, 0.7), seen(150, 0.9, noise=0.5))
    assert (state.plan.learner_scale, state.plan.keep) == (9.0, 0.5)
    assert len(state.events) == 1
    assert state.plan.uses_reference
    assert state.plan.uses_learner
    assert state.plan.candidates(128) == 256


def test_trimming_ends_where_little_is_left_out() -> None:
    """Should the noise turn out small later on, the run goes on uniformly, and says so."""
    state = run(seen(100, 0.7), seen(150, 0.9, noise=0.03))
    assert state.plan == Plan("uniform", "uniform")
    assert "only 3% of the pool seems noise" in state.events[1].why


def test_a_useless_reference_is_left_at_once() -> None:
    """A reference no better than chance ends selection at the first look."""
    state = run(seen(0, 0.0, reference=0.05))
    assert state.plan.phase == "trimming"
    assert "no more than chance" in state.events[0].why


def test_an_early_fluke_is_no_handover() -> None:
    """Information within two errors of nothing is nothing, however weak the reference."""
    fluke = Observation(50, known(0.05, error=0.04), known(0.06, error=0.02), Estimate(0.4, 0.02), (1.0, 1.0))
    assert run(fluke).plan == FIRST


def test_vague_noise_means_uniform() -> None:
    """Where the noise is not known there is no trimming."""
    for unknown in (seen(100, 0.7, error=0.3), replace(seen(100, 0.7), noise=None)):
        state = run(unknown)
        assert state.plan.phase == "uniform"
        assert "not known well enough" in state.events[0].why


@pytest.mark.parametrize("criterion", ["hard-learner", "alignment"])
def test_criteria_without_a_reference_are_left_alone(criterion: str) -> None:
    """There is nothing to hand over from."""
    state = controller("auto", replace(FIRST, criterion=criterion))
    assert state.observe(seen(100, 0.9)).plan == state.plan


def test_off_means_off() -> None:
    """The selection that was asked for stays, all the way."""
    assert run(seen(100, 0.9), text="off").plan == FIRST


def test_a_resumed_controller_is_the_same() -> None:
    """Every state survives JSON, and goes on alike."""
    for state in (run(), run(seen(100, 0.7)), controller("0:10,30:trim@0.6,90:uniform", FIRST).at(40)):
        again = from_json(json.loads(json.dumps(state.as_json())))
        assert again == state
        assert again.observe(seen(200, 0.9)).at(100) == state.observe(seen(200, 0.9)).at(100)


def test_a_schedule_comes_into_force_step_by_step() -> None:
    """Entries hold from their step on, each told once; observations change nothing."""
    state = controller("0:100,400:learnability@10,800:trim@0.6,1200:uniform", FIRST)
    assert state.plan == FIRST
    assert state.at(399) == state
    assert state.at(400).plan == replace(FIRST, gain=10.0)
    assert state.at(400).observe(seen(410, 0.9)) == state.at(400)
    trimming = state.at(400).at(800)
    assert trimming.plan == Plan("trimming", "trim", keep=0.6)
    ended = trimming.at(5000)
    assert ended.plan == Plan("uniform", "uniform")
    assert ended.at(6000) == ended
    assert [(event.step, event.after) for event in ended.events] == [
        (400, "learnability@10"), (800, "trim@0.6"), (1200, "uniform"),
    ]  # fmt: skip


def test_a_schedule_may_start_late() -> None:
    """Before its first entry the criterion asked for holds."""
    assert controller("300:uniform", FIRST).plan == FIRST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("later", "neither auto, off nor an entry"),
        ("300:", "neither auto, off nor an entry"),
        ("-1:uniform", "neither auto, off nor an entry"),
        ("0:easiest@3", "'easiest' is unknown"),
        ("0:fast", "'fast' is not a number"),
        ("0:trim@2", "2 is not between 0.05 and 1"),
        ("0:trim", "'' is not a number"),
        ("0:uniform@3", "uniform has no gain"),
        ("0:-5", "-5 is not between"),
        ("0:nan", "nan is not between"),
        ("9:uniform,5:100", "must ascend"),
    ],
)
def test_bad_schedules_are_explained(text: str, message: str) -> None:
    """Each mistake is named."""
    with pytest.raises(UsageError, match=message):
        controller(text, FIRST)


def test_a_schedule_cannot_conjure_a_reference() -> None:
    """A run without a reference cannot change to a criterion that needs one."""
    with pytest.raises(UsageError, match="needs a reference"):
        parse_schedule("0:easy-reference@1", Plan("selecting", "hard-learner", 1.0, 0.2))


def test_observations_come_from_views() -> None:
    """Measures are the watch's; the journal's figures are plain JSON numbers, unknown ones null."""
    dice = np.random.default_rng(0)
    caption_T = dice.integers(10, size=300)
    sharp, dull = (View(np.eye(10)[caption_T] + blur * dice.normal(size=(300, 10)), caption_T) for blur in (0.4, 0.8))
    found = observe(50, sharp, dull, Estimate(0.5, 0.02))
    assert found.learner == measure(sharp)
    assert found.reference == measure(dull)
    assert found.kept == 0.5
    assert found.scales == calibrate([sharp, dull])
    assert observe(50, sharp, None, None).scales == (*calibrate([sharp]), 0.0)
    assert json.loads(json.dumps(found.as_json()))["noise"] == 0.5
    assert observe(50, sharp, None, Estimate(0.0, math.inf)).as_json()["noise"] is None
    assert observe(50, sharp, None, None).as_json()["reference"] is None


@pytest.mark.parametrize(("noise", "kept"), [(-0.02, 1.0), (0.4, 0.6), (0.99, 0.05)])
def test_the_kept_share_stays_in_bounds(noise: float, kept: float) -> None:
    """An estimate may be outside 0..1; what is kept is not."""
    assert seen(0, 0.5, noise=noise).kept == pytest.approx(kept)
