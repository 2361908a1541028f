"""The effect of each memory saver on learning: the quickstart with it, beside plain runs.

    python benchmarks/savers.py
    python benchmarks/savers.py --seeds=5 --only=plain,moments

Trains configs/quickstart.py with each setting and seed, some three minutes a run on two idle cores.
Prints zero-shot top-1 and text-to-image recall@1 (%) on held-out data, and the mean of the last
losses. A saver is harmless if its figures lie among those of plain runs with other seeds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAVERS = {
    "plain": [],
    "remat": ["model.remat=full"],
    "moments": ["optim.moment_dtype=bfloat16"],
    "half text": ["optim.bf16_params=^text/"],
    "all": ["model.remat=full", "optim.moment_dtype=bfloat16", "optim.bf16_params=^text/"],
}
METRICS = ("zeroshot/top1", "retrieval/text_to_image/recall@1")
LAST = 10  # logged losses that are averaged


def train(settings: list[str], seed: int, steps: int) -> list[float]:
    """Trains; returns two scores in % and the mean of the last losses."""
    with tempfile.TemporaryDirectory() as workdir:
        own = [f"seed={seed}", f"duration={steps} steps", f"eval.every={steps} steps", *settings]
        command = ["main.py", "--config=configs/quickstart.py", f"--workdir={workdir}"]
        command += [f"--config.{setting}" for setting in own]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["train/loss"] for row in rows if "train/loss" in row][-LAST:]
    scores = next(row for row in reversed(rows) if METRICS[0] in row)
    return [*(100 * scores[metric] for metric in METRICS), sum(losses) / len(losses)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", default=",".join(SAVERS), help="some of: %(default)s")
    options = parser.parse_args()
    print(f"{'':<10} seed   top-1 %   recall@1 %     loss")
    for seed in range(options.seeds):
        for name in options.only.split(","):
            top1, recall, loss = train(SAVERS[name], seed, options.steps)
            print(f"{name:<10} {seed:>4} {top1:>9.2f} {recall:>12.2f} {loss:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
