"""Measures how well each recipe learns: the same data, images and model, over several seeds.

    python benchmarks/learning.py                                   # the embedded digits
    python benchmarks/learning.py --data=emoji --path="shards/*.tar" --held_out=last.tar
    python benchmarks/learning.py --only="baseline,sigmoid" --seeds=5
    python benchmarks/learning.py --table                           # of what is stored

Every recipe differs from the baseline in the settings that stand beside it, and sees as many
images. All runs of a seed see the same pairs in the same order. A run that is stored in
learning.json is not repeated, so the command goes on where it was stopped. The table has the mean
over the seeds, and the mean difference from the baseline of the same seed with its 95 % interval
(Student's t). Its last column is processor time of a run, evaluation included; the seeds share
compiled programs.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import turns

STORED = Path(__file__).with_suffix(".json")
STEPS = 800
SECOND_STAGE = 160  # steps of the last stage, where there are two
BATCH = 64
METRICS = {
    "digits": ("zeroshot/top1", "retrieval/text_to_image/recall@10"),
    "emoji": ("retrieval/text_to_image/recall@10", "retrieval/image_to_text/recall@10"),
}
# Settings of each recipe on top of the baseline's. "{other}" is the workdir of the baseline with
# another seed.
RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "sigmoid": {"loss.name": "sigmoid"},
    "patch_dropout": {"model.patch_dropout": 0.5},
    "two_captions": {"data.captions": 2},
    "label_smoothing": {"loss.label_smoothing": 0.1},
    "matryoshka": {"loss.widths": (16, 32)},
    "cooldown": {"optim.schedule": "constant", "optim.cooldown": "20 percent"},
    "lion": {"optim.name": "lion", "optim.learning_rate": 2e-4},
    "adafactor": {"optim.name": "adafactor"},
    "lamb": {"optim.name": "lamb", "optim.learning_rate": 5e-3},
    "muon": {"optim.name": "muon"},
    "bf16_moments": {"optim.moment_dtype": "bfloat16"},
    # Loss of a decoder of two layers, weighted as in openMaMMUT's config.
    "captioning": {"loss.captioning": 2.0, "model.size.text_decoder_layers": 2},
    "distillation": {"loss.distillation": 0.5, "loss.teachers": "{other}"},
    "views": {
        "loss.views": 1.0,
        "model.size.views_mlp": 256,
        "model.size.views_embed": 64,
    },
    # The image tower is the baseline's of another seed.
    "lit": {"init_from": "{other}", "init_params": "^image/", "optim.factors": "^image/=0"},
    # Half the side in four fifths of the steps, the whole side in the last fifth.
    "stages": {
        "stages": (
            {"model.size.image_size": 0.5, "duration": f"{STEPS - SECOND_STAGE} steps"},
            {"duration": f"{SECOND_STAGE} steps", "optim.warmup": "10 percent"},
        )
    },
    # And half of the tokens of the captions, neighbours.
    "stages_text": {
        "stages": (
            {
                "model.size.image_size": 0.5,
                "model.size.context_length": 8,
                "data.text_mask": "block",
                "duration": f"{STEPS - SECOND_STAGE} steps",
            },
            {"duration": f"{SECOND_STAGE} steps", "optim.warmup": "10 percent"},
        )
    },
}


def make_config(data: str, path: str, held_out: str, recipe: str, seed: int, other: str):
    """Makes the config of a run."""
    from clip_jax.configs import default, quickstart

    config = quickstart.get_config()
    config.data.source.split = "train_two_captions"
    if data == "emoji":
        captions = "txt:0.5,aliases:0.5"
        config.data.source = default.source(type="tar", path=path, text_key=captions)
        config.data.crop = "resized"
        config.eval.zeroshot.source = default.source()
        config.eval.retrieval.source = default.source(type="tar", path=held_out, text_key="txt")
        config.model.size.update(image_size=32, patch_size=8)
    config.update(seed=seed, duration=f"{STEPS} steps", batch_size=BATCH)
    config.optim.ema_decay = 0.98  # changes no run; gives the row "ema"
    config.eval.every = config.checkpoint.every = f"{STEPS} steps"
    config.checkpoint.best_metric = ""
    config.log.every = "100 steps"
    config.log.tensorboard = False
    settings = dict(RECIPES[recipe])
    for stage in (stages := settings.pop("stages", ())):
        if "model.size.image_size" in stage:
            side = int(stage["model.size.image_size"] * config.model.size.image_size)
            stage["model.size.image_size"] = side
    config.stages = default.stages(*stages)
    for name, value in settings.items():
        if value == "{other}":
            value = other
        config.update_from_flattened_dict({name: value})
    return config


def run(config, workdir: str) -> None:
    from clip_jax.training import stages, validation

    validation.validate(config)
    stages.train_all(config, workdir)


def read(workdir: Path, metrics: tuple[str, ...]) -> dict[str, float]:
    """Returns the last evaluation of a run, and its last loss."""
    parts = sorted(workdir.glob("stage*")) or [workdir]
    rows = [[json.loads(line) for line in (part / "metrics.jsonl").open()] for part in parts]
    last = {name: value for row in rows[-1] for name, value in row.items()}
    result = {name: last[name] for name in metrics}
    result |= {f"ema/{name}": last[f"ema/{name}"] for name in metrics}
    return result | {"loss": last["train/loss"]}


def train(arguments: argparse.Namespace, recipe: str, seed: int) -> dict[str, float]:
    """Trains a run in a process of its own, unless it is finished."""
    if "{other}" in RECIPES[recipe].values():
        train(arguments, "baseline", other(arguments, seed))
    folder = Path(arguments.workdir) / arguments.data
    workdir = folder / f"{recipe}-{seed}"
    command = [sys.executable, __file__, "--child", recipe, str(seed), "--data", arguments.data]
    command += ["--path", arguments.path, "--held_out", arguments.held_out]
    command += ["--workdir", str(workdir)]
    command += ["--other", str(folder / f"baseline-{other(arguments, seed)}")]
    workdir.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (workdir / "log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return read(workdir, METRICS[arguments.data]) | {"cpu_s": round(cpu, 1)}


def other(arguments: argparse.Namespace, seed: int) -> int:
    """Returns the seed of the baseline that a recipe takes a model from."""
    return (seed + 1) % arguments.seeds


def load() -> dict[str, Any]:
    return json.loads(STORED.read_text()) if STORED.exists() else {}


def store(data: str, recipe: str, seed: int, results: dict[str, float]) -> None:
    """Adds a run to those stored; another command may have added some meanwhile."""
    stored = load()
    stored.setdefault(data, {}).setdefault(recipe, {})[str(seed)] = results
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


def environment() -> dict[str, str]:
    return {**os.environ, **turns.PLATFORMS["cpu"], "PYTHONPATH": str(turns.ROOT)}


def interval(differences: list[float]) -> float:
    """Returns half the width of the 95 % interval of the mean."""
    from scipy import stats

    n = len(differences)
    return stats.t.ppf(0.975, n - 1) * statistics.stdev(differences) / math.sqrt(n)


def table(runs: dict[str, dict[str, dict[str, float]]], metrics: tuple[str, ...]) -> str:
    """Formats the runs, {recipe: {seed: results}}; the averages of the baseline are a row."""
    runs = {recipe: runs[recipe] for recipe in RECIPES if recipe in runs}
    runs["ema"] = {
        seed: {**result, **{name: result[f"ema/{name}"] for name in metrics}}
        for seed, result in runs["baseline"].items()
    }
    lines = ["| recipe | " + " | ".join(f"{name} | difference" for name in metrics)]
    lines[0] += " | CPU s | seeds |"
    lines.append("|---" * (2 * len(metrics) + 3) + "|")
    for recipe, seeds in runs.items():
        cells = []
        for name in metrics:
            values = [100 * result[name] for result in seeds.values()]
            pairs = [
                100 * (result[name] - runs["baseline"][seed][name])
                for seed, result in seeds.items()
                if seed in runs["baseline"]
            ]
            cells += [f"{statistics.mean(values):.1f}", f"{statistics.mean(pairs):+.1f}"]
            if len(values) > 1:
                cells[-2] += f" ± {statistics.stdev(values):.1f}"
                cells[-1] += f" ± {interval(pairs):.1f}"
            if recipe == "baseline":
                cells[-1] = ""
        times = [result["cpu_s"] for result in seeds.values() if "cpu_s" in result]
        cells.append(f"{statistics.median(times):.0f}" if times else "")
        lines.append(f"| {recipe} | " + " | ".join(cells) + f" | {len(seeds)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=METRICS, default="digits")
    parser.add_argument("--path", default="", help="emoji: shards to learn from")
    parser.add_argument("--held_out", default="", help="emoji: shards of the evaluation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="recipes, comma-separated; else all")
    parser.add_argument("--workdir", default="learning", help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="print what is stored, and end")
    parser.add_argument("--child", nargs=2, default=(), help=argparse.SUPPRESS)
    parser.add_argument("--other", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        recipe, seed = arguments.child
        places = arguments.data, arguments.path, arguments.held_out
        config = make_config(*places, recipe, int(seed), arguments.other)
        config.compilation_cache = str(Path(arguments.workdir).parent / "compiled")
        run(config, arguments.workdir)
        return
    runs = load().get(arguments.data, {})
    names = [name for name in arguments.only.split(",") if name] or list(RECIPES)
    left = [(name, seed) for name in names for seed in range(arguments.seeds)]
    left = [(name, seed) for name, seed in left if str(seed) not in runs.get(name, {})]
    for number, (name, seed) in enumerate(() if arguments.table else left, start=1):
        began = time.perf_counter()
        print(f"{number} of {len(left)}: {name}, seed {seed}", end="", flush=True)
        results = train(arguments, name, seed)
        print(f", {results[METRICS[arguments.data][0]]:.3f}, {time.perf_counter() - began:.0f} s")
        store(arguments.data, name, seed, results)
    print(table(load().get(arguments.data, {}), METRICS[arguments.data]))


if __name__ == "__main__":
    main()
