"""Seconds from SIGTERM to the end of a run, and from the next start to its first step.

    python benchmarks/preemption.py                              # ViT-B/32 at full size
    python benchmarks/preemption.py --config=configs/vit_l14.py --starts=2

Trains on the embedded digits and sends SIGTERM after a few steps of each start. The first start
compiles; those after it take the compiled step from the workdir and resume.
"""

import argparse
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 4  # steps of each start before the signal


def start(command: list[str]) -> tuple[float, float, float, int]:
    """Runs one start; returns seconds to its first step, of a step and to its end, and the code."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    steps: list[float] = []
    asked = 0.0
    for line in process.stdout:
        if re.match(r"step [\d,]+/", line):
            steps.append(time.monotonic())
            if len(steps) == STEPS:
                process.send_signal(signal.SIGTERM)
                asked = time.monotonic()
    code = process.wait()
    if not asked:
        sys.exit(f"The run ended with {code} before its {STEPS} steps; its command: {command}")
    each = (steps[STEPS - 1] - steps[0]) / (STEPS - 1)
    return steps[0] - began, each, time.monotonic() - asked, code


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/vit_b32.py")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--workdir", help="folder on the disk to measure; a temporary one is made")
    options = parser.parse_args()
    print("| start | first step, s | a step, s | SIGTERM to exit, s | exit code |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.workdir) as workdir:
        command = [sys.executable, "main.py", f"--config={options.config}", f"--workdir={workdir}"]
        settings = {
            "data.source.type": "digits",
            "data.source.split": "train",
            "batch_size": options.batch,
            "duration": "1000 steps",
            "log.every": "1 steps",
            "eval.every": "1000 steps",
        }
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        for number in range(1, options.starts + 1):
            first, each, end, code = start(command)
            print(f"| {number} | {first:.1f} | {each:.1f} | {end:.1f} | {code} |", flush=True)


if __name__ == "__main__":
    main()
