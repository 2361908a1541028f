"""Trains the reference runs, sound ones and ones with a deliberate fault, and stores their curves.

    python benchmarks/reference_curves.py                 # what is not stored, of the digits
    python benchmarks/reference_curves.py --only="seed-[0-4]"
    python benchmarks/reference_curves.py --line=cc3m --config.data.source.type=tar
        --config.data.source.path='shards/*.tar'
    python benchmarks/reference_curves.py --table         # of what is stored

The curves of seeds 0 to 4 are the reference: they go to clip_jax/status/reference.json, which comes
with clip_jax. All others go to reference_curves.json beside this script: further seeds, which tell
how often a sound run is taken for a faulty one; seeds in bfloat16; and the faults. A run that is
stored is not repeated, so the command goes on where it was stopped. Settings that follow go to the
runs.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import turns

sys.path.insert(0, str(turns.ROOT))
from clip_jax.common import config_file, metric_rows, starts
from clip_jax.status import bands, check_text, reference

STORED = Path(__file__).with_suffix(".json")
SEEDS = range(5)  # of the reference
HELD_OUT = range(100, 120)  # seeds that are no part of it
SHOWN = (4, 2, 1)  # parts of a run, at whose end the table has the curves: a fourth, a half, all
DRAWS = 300  # of five sound runs as the reference, for the rate of false alarms
FAULTY = 200  # seed of the faults
LOSS = "train/loss"
TRAINED = (
    LOSS,
    "train/grad_norm/image",
    "train/grad_norm/text",
    "train/logit_scale",
)
EVALUATED = (
    "zeroshot/top1",
    "retrieval/text_to_image/recall@10",
    "retrieval/image_to_text/recall@10",
)


# ---- Faults --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """A deliberate fault.

    Attributes:
      settings: settings that are wrong.
      loss: makes the wrong loss from the right one; both take embeddings and logit_scale.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    loss: Callable[[Callable], Callable] | None = None


def half_loss(right: Callable) -> Callable:
    """Averages over twice as many pairs as there are."""
    return lambda *pairs, **settings: 0.5 * right(*pairs, **settings)


def half_gradient(right: Callable) -> Callable:
    """Averages the gradient, but not the loss, over twice as many pairs as there are."""
    import jax

    def loss(*pairs, **settings):
        value = right(*pairs, **settings)
        return 0.5 * value + jax.lax.stop_gradient(0.5 * value)

    return loss


def half_temperature(right: Callable) -> Callable:
    """Multiplies the similarities by half of exp(logit_scale)."""
    import math

    return lambda images, texts, scale, **settings: right(
        images, texts, scale - math.log(2), **settings
    )


def shuffled(fraction: float) -> Callable[[Callable], Callable]:
    """Makes a fault: so many of the images get the caption of their neighbour."""
    import jax.numpy as jnp

    def wrong(right: Callable) -> Callable:
        def loss(images, texts, *scalars, **settings):
            count = round(fraction * len(texts))
            mixed = texts.at[:count].set(jnp.roll(texts[:count], 1, axis=0))
            return right(images, mixed, *scalars, **settings)

        return loss

    return wrong


FAULTS = {
    "half_rate": Fault({"optim.learning_rate": 5e-4}),
    "no_warmup": Fault({"optim.warmup": "0 steps"}),
    "half_loss": Fault(loss=half_loss),
    "shuffled_captions": Fault(loss=shuffled(1.0)),
    "half_gradient": Fault(loss=half_gradient),
    "half_temperature": Fault(loss=half_temperature),
    "tenth_shuffled": Fault(loss=shuffled(0.1)),
}


# ---- Runs ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: its seed, what is wrong with it, and other settings that are not wrong."""

    seed: int
    fault: str = ""
    settings: tuple[str, ...] = ()


RUNS = {f"seed-{seed}": Run(seed) for seed in SEEDS}
RUNS |= {name: Run(FAULTY + i, name) for i, name in enumerate(FAULTS)}
OTHER_PRECISION = ("--config.model.dtype=bfloat16",)
RUNS |= {f"bfloat16-{seed}": Run(seed, settings=OTHER_PRECISION) for seed in (300, 301)}
RUNS |= {f"held-out-{seed}": Run(seed) for seed in HELD_OUT}


def child(name: str, arguments: list[str]) -> None:
    """Trains one run in this process, as main.py does, with its fault."""
    from clip_jax import losses
    from clip_jax.training import cli

    fault = FAULTS.get(RUNS[name].fault, Fault())
    if fault.loss is not None:
        losses.LOSSES["softmax"] = fault.loss(losses.LOSSES["softmax"])
    wrong = [f"--config.{setting}={value}" for setting, value in fault.settings.items()]
    cli.main([*arguments, *wrong], "python benchmarks/reference_curves.py")


def train(options: argparse.Namespace, name: str, settings: list[str]) -> Path:
    """Trains a run in a process of its own, unless it is finished; returns its workdir."""
    folder = Path(options.workdir).resolve()
    workdir = folder / options.line / name
    if (workdir / "report.html").exists():
        return workdir
    run = RUNS[name]
    command = [sys.executable, __file__, f"--child={name}", f"--config=reference:{options.line}"]
    command += [f"--workdir={workdir}", f"--config.seed={run.seed}", *run.settings, *settings]
    command += [f"--config.compilation_cache={folder / 'compiled'}"]
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log").open("a") as log:
        environment = {"PYTHONPATH": str(turns.ROOT), **turns.PLATFORMS["cpu"], **os.environ}
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return workdir


def read(workdir: Path) -> dict[str, dict[int, float]]:
    """Returns the curves of a run: value by step, of each metric that it has."""
    rows, _ = metric_rows.read(workdir)
    curves = {
        name: {int(row["step"]): float(f"{row[name]:.5g}") for row in rows if name in row}
        for name in (*TRAINED, *EVALUATED)
    }
    return {name: curve for name, curve in curves.items() if curve}


def store(line: str, name: str, workdir: Path) -> None:
    """Adds the curves of a run to their file."""
    path, curves = place(name), read(workdir)
    everything = reference.load_all(path)
    settings = settings_of(line)
    steps = {metric: list(curve) for metric, curve in curves.items()}
    fresh = reference.Reference(line, settings, surroundings(workdir), steps, {})
    known = everything.get(line, fresh)
    if (known.settings, known.steps) != (settings, steps):
        sys.exit(f"{path} has runs of {line} with other settings or steps: delete them there.")
    runs = {**known.runs, name: {metric: list(curve.values()) for metric, curve in curves.items()}}
    everything[line] = dataclasses.replace(known, runs=dict(sorted(runs.items())))
    reference.save_all(path, everything)


def surroundings(workdir: Path) -> str:
    """Describes what a run was trained on."""
    facts = starts.read(workdir)[0][-1].facts
    versions = [f"{name} {facts['packages'][name]}" for name in ("jax", "flax", "optax")]
    return f"{facts['hardware']} ({platform.machine()}), {', '.join(versions)}"


def place(name: str) -> Path:
    """Returns the file that a run is stored in."""
    return reference.FILE if name.startswith("seed-") else STORED


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--line", default="digits", help="line of configs/reference.py")
    parser.add_argument("--only", default="*", help="names of runs, as a pattern")
    parser.add_argument("--workdir", default="reference", help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="print what is stored, and end")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options, settings = parser.parse_known_args()
    if options.child:
        # The workdir is that of the run here.
        child(options.child, [*settings, f"--workdir={options.workdir}"])
        return
    names = [name for name in RUNS if fnmatch.fnmatchcase(name, options.only)]
    left = [name for name in names if not is_stored(name, options.line)]
    for number, name in enumerate(() if options.table else left, start=1):
        began = time.perf_counter()
        print(f"{number} of {len(left)}: {name}", end="", flush=True)
        store(options.line, name, train(options, name, settings))
        print(f", {time.perf_counter() - began:.0f} s", flush=True)
    print(table(options.line))


def is_stored(name: str, line: str) -> bool:
    """Tells whether the curves of a run of today's config are there."""
    found = reference.load_all(place(name)).get(line)
    return found is not None and name in found.runs and found.settings == settings_of(line)


def settings_of(line: str) -> dict[str, Any]:
    """Returns the settings of a line that are not the defaults."""
    return reference.changed_settings(config_file.load(f"reference:{line}"))


def table(line: str) -> str:
    """Formats what is stored: the reference at some steps, and the verdict on each other run."""
    known, others = (reference.load_all(path).get(line) for path in (reference.FILE, STORED))
    if known is None or len(known.runs) < len(SEEDS):
        return f"The reference {line} is not complete: {len(SEEDS)} seeds make it."
    ends = {
        metric: [len(steps) // part - 1 for part in SHOWN] for metric, steps in known.steps.items()
    }
    head = " | ".join(f"step {known.steps[LOSS][end]:,}" for end in ends[LOSS])
    lines = [f"| curve | {head} |", "|---" * (len(SHOWN) + 1) + "|"]
    for metric in known.steps:
        form, cells = check_text.show(metric), []
        for end in ends[metric]:
            values = [run[metric][end] for run in known.runs.values()]
            cells.append(f"{form(statistics.mean(values))} ± {form(statistics.stdev(values))}")
        lines.append(f"| {check_text.title(metric)} | {' | '.join(cells)} |")
    lines += ["", "| run | leaves the band first | farthest, in half-widths |", "|---|---|---|"]
    for name, run in (others.runs if others else {}).items():
        points = {metric: dict(zip(others.steps[metric], run[metric])) for metric in others.steps}
        verdict = bands.compare(known, points)
        first = verdict.first
        told = check_text.departure(first) if first else "never"
        farthest = max(one.distances.max() for one in verdict.metrics)
        lines.append(f"| {name} | {told} | {farthest:.2f} |")
    if others:
        lines += ["", false_alarms(known, others)]
    return "\n".join(lines)


def false_alarms(known: reference.Reference, others: reference.Reference) -> str:
    """Counts the sound runs that leave the band of five others, over draws of these five."""
    sound = {**known.runs, **{n: run for n, run in others.runs.items() if n.startswith("held-out")}}
    choices = list(itertools.combinations(sound, len(SEEDS)))
    choices = random.Random(0).sample(choices, min(len(choices), DRAWS))
    alarms = tests = 0
    for chosen in choices:
        band = dataclasses.replace(known, runs={name: sound[name] for name in chosen})
        for name in sound.keys() - set(chosen):
            points = {m: dict(zip(known.steps[m], sound[name][m])) for m in known.steps}
            alarms += bands.compare(band, points).first is not None
            tests += 1
    return (
        f"{len(sound)} sound runs: one left the band of five others {alarms:,} of {tests:,} times."
    )


if __name__ == "__main__":
    main()
