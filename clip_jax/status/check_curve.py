"""Tells whether a run of a reference config learned as it should, on this machine as on others.

    python main.py --config=configs/reference.py:digits --workdir=runs/reference
    python -m clip_jax check-curve runs/reference

Takes the workdir of a run of configs/reference.py, with any seed, and compares its curves with
those of five seeds, which come with clip_jax: loss, gradient norm of each tower, logit scale and
evaluations. Says in a sentence whether they lie within the seeds' band, or where they left it first
and in what, and draws that curve beside the band. It only reads.

Exit code: 0 where the whole run lies within the band; 1 where it left the band, or has not come to
its end; 2 where it cannot be compared; 42 where its storage cannot be reached.
"""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from clip_jax.common import commands, config_file
from clip_jax.configs import default
from clip_jax.configs import reference as configs
from clip_jax.errors import ExitCode, UserError
from clip_jax.status import bands, check_text, look, reference
from clip_jax.status import run as runs
from clip_jax.status.bands import Curves
from clip_jax.status.reference import Reference
from clip_jax.status.run import Run
from clip_jax.training import workdir

_LISTED = 5  # settings that differ, in a message
# Settings that change no training, but what is compared.
_MEASURES = ("eval.zeroshot.", "eval.retrieval.")


def main(arguments: list[str]) -> None:
    """Runs the command; ends the process where it must."""
    parser = commands.parser("check-curve", __doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="--workdir of a run")
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help=f"one of {', '.join(configs.LINES)}; default: the one whose settings the run has",
    )
    parser.add_argument(
        "--any-config",
        action="store_true",
        help="compare although settings differ that change what is learned",
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with all curves as well")
    options = parser.parse_args(arguments)
    with commands.plain_errors():
        sys.exit(_run(options))


def _run(options: argparse.Namespace) -> int:
    run = runs.look(options.workdir)
    if run.error is not None:
        raise run.error
    chosen = choose(run, options.reference, options.any_config)
    verdict = bands.compare(chosen, curves(run))
    if options.html:
        from clip_jax.status import check_page  # with matplotlib

        try:
            check_page.write(options.html, run, chosen, verdict)
        except OSError as error:
            raise UserError(f"--html={options.html} cannot be written: {error}.") from None
    how = look.of_stream(sys.stdout)
    print(how.shown(check_text.page(run.name, chosen, verdict, how)))
    if options.html:
        print(f"\nPage: {options.html}")
    sound = verdict.first is None and verdict.complete
    return ExitCode.DONE if sound else ExitCode.FAULT


def curves(run: Run) -> Curves:
    """Returns the metrics of a run; where it repeated a step, the later value."""
    found: dict[str, dict[int, float]] = {}
    for row in run.rows:
        for name, value in row.items():
            found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


# ---- The reference of a run ----------------------------------------------------------------------


def choose(run: Run, name: str | None, any_config: bool) -> Reference:
    """Returns the reference to compare a run with.

    Args:
      run: the run.
      name: name of the reference; None: the one whose settings differ least from the run's.
      any_config: whether settings that change what is learned may differ.

    Raises:
      UserError: there is no such reference, or it has not been run, or the settings differ.
    """
    if name is not None and name not in configs.LINES:
        raise UserError(
            f"There is no reference {name!r}: choose one of {', '.join(configs.LINES)}."
        )
    if not run.config and not (any_config and name):
        raise UserError(
            f"{run.name} has no config.json that can be read, so its settings are not known. To "
            "compare it nevertheless, add --any-config and --reference=NAME."
        )
    stored = reference.load_all()
    names = [name] if name else [*stored, *(line for line in configs.LINES if line not in stored)]
    different = {each: differences(run.config, stored.get(each), each) for each in names}
    best = min(names, key=lambda each: len(different[each]))
    if best not in stored:
        raise UserError(
            f"The reference {best} has not been run yet, so there are no curves to compare with. "
            f"Those that have been: {', '.join(stored)}. benchmarks/reference_curves.py "
            f"--line={best} makes the curves of five seeds from your data."
        )
    if different[best] and not any_config:
        raise UserError(_differ(run, best, different[best]))
    return stored[best]


def differences(
    config: Mapping[str, Any], stored: Reference | None, name: str
) -> list[tuple[str, Any, Any]]:
    """Returns the settings that change what is learned or measured, with the run's and its own.

    Args:
      config: settings of a run, by dotted name.
      stored: the reference; None: it has not been run, and its config counts.
      name: its name.
    """
    settings = stored.settings if stored else reference.changed_settings(configs.get_config(name))
    defaults = workdir.flatten(workdir.to_plain(default.get_config()))
    wanted = {**defaults, **settings}
    # A config that names no data leaves open where they are and in which form.
    free = ("seed",) if wanted["data.source.type"] else ("seed", "data.source.")
    found = workdir.differences(dict(config), wanted)
    found = [one for one in found if not one[0].startswith(free)]
    measured = [each for each in wanted if each.startswith(_MEASURES)]
    values = [(each, config.get(each, defaults.get(each)), wanted[each]) for each in measured]
    return found + [one for one in values if one[1] != one[2]]


def _differ(run: Run, name: str, different: list[tuple[str, Any, Any]]) -> str:
    listed = [f"{each} is {ours!r}, there {theirs!r}" for each, ours, theirs in different[:_LISTED]]
    more = f"; and {len(different) - _LISTED} others" if len(different) > _LISTED else ""
    config = config_file.FOLDER.name
    return (
        f"{run.name} is no run of the reference {name}, since settings differ: {'; '.join(listed)}"
        f"{more}. Train one by python main.py --config={config}/reference.py:{name}, or add "
        "--any-config to compare this one nevertheless."
    )
