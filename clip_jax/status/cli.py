"""Tells how runs are doing, while they run and afterwards.

    python -m clip_jax status runs/mine
    python -m clip_jax status runs/a runs/b gs://bucket/c --watch
    python -m clip_jax status runs/mine --html=status.html

Takes workdirs: local, gs:// or s3://. Of one it tells the state, why it last ended and what to do,
where its time went, every start, what went wrong, its curves, metrics and checkpoints; of several,
a line each, and their losses over one pair of axes. It only reads.

States: starting, running, stalled (alive, without a step for long), stopped (ended before its last
step, with a reason), dead (no end, no sign of life), finished.

Exit code: 0 where every run is starting, running or finished; 1 where one is not; 2 where a workdir
cannot be read; 42 where its storage cannot be reached.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime

from clip_jax.common import commands
from clip_jax.errors import ExitCode, UserError
from clip_jax.status import export, look, text
from clip_jax.status import run as runs
from clip_jax.status.run import Run, State

_EVERY = 10.0  # seconds between two looks of --watch
_CLEAR = "\x1b[2J\x1b[3J\x1b[H"  # what an ANSI terminal shows


def main(arguments: list[str]) -> None:
    """Runs the command; ends the process where it must."""
    parser = commands.parser("status", __doc__)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="--workdir of a run")
    parser.add_argument("--html", metavar="FILE", help="write a page as well")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object a run")
    parser.add_argument(
        "--watch",
        nargs="?",
        const=_EVERY,
        type=_interval,
        metavar="SECONDS",
        help=f"look again and again until Ctrl-C; default: every {_EVERY:.0f}",
    )
    options = parser.parse_args(arguments)
    with commands.plain_errors(interrupted=""):
        sys.exit(_run(options))


def _interval(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(
            f"{given!r} is not a number of seconds between 0.1 and 86,400"
        )
    return value


def _run(options: argparse.Namespace) -> int:
    names = [
        name if name.endswith("://") else name.rstrip("/") or name for name in options.workdirs
    ]
    names = list(dict.fromkeys(names))
    found = _look(names, [])
    if not options.watch and any(runs.state(run) is State.UNCLEAR for run in found):
        print(f"Watching for {runs.WATCH:.0f} s for a sign of life.", file=sys.stderr, flush=True)
        time.sleep(runs.WATCH)
        found = _look(names, found)
    _show(found, options)
    while options.watch:
        time.sleep(options.watch)
        found = _look(names, found)
        _show(found, options)
    return _exit_code(found)


def _look(names: Sequence[str], before: Sequence[Run]) -> list[Run]:
    earlier = {run.name: run for run in before}
    return [runs.look(name, before=earlier.get(name)) for name in names]


def _show(found: Sequence[Run], options: argparse.Namespace) -> None:
    if options.html:
        from clip_jax.status import page  # with matplotlib

        try:
            page.write(options.html, found)
        except OSError as error:
            raise UserError(f"--html={options.html} cannot be written: {error}.") from None
    if options.json:
        for run in found:
            print(json.dumps(export.to_plain(run), allow_nan=False), flush=True)
        return
    how = look.of_stream(sys.stdout)
    shown = text.one(found[0], how) if len(found) == 1 else text.several(found, how)
    if options.watch:
        shown = f"{datetime.now():%a %d %b %H:%M:%S}\n\n{shown}\n"
    if options.watch and sys.stdout.isatty():  # what does not fit would scroll the rest away
        height = os.get_terminal_size(sys.stdout.fileno()).lines
        shown = _CLEAR + "\n".join(shown.splitlines()[: height - 1])
    print(how.shown(shown), flush=True)
    if options.html:
        print(f"\nPage: {options.html}", flush=True)


def _exit_code(found: Sequence[Run]) -> int:
    failed = [run.error.exit_code for run in found if run.error is not None]
    if failed:
        return max(failed)
    return ExitCode.DONE if all(runs.state(run) in runs.WELL for run in found) else ExitCode.FAULT
