"""Keep the state of a run so that it can be taken up again with the same bits: log and journal first, then the state.

The state vouches for what was written before it; what came after the last one is cut back on a resume.
"""

from __future__ import annotations

from typing import Any

import torch

from curate.costs.ledger import CostLedger
from curate.errors import RunMismatch
from curate.learner.chosen_log import cut_back
from curate.learner.engine import Engine, waiting_again, waiting_tensors
from curate.learner.files import RunFiles
from curate.learner.handover import from_json
from curate.learner.policing import Tally
from curate.learner.reading_ahead import Ahead
from curate.learner.running import Running
from curate.learner.state import State, capture, read_state, restore, write_state


def keep(run: Running) -> None:
    """Write the chosen samples, the journal, and then the state that vouches for both."""
    files, engine = run.extras.files, run.engine
    if files is None or run.journal is None or run.chosen is None:
        return
    run.chosen.flush()
    run.journal.sync()
    course = engine.course
    tensors, waiting = waiting_tensors(course.waiting)
    extra = tensors | {
        "times": torch.from_numpy(course.times_N),
        "losses": torch.tensor(course.losses, dtype=torch.float64),
    }
    rest = {
        "position": course.position, "trained": course.trained, "scored": course.scored, "seconds": course.seconds,
        "plain": course.plain, "ledger": course.ledger.as_json(), "control": course.control.as_json(),
        "waiting": waiting, "journal": run.journal.size,
        "policy": None if course.tally is None else course.tally.as_json(),
    }  # fmt: skip
    stepper = engine.stepper
    write_state(files.state, capture(course.step, stepper.problem.module, stepper.optimiser, extra, rest))
    if run.extras.kept is not None:
        run.extras.kept()


def resume(engine: Engine, files: RunFiles | None, ahead: Ahead) -> int:
    """Put the last state in place, if there is one; the journal's length then."""
    state = None if files is None else read_state(files.state)
    if files is not None:
        cut_back(files.chosen, 0 if state is None else state.step)
    if state is None:
        return 0
    put_back(engine, state, ahead)
    return int(state.rest["journal"])


def put_back(engine: Engine, state: State, ahead: Ahead) -> None:
    """Put a state in place. Errors: VerificationError and RunMismatch where it is of another model or other pairs."""
    course, rest = engine.course, state.rest
    extra = restore(state, engine.stepper.problem.module, engine.stepper.optimiser)
    course.step, course.position = state.step, rest["position"]
    course.trained, course.scored = rest["trained"], rest["scored"]
    course.seconds, course.plain = rest["seconds"], rest["plain"]
    course.ledger, course.control = CostLedger.from_json(rest["ledger"]), from_json(rest["control"])
    if len(extra["times"]) != len(course.times_N):
        raise RunMismatch(
            f"the state of step {state.step} is of {len(extra['times'])} pairs, and {len(course.times_N)} are here; "
            "where images are bad, their number depends on memory_gb: give the one that the run began with"
        )
    course.tally = _tally_again(engine, rest.get("policy"))
    course.times_N[:] = extra["times"].numpy()
    course.losses[:] = extra["losses"].tolist()
    course.waiting = waiting_again(rest["waiting"], extra, lambda start, plan: ahead.get(start, engine.wanted(plan)))


def _tally_again(engine: Engine, kept: dict[str, Any] | None) -> Tally | None:
    """What the draws before did. Errors: RunMismatch where the run was begun with another policy, or without one."""
    enforcer = engine.drawer.enforcer
    if (enforcer is None) != (kept is None):
        raise RunMismatch("the state is of a run with a policy, and this is one without, or the reverse")
    return None if enforcer is None or kept is None else Tally.from_json(kept, enforcer.policing.policy)
