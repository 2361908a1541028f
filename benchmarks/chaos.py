"""A run that is killed again and again, compared with one that is left alone.

    python benchmarks/chaos.py                              # 100 kills of the quickstart
    python benchmarks/chaos.py --kills=8 --model=tiny       # a few minutes at most
    python benchmarks/chaos.py --seed=3                     # the same kills in another order
    python benchmarks/chaos.py --devices=0                  # on another mesh at each start

Each start has another number of hosts, processes on this machine. With --devices they share so many
virtual devices: the mesh stays equal, and so must every bit. With --devices=0 each has one, so that
the mesh changes, and sums are taken in another order. A start is sent a signal, all hosts or one of
them: while it starts, between steps, in a save or in an evaluation. Then the same command is
started again, and nothing else is done.

In the end these are compared with a run that was left alone: every row of metrics.jsonl and the
arrays of the last checkpoint. Exit codes and the steps lost are checked at each start. Prints what
went wrong, and exits with 1 if anything did.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-6  # relative, of the loss on another mesh
ENDS_WITHIN = 60.0  # seconds after a signal
STARTS_WITHIN = 900.0  # seconds until the moment of the fault
TINY = {
    "model.scan_layers": True,
    "model.size.image_size": 16,
    "model.size.image_layers": (1,),
    "model.size.image_width": 32,
    "model.size.image_heads": 2,
    "model.size.patch_size": 8,
    "model.size.text_layers": 1,
    "model.size.text_width": 32,
    "model.size.embed_dim": 16,
    "batch_size": 16,
    "eval.batch_size": 128,
    "eval.retrieval.max_examples": 100,
}
MODELS = {"quickstart": {}, "tiny": TINY}
MOMENTS = {
    "start": "at the start",
    "steps": "between steps",
    "save": "in a save",
    "evaluation": "in an evaluation",
}
# Values that differ from run to run, or that are of one start and host.
TIMES = ("time/", "train/images_per_second", "train/mfu", "data/", "device/", "host/", "storage/")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal, and when it comes.

    Attributes:
      signal: the signal.
      one: whether one host gets it, or all.
      moment: one of MOMENTS.
    """

    signal: signal.Signals
    one: bool
    moment: str

    def __str__(self) -> str:
        whom = "one host" if self.one else "all hosts"
        return f"{self.signal.name}, {whom}, {MOMENTS[self.moment]}"

    def exit_codes(self, hit: bool, running: bool) -> set[int]:
        """Returns the exit codes that a host may have.

        Args:
          hit: whether it got the signal.
          running: whether it had come as far as its steps.
        """
        if self.signal is signal.SIGKILL:
            return {-signal.SIGKILL} if hit else {42}
        codes = {42}
        if self.signal is signal.SIGINT:
            codes = {130} if hit else {42, 130}
        # While Python starts, signals are the system's, and another host may be the first to end.
        return codes if running else codes | {42, -self.signal, 128 + self.signal}


ALL = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DECK = [Fault(each, False, moment) for moment in MOMENTS for each in ALL]
# Before hosts have found each other, one that is killed is missed for minutes.
DECK += [Fault(each, True, moment) for moment in MOMENTS for each in ALL if moment != "start"]


@dataclasses.dataclass
class Played:
    """A fault that was played, and its outcome."""

    fault: Fault
    hosts: int
    codes: list[int]
    seconds: float  # from the signal to the end of the last host
    step: int  # last step that was logged
    lost: int  # steps that the next start does again
    resumes: int  # step of the newest checkpoint


class Workdir:
    """The files of a run, as they can be seen from outside."""

    def __init__(self, path: Path, eval_every: int, steps: int):
        self.path, self._eval_every, self._steps = path, eval_every, steps

    def rows(self) -> list[dict[str, float]]:
        """Returns the rows of metrics.jsonl; a last line that is cut short is not one."""
        try:
            lines = (self.path / "metrics.jsonl").read_text().splitlines(True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def last_row(self) -> dict[str, float]:
        """Returns the last row, without reading the others."""
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
                lines = [line for line in file.readlines() if line.endswith(b"\n")]
        except FileNotFoundError:
            lines = []
        return json.loads(lines[-1]) if lines else {"step": 0}

    def newest(self) -> int:
        """Returns the step of the newest complete checkpoint; 0: none."""
        return max(
            (int(path.name) for path in self._checkpoints() if path.name.isdecimal()), default=0
        )

    def saving(self, since: float) -> bool:
        """Returns whether a save that began after `since` is under way."""
        for path in self._checkpoints():
            try:
                if not path.name.isdecimal() and path.stat().st_mtime > since:
                    return True
            except FileNotFoundError:  # it is complete now
                continue
        return False

    def evaluating(self, beyond: int) -> bool:
        """Returns whether an evaluation of a step after `beyond` is under way."""
        row = self.last_row()
        due = row["step"] % self._eval_every == 0 or row["step"] == self._steps
        return row["step"] > beyond and due and "train/loss" in row

    def _checkpoints(self) -> list[Path]:
        folder = self.path / "checkpoints"
        return list(folder.iterdir()) if folder.exists() else []


class Chaos:
    """Starts runs by one command, and ends them by faults."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self._options, self._folder = options, folder
        self._starts = itertools.count(1)
        self._start_seconds = 5.0  # from the start to the first step, as last seen
        self.failures: list[str] = []

    def command(self, name: str) -> list[str]:
        """Returns the command of a run, the same at every start."""
        options = self._options
        settings = MODELS[options.model] | {
            "duration": f"{options.steps} steps",
            "log.every": "1 steps",
            "log.tensorboard": False,
            "eval.every": f"{options.eval_every} steps",
            "checkpoint.every": f"{options.save_every} steps",
            "compilation_cache": self._folder / "compiled",
        }
        command = [sys.executable, "main.py", "--config=configs/quickstart.py"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        return [*command, f"--workdir={self._folder / name}"]

    def workdir(self, name: str) -> Workdir:
        return Workdir(self._folder / name, self._options.eval_every, self._options.steps)

    def launch(self, name: str, hosts: int) -> tuple[list[subprocess.Popen], list[Path]]:
        """Starts a run on so many hosts; returns its processes and the files that they print to."""
        devices = max(1, self._options.devices // hosts)
        flags = f"--xla_force_host_platform_device_count={devices}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # the last one counts
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        port, number = free_port(), next(self._starts)
        processes, logs = [], []
        for host in range(hosts):
            # A single host too: so it sums by Gloo as several do, and not in an order of its own.
            joins = [f"--coordinator=127.0.0.1:{port}", f"--processes={hosts}"]
            command = [*self.command(name), *joins, f"--process={host}"]
            logs.append(self._folder / f"{name}-{number:03}-{host}.txt")
            with logs[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=log,
                        preexec_fn=hear_signals,
                    )
                )
        return processes, logs

    def finish(self, name: str, hosts: int) -> float:
        """Runs to the end, and returns the seconds it took."""
        began = time.monotonic()
        processes, logs = self.launch(name, hosts)
        codes = [process.wait() for process in processes]
        if any(codes):
            self.fail(f"The last start on {hosts} hosts ended with {codes}", logs)
        return time.monotonic() - began

    def fail(self, text: str, logs: list[Path] | None = None) -> None:
        """Records and prints something that must not be."""
        self.failures.append(text)
        print(f"FAILED: {text}", flush=True)
        for log in logs or []:
            lines = log.read_text().splitlines()[-self._options.lines :]
            print("\n".join(f"  {log.name}: {line[:300]}" for line in lines), flush=True)

    def play(self, fault: Fault, hosts: int, patience: int, rng: random.Random) -> Played | None:
        """Starts the run and ends it by a fault; None: it ended before.

        Args:
          fault: the fault.
          hosts: number of hosts.
          patience: most steps before a fault between steps.
          rng: random numbers.
        """
        work = self.workdir("killed")
        resumes = work.newest()
        delay, steps = rng.random(), rng.randint(1, max(1, patience))
        struck = rng.randrange(hosts)
        began, launched = time.monotonic(), time.time()
        processes, logs = self.launch("killed", hosts)

        def at_moment() -> bool:
            if fault.moment == "start":
                return time.monotonic() - began > delay * self._start_seconds
            if not stepping(logs[0]):
                self._start_seconds = time.monotonic() - began
                return False
            if fault.moment == "save":
                return work.saving(launched)
            if fault.moment == "evaluation":
                return work.evaluating(resumes)
            return work.last_row()["step"] >= resumes + steps

        came = self._await(at_moment, processes)
        targets = [processes[struck]] if fault.one else processes
        if came:
            for process in targets:
                process.send_signal(fault.signal)
        signalled = time.monotonic()
        codes = self._endings(processes, logs, str(fault))
        seconds = time.monotonic() - signalled
        running = stepping(logs[0])
        if not came:
            if any(codes):
                self.fail(f"Ended by itself with {codes}, before {fault}", logs)
            return None
        for process, code in zip(processes, codes):
            allowed = fault.exit_codes(process in targets, running)
            if work.newest() == self._options.steps:
                allowed.add(0)  # it was at its end just then
            if code not in allowed:
                self.fail(f"{fault} on {hosts} hosts: exit code {code}, not {allowed}", logs)
        last = int(work.last_row()["step"]) if running else resumes
        newest = work.newest()
        played = Played(fault, hosts, codes, seconds, last, max(0, last - newest), newest)
        if played.lost and fault.signal is not signal.SIGKILL:
            self.fail(f"{fault} on {hosts} hosts: {played.lost} steps before {last} are lost", logs)
        said = re.search(r"^Resuming .* from step ([\d,]+)\.$", logs[0].read_text(), re.MULTILINE)
        if running and resumes != int(said[1].replace(",", "") if said else 0):
            self.fail(f"{fault}: did not resume at step {resumes}", logs)
        return played

    def _await(self, moment: Callable[[], bool], processes: list[subprocess.Popen]) -> bool:
        """Waits for a moment; False: the run has ended before."""
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline:
            if any(process.poll() is not None for process in processes):
                return False
            if moment():
                return True
            time.sleep(0.01)
        self.fail("The moment of the fault did not come")
        return True

    def _endings(
        self, processes: list[subprocess.Popen], logs: list[Path], fault: str
    ) -> list[int]:
        """Returns the exit codes of all hosts, which are killed if they do not end."""
        deadline = time.monotonic() + ENDS_WITHIN
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.fail(f"{fault}: not ended {ENDS_WITHIN:.0f} s after the signal", logs)
                process.kill()
                process.wait()
        return [process.returncode for process in processes]


def faults(kills: int, every_hosts: list[int], rng: random.Random) -> Iterator[tuple[Fault, int]]:
    """Yields faults and numbers of hosts: every fault as often as the others, in random order."""
    deck: list[Fault] = []
    for _, hosts in zip(range(kills), itertools.cycle(every_hosts)):
        fits = [fault for fault in deck if hosts > 1 or not fault.one]
        if not fits:
            deck += rng.sample(DECK, len(DECK))
            fits = [fault for fault in deck if hosts > 1 or not fault.one]
        # Faults of one host first, which not every start can play.
        fault = (
            next((each for each in fits if each.one), fits[0]) if rng.random() < 0.6 else fits[0]
        )
        deck.remove(fault)
        yield fault, hosts


def compare(killed: Workdir, alone: Workdir, options: argparse.Namespace) -> tuple[list[str], str]:
    """Compares rows and arrays of two runs; returns faults, and a sentence on differences."""
    steps, eval_every = options.steps, options.eval_every
    problems, greatest = [], 0.0
    found = []
    for work in (killed, alone):
        values: dict[tuple[int, str], float] = {}
        for row in work.rows():
            step = int(row.pop("step"))
            for name, value in row.items():
                if (step, name) in values:
                    problems.append(f"{work.path.name}: {name} of step {step} stands there twice")
                values[step, name] = value
        logged = [step for step, name in values if name == "train/loss"]
        if logged != list(range(1, steps + 1)):
            problems.append(f"{work.path.name}: rows of {len(logged)} steps, not of {steps}")
        evaluated = [step for step, name in values if name == "zeroshot/top1"]
        due = [s for s in range(1, steps + 1) if s % eval_every == 0 or s == steps]
        if evaluated != due:
            problems.append(f"{work.path.name}: evaluations at {evaluated}, not at {due}")
        found.append({k: v for k, v in values.items() if not k[1].startswith(TIMES)})
    got, want = found
    if got.keys() != want.keys():
        problems.append(f"values of one run only: {sorted(got.keys() ^ want.keys())[:5]}")
    both = got.keys() & want.keys()
    other = sorted(key for key in both if got[key] != want[key])
    for key in other:
        if key[1] == "train/loss":
            greatest = max(greatest, abs(got[key] - want[key]) / abs(want[key]))
    arrays = [load(work.path / "checkpoints" / str(steps)) for work in (killed, alone)]
    differing, distance = 0, 0.0
    if arrays[0].keys() != arrays[1].keys():
        problems.append("the arrays of the last checkpoints have other names")
    for name in arrays[0].keys() & arrays[1].keys():
        mine, theirs = arrays[0][name], arrays[1][name]
        if mine.tobytes() != theirs.tobytes():
            differing += 1
            distance = max(distance, float(abs(mine.astype("f8") - theirs.astype("f8")).max()))
    if not other and not differing:
        return problems, (
            f"All {len(both):,} values of the curve and all {len(arrays[0])} arrays of the last "
            "checkpoint are bit-identical."
        )
    if options.devices or greatest > TOLERANCE:
        problems.append("the runs differ")
    return problems, (
        f"{len(other):,} of {len(both):,} values of the curve differ, the first at step "
        f"{other[0][0] if other else steps}, the loss by at most {greatest:.1e} of itself; "
        f"{differing} of {len(arrays[0])} arrays of the last checkpoint differ, by at most "
        f"{distance:.1e}."
    )


def load(path: Path) -> dict:
    """Returns the arrays of a checkpoint by name, without the code that wrote it."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # there is a file that it misses, and does not need
    found = {}
    for item in ("model", "optimizer"):
        reader = ocp.PyTreeCheckpointer()
        kinds = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(path / item).item_metadata.tree,
        )
        tree = reader.restore(path / item, restore_args=kinds)
        for where, leaf in jax.tree.leaves_with_path(tree):
            found[f"{item}{jax.tree_util.keystr(where)}"] = np.asarray(leaf)
    return found


def hear_signals() -> None:
    """Undoes what nohup and a shell's background do, by which a run would rightly ignore them."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def stepping(log: Path) -> bool:
    """Returns whether a start has come to its steps, by what it has printed."""
    return bool(re.search(r"^step ", log.read_text(errors="replace"), re.MULTILINE))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(played: list[Played]) -> str:
    """Returns the table of the faults."""
    titles = ("fault", "times", "exit codes", "s to exit, median", "most", "steps lost, most")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for fault in sorted({each.fault for each in played}, key=str):
        mine = [each for each in played if each.fault == fault]
        codes = sorted({code for each in mine for code in each.codes})
        seconds = [each.seconds for each in mine]
        cells = [str(fault), str(len(mine)), " ".join(map(str, codes))]
        cells += [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]
        cells += [str(max(each.lost for each in mine))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--model", choices=MODELS, default="quickstart")
    parser.add_argument("--steps", type=int, default=0, help="0: 20 a kill")
    parser.add_argument("--save_every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--eval_every", type=int, default=20, help="steps between two evaluations")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of kills, and their moments"
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 1, 4], help="of the starts")
    parser.add_argument("--devices", type=int, default=4, help="of all hosts; 0: one of each")
    parser.add_argument("--folder", help="keeps the runs there; default: a temporary directory")
    parser.add_argument("--lines", type=int, default=8, help="last lines to show of a failed host")
    options = parser.parse_args()
    options.steps = options.steps or 20 * options.kills
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "alone").exists() or (folder / "killed").exists():
            parser.error(f"--folder={folder} holds runs already: take another one")
        sys.exit(run(Chaos(folder, options), options))


def run(chaos: Chaos, options: argparse.Namespace) -> int:
    """Plays all faults, compares, and prints the tables; returns the exit code."""
    print(f"Seed {options.seed}. First the run that is left alone.", flush=True)
    took = chaos.finish("alone", options.hosts[0])
    print(f"It took {took:.0f} s. Now {options.kills} kills.\n", flush=True)
    rng, killed = random.Random(options.seed), chaos.workdir("killed")
    began, played = time.monotonic(), []
    for number, (fault, hosts) in enumerate(faults(options.kills, options.hosts, rng), 1):
        left = options.kills - number + 1
        patience = (options.steps - killed.newest()) // (left + 1)
        each = chaos.play(fault, hosts, min(patience, 2 * options.save_every), rng)
        seconds = time.monotonic() - began
        eta = seconds / number * (options.kills - number) + took
        if each is None:
            print(
                f"{number}/{options.kills}  on {hosts} hosts: {fault} was not reached", flush=True
            )
            continue
        played.append(each)
        print(
            f"{number}/{options.kills}  {hosts} hosts: {fault}: {each.codes} in "
            f"{each.seconds:.1f} s at step {each.step}, {each.lost} lost, resumes at "
            f"{each.resumes}  ETA {eta:.0f} s",
            flush=True,
        )
    chaos.finish("killed", options.hosts[options.kills % len(options.hosts)])
    seconds = time.monotonic() - began
    problems, sentence = compare(killed, chaos.workdir("alone"), options)
    for problem in problems:
        chaos.fail(problem)
    print(f"\n{table(played)}\n")
    print(f"{len(played)} kills of {options.steps:,} steps, seed {options.seed}. {sentence}")
    for name, wall in (("alone", took), ("killed", seconds)):
        trained = max(row.get("time/train", 0.0) for row in chaos.workdir(name).rows())
        print(f"Goodput, {name}: {trained / wall:.1%} of {wall:,.0f} s were steps that remain.")
    if len(played) < options.kills:
        chaos.fail(f"{options.kills - len(played)} faults were not played")
    print(f"{len(chaos.failures)} failures." if chaos.failures else "No failure.", flush=True)
    return 1 if chaos.failures else 0


if __name__ == "__main__":
    main()
