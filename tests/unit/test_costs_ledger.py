"""The cost ledger: sums, JSON that is read strictly, the factors of the paper, and the sentence that may say "lost"."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.costs.energy import Energy, Joules
from curate.costs.ledger import PHASES, CostLedger, Phase, dumps, factor_over_iid, loads, together
from curate.costs.statement import Race, interval, state
from curate.errors import UsageError
from curate.evaluation.interval import student_quantile

HOT = Energy(
    processor=Joules(measured=50.0, measured_seconds=2.0),
    accelerator=Joules(unavailable_seconds=2.0, reasons=("no driver",)),
)
NUMBER = st.integers(0, 2**40).map(float)  # whole numbers: their sums do not depend on the order
JOULES = st.builds(Joules, NUMBER, st.just(1.0), NUMBER, NUMBER, NUMBER, st.sampled_from([(), ("a",), ("b", "\u00e9")]))
PHASE = st.builds(Phase, st.integers(0, 2**60), NUMBER, NUMBER, NUMBER, st.builds(Energy, JOULES, JOULES))
LEDGER = st.builds(CostLedger, st.sampled_from(["", "a", "b"]), PHASE, PHASE, training=PHASE)
FEW = settings(max_examples=30, deadline=None)


def spent(training: float, scoring: float = 0.0, reference: float = 0.0, optimiser: float = 0.0) -> CostLedger:
    ledger = CostLedger().add("training", samples=10, flops=training, optimiser=optimiser, seconds=1)
    return ledger.add("scoring", flops=scoring).add("reference", flops=reference).add("evaluation", flops=1e9)


def test_phases_add_up() -> None:
    """What is added to a phase is in it and in the total, and the ledger before is unchanged."""
    empty = CostLedger("m")
    one = empty.add("training", samples=128, flops=9e12, optimiser=1e9, seconds=2, energy=HOT)
    two = one.add("training", samples=2, flops=1e12, seconds=1).add("scoring", samples=640, flops=5e12)
    assert empty == CostLedger("m")
    assert two.training == Phase(130, 1e13, 1e9, 3.0, HOT)
    assert (two.total.samples, two.total.flops, two.total.seconds) == (770, 1.5e13, 3.0)
    assert two.flops() == 1.5e13 + 1e9
    assert (
        str(two).splitlines()[0].startswith("scoring: 640 samples, 5e+12 FLOPs, 0.0 s; energy: processor unavailable")
    )
    assert "and 1e+09 of the optimiser, 3.0 s; energy: processor 50 J measured" in str(two)


@pytest.mark.parametrize(
    ("phase", "figures"),
    [
        ("tuning", {}),
        ("training", {"flops": -1.0}),
        ("training", {"seconds": float("nan")}),
        ("scoring", {"samples": -1}),
    ],
)
def test_impossible_entries(phase: Any, figures: Any) -> None:
    """Unknown phases, negative and endless figures are refused by name."""
    with pytest.raises(UsageError, match=f"{phase}.*(none of the phases|not a finite number)"):
        CostLedger().add(phase, **figures)


@FEW
@given(LEDGER, LEDGER, LEDGER)
def test_sums_are_associative_and_commutative(a: CostLedger, b: CostLedger, c: CostLedger) -> None:
    """Resumes may be merged in any grouping; an empty ledger changes nothing."""
    assert (a + b) + c == a + (b + c)
    assert a + CostLedger() == a == CostLedger() + a
    for name in PHASES:
        assert getattr(a + b, name) == getattr(b + a, name)


@FEW
@given(LEDGER)
def test_json_round_trip(ledger: CostLedger) -> None:
    """Writing and reading gives the same ledger, and equal ledgers equal text."""
    assert loads(dumps(ledger)) == ledger == CostLedger.from_json(ledger.as_json())
    assert dumps(loads(dumps(ledger))) == dumps(ledger)


def changed(path: str, value: Any) -> Any:
    written: dict[str, Any] = json.loads(dumps(CostLedger("m").add("training", samples=3, flops=1.0, energy=HOT)))
    *above, last = path.split(".")
    place = written
    for name in above:
        place = place[name]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return written


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other", "not a cost ledger"),
        ("version", 2, "version 2; this curate reads version 1"),
        ("machine", 7, "`machine` is no text"),
        ("machine", KeyError, "cost ledger: machine is missing"),
        ("tuning", {}, "cost ledger: tuning is unknown"),
        ("training", 5, "training: an object is expected, not int"),
        ("training.flops", KeyError, "training: flops is missing"),
        ("training.flops", "1", "training.flops: '1' is not a finite number"),
        ("training.flops", True, "training.flops: True is not a finite number"),
        ("training.seconds", float("inf"), "training.seconds: inf"),
        ("training.samples", 3.0, "training.samples: 3.0 is not a whole number"),
        ("training.samples", -3, "training.samples: -3 is not a whole number"),
        ("training.energy.gpu", {}, "training.energy: gpu is unknown"),
        ("training.energy.memory.measured", -1, "training.energy.memory.measured: -1"),
        ("training.energy.memory.reasons", "no", "training.energy.memory.reasons: a list of texts"),
    ],
)
def test_json_is_read_strictly(path: str, value: Any, message: str) -> None:
    """Another version, and any field that is missing, unknown or of another type, is refused where it stands."""
    with pytest.raises(UsageError, match=message):
        CostLedger.from_json(changed(path, value))


def test_no_json() -> None:
    """A torn file and a list are no ledger."""
    for text in ("{", "[]", "null"):
        with pytest.raises(UsageError, match="cost ledger"):
            loads(text)


def test_side_by_side() -> None:
    """Processes at the same time: FLOPs add up, seconds do not, and one machine's counters count once."""
    cold = Energy(processor=Joules(measured=49.0, measured_seconds=2.0))
    first = CostLedger("a").add("training", samples=4, flops=10.0, seconds=3, energy=HOT)
    second = CostLedger("a").add("training", samples=4, flops=10.0, seconds=2, energy=cold)
    other = CostLedger("b").add("training", samples=1, flops=1.0, seconds=1, energy=cold)
    merged = together([first, second, other])
    assert (merged.training.samples, merged.training.flops, merged.training.seconds) == (9, 21.0, 3.0)
    assert merged.training.energy == HOT + cold
    assert merged.machine == "a, b"
    unnamed = CostLedger().add("training", energy=cold)
    assert together([unnamed, unnamed]).training.energy == cold + cold
    assert together([]) == CostLedger()


def test_factors_of_the_paper() -> None:
    """At f = 0.8 the five factors of the project's notes on cost, and 1 where everything is kept for nothing."""
    assert factor_over_iid(5, reused=True) == pytest.approx(2.33, abs=0.005)
    assert factor_over_iid(5) == pytest.approx(2.67, abs=0.005)
    assert factor_over_iid(5, reused=True, reference=1) == pytest.approx(4)
    assert factor_over_iid(5, reference=1) == pytest.approx(4.33, abs=0.005)
    assert factor_over_iid(5, low_share=0.5, low_cost=0.25) == pytest.approx(1.04, abs=0.005)
    assert factor_over_iid(5, scoring=0) == 1


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 10), st.floats(0, 10), st.floats(0, 1), st.floats(0, 1))
def test_factor_by_summing_up(
    chosen: int, more: int, forward: float, reference: float, low_share: float, low_cost: float
) -> None:
    """The factor is the bill over the bill: candidates scored, samples trained, passes saved, one by one."""
    candidates = chosen + more
    scored = forward * low_cost if low_share else forward
    bill = sum(scored + reference for _ in range(candidates))
    bill += sum(3 * forward * (low_share * low_cost + 1 - low_share) for _ in range(chosen))
    for reused in (False, True):
        saved = sum(scored * (low_share or 1) for _ in range(chosen)) if reused else 0
        factor = factor_over_iid(
            candidates / chosen,
            forward=forward, reference=reference, low_share=low_share, low_cost=low_cost, reused=reused,
        )  # fmt: skip
        assert factor == pytest.approx((bill - saved) / (3 * forward * chosen))


def test_impossible_factors() -> None:
    """A sub-batch larger than its super-batch, or a share above 1, is refused."""
    for wrong in ({"super_over_sub": 0.5}, {"super_over_sub": 5, "low_share": 1.5}, {"super_over_sub": float("nan")}):
        with pytest.raises(UsageError, match=r"at least as large|a share"):
            factor_over_iid(**wrong)


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 3, 3.1824), (0.975, 4, 2.7764), (0.975, 9, 2.2622),
        (0.975, 30, 2.0423), (0.975, 120, 1.9799), (0.95, 5, 2.0150), (0.995, 2, 9.9248), (0.5, 7, 0.0),
    ],
)  # fmt: skip
def test_quantiles_of_the_tables(probability: float, freedom: int, quantile: float) -> None:
    """Student's quantiles are those of the printed tables."""
    assert student_quantile(probability, freedom) == pytest.approx(quantile, abs=6e-5)


def test_interval_by_hand() -> None:
    """Ratios 1, 2 and 4: middle 2, log spread ln 2, so 2 times or divided by 2^(4.303 / sqrt 3)."""
    middle, low, high = interval([1, 2, 4])
    assert middle == pytest.approx(2)
    assert high == pytest.approx(2 * 2 ** (4.30265 / 3**0.5), rel=1e-5)
    assert low == pytest.approx(4 / (high or 0))
    assert interval([3.0]) == (pytest.approx(3), None, None)


def test_a_win() -> None:
    """Three seeds, five times fewer FLOPs each: every figure is in the sentence."""
    races = [Race(n, spent(1e12, 8e11, 2e11), spent(ratio * 2e12)) for n, ratio in enumerate((5.1, 4.7, 5.6))]
    found = state("top-1", 0.4, races)
    assert (found.training, found.scoring, found.reference) == pytest.approx((1e12, 8e11, 2e11))
    assert found.verdict == "won"
    assert str(found) == (
        "JEST reached top-1 0.4 with 1e+12 (training) + 8e+11 (scoring) + 2e+11 (reference) FLOPs "
        "against IID 1.03e+13: 5.12 times fewer, 95 % interval of the ratio 4.12 to 6.37 over 3 seeds. JEST won."
    )


def test_the_reference_and_the_optimiser_count() -> None:
    """The reference counts unless it is left out, which is said; the optimiser is part of training."""
    race = Race(0, spent(1e12, 1e12, 2e12, optimiser=4e12), spent(16e12))
    assert state("x", 1, [race]).ratio == pytest.approx(2)
    without = state("x", 1, [race], count_reference=False)
    assert without.ratio == pytest.approx(16 / 6)
    assert without.reference is None
    assert "(reference not counted)" in without.text
    assert "from one seed, so without an interval" in without.text


def test_a_loss_says_so() -> None:
    """Where selection needed more FLOPs in every seed, the sentence says "lost"."""
    found = state("recall", 0.3, [Race(n, spent(3e12, 1e12), spent(r)) for n, r in enumerate((2e12, 2.1e12, 1.9e12))])
    assert found.verdict == "lost"
    assert "2.00 times more (ratio 0.50)" in found.text
    assert found.text.endswith("JEST lost: IID was cheaper or got further.")
    assert state("recall", 0.3, [Race(0, spent(3e12), spent(2e12))]).verdict == "lost"


OURS = {True: spent(1e12), False: spent(9e12)}


@pytest.mark.parametrize(
    ("reached", "verdict"),
    [
        ([(False, True)], "lost"),
        ([(True, False)], "won"),
        ([(False, False)], "undecided"),
        ([(True, True), (False, True)], "undecided"),
        ([(False, True), (True, False)], "undecided"),
        ([(True, True), (True, False)], "won"),
    ],
)
def test_runs_that_never_got_there(reached: list[tuple[bool, bool]], verdict: str) -> None:
    """A miss is counted by name, is in no average, and decides where nothing speaks against it."""
    races = [Race(n, OURS[mine], spent(2e12), mine, theirs) for n, (mine, theirs) in enumerate(reached)]
    found = state("top-1", 0.4, races)
    assert found.verdict == verdict
    missed = sum(not mine for mine, _ in reached)
    assert (f"JEST did not reach it in {missed} of {len(reached)} seeds." in found.text) == bool(missed)
    assert ("never both reached" in found.text) == (not any(map(all, reached)))
    assert found.ratio is None or found.ratio == pytest.approx(2)


def test_an_interval_around_one_decides_nothing() -> None:
    """Better in one seed and worse in another is undecided."""
    found = state("x", 1, [Race(0, spent(1e12), spent(2e12)), Race(1, spent(2e12), spent(1e12))])
    assert found.verdict == "undecided"
    assert found.text.endswith("stays undecided.")


def test_ratios_swap_sides() -> None:
    """With the roles exchanged the ratio and its interval are turned over."""
    pairs = list(itertools.pairwise((1e12, 3e12, 4e12, 2e12)))
    there = state("x", 1, [Race(n, spent(a), spent(b)) for n, (a, b) in enumerate(pairs)])
    back = state("x", 1, [Race(n, spent(b), spent(a)) for n, (a, b) in enumerate(pairs)])
    assert there.low is not None
    assert back.high is not None
    assert (there.ratio or 0) * (back.ratio or 0) == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1)


def test_nothing_to_state() -> None:
    """No seeds, or a ledger that trained nothing, is refused."""
    with pytest.raises(UsageError, match="at least one seed"):
        state("x", 1, [])
    with pytest.raises(UsageError, match="without training FLOPs"):
        state("x", 1, [Race(0, CostLedger(), spent(1))])
