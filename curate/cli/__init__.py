"""The command line: parse, call, print. One thin function per verb; everything heavy is imported when a verb runs.

Results go to standard output (`--json`: one JSON value and nothing else), progress and remarks to standard error.
Exit codes: 0 done, 1 failed, 2 usage, 3 finished with loss above tolerance, 4 verification mismatch, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Env

from curate import __version__
from curate.cli.auditing import audit
from curate.cli.looking import demo, doctor, explain, inspect, verify
from curate.cli.measuring import evaluate
from curate.cli.printing import fail
from curate.cli.probing import probe
from curate.cli.running import run
from curate.cli.selecting import score, select, write
from curate.cli.training import train
from curate.errors import CurateError
from curate.notes import notes_as_lines

app = App(
    name="curate",
    version=__version__,
    config=Env("CURATE_"),
    suppress_keyboard_interrupt=False,  # `main` says how to go on
    default_parameter=Parameter(show_env_var=False),
    help="""Pick, from many image-text pairs, the ones a model can learn from now.

    Start with `curate demo` (no data, no network, no GPU), `curate doctor` and `curate inspect SHARDS`;
    `curate score SHARDS -o OUT --reference R` is the main job. Every option can also be set in the environment,
    as CURATE_VERB_OPTION (CURATE_SCORE_KEEP=0.1).""",
)

for verb in (demo, doctor, inspect, score, select, write, verify, explain, audit, train, run, evaluate, probe):
    app.command(verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never lets a known error out as a traceback."""
    try:
        with notes_as_lines():
            return int(app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except CycloptsError as error:
        return fail(f"{error} See `{' '.join(('curate', *(error.command_chain or ())))} --help`.", 2)
    except CurateError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted; the same command resumes", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = error.filename or "input or output"
        return fail(f"{where}: {error.strerror or error}; check the path and the disk", 1)
