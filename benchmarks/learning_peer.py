"""Measures whether clip_jax learns as well as open_clip: the same pairs, crop, steps and model.

    python benchmarks/learning_peer.py --data=emoji --path="shards/*.tar" --held_out=last.tar
    python benchmarks/learning_peer.py --data=digits --seeds=3

Needs requirements-open-clip.txt. The runs are those of learning.py, all with RandomResizedCrop of
90 to 100 % of the area except where a row says otherwise. open_clip starts from its own
initialisation, crops by its own transform and learns by PyTorch's AdamW; it sees the same examples
and captions in the same order. Both models are evaluated by the same code. Results that are in
learning_peer.json are not computed again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import learning
import traces
import turns

STORED = Path(__file__).with_suffix(".json")
PEER, START = "open_clip", "start of open_clip"
SETTINGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    PEER: {},
    "square crop": {"data.crop": "random"},
    START: {},  # our trainer, from the random model that open_clip starts from
}


def make_config(args: argparse.Namespace, name: str, seed: int):
    """Makes the config of a run."""
    config = learning.make_config(args.data, args.path, args.held_out, "baseline", seed, "")
    config.data.update(crop="resized", threads=1)
    config.optim.decay_params = "(kernel|embedding|positions)$"  # as open_clip
    config.update_from_flattened_dict(SETTINGS[name])
    return config


def random_peer(config: Any, folder: Path) -> Any:
    """Makes the model that open_clip starts from; its settings are in `folder`."""
    import open_clip
    import torch

    from clip_jax import weights

    weights.save(traces.random_model(config, folder.parent), folder, "open_clip")
    settings = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    torch.manual_seed(config.seed)
    return open_clip.model.CLIP(**settings)


def save_peer(model: Any, folder: Path) -> None:
    from safetensors import torch as safetensors

    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    safetensors.save_file(tensors, folder / "open_clip_model.safetensors")


def batches(config: Any, run: Any):
    """Yields normalised images and ids of our order and captions, cropped by open_clip."""
    import numpy as np
    import torch
    from open_clip import transform
    from PIL import Image

    from clip_jax.data import images, order
    from clip_jax.data.sources import captions

    size = run.net.size
    normal = {"mean": size.image_mean, "std": size.image_std}
    change = transform.image_transform_v2(
        transform.PreprocessCfg(size=size.image_size, **normal),
        is_train=True,
        aug_cfg=transform.AugmentationCfg(scale=tuple(config.data.crop_scale)),
    )

    def picture(example: Any) -> Image.Image:
        if isinstance(example.image, bytes):
            return images.decode(example.image, example.key)
        return Image.fromarray(example.image)

    for first in range(0, learning.STEPS * config.batch_size, config.batch_size):
        pixels, ids = [], []
        for position in range(first, first + config.batch_size):
            example = run.source[run.order[position]]
            rng = np.random.default_rng([config.seed, order.CROP, position])
            (text,) = captions.draw(example.captions, 1, rng)
            ids.append(run.tokenizer.encode(text)[0])
            pixels.append(change(picture(example)))
        yield torch.stack(pixels), torch.from_numpy(np.stack(ids)).long()


def train_peer(config: Any, workdir: Path) -> dict[str, float]:
    """Trains open_clip; returns what our evaluation measures of it."""
    import math

    import open_clip
    import torch
    from etils import epath

    from clip_jax import weights
    from clip_jax.training import run as runs

    torch.set_num_threads(1)
    run = runs.prepare(config, epath.Path(workdir))
    model = random_peer(config, workdir / PEER).train()
    optimizer = traces.make_optimizer(model, config.optim)
    adjust = traces.schedule(PEER, optimizer, config)
    loss_fn, losses = open_clip.ClipLoss(), []
    for step, batch in enumerate(batches(config, run)):
        adjust(step)
        optimizer.zero_grad()
        loss = loss_fn(*model(*batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip_norm)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}: {sum(losses[-100:]) / 100:.4f}", flush=True)
    save_peer(model, workdir / PEER)
    found = run.evaluator.run(weights.open(workdir / PEER).variables(run.mesh))
    return found | {"train/loss": sum(losses[-100:]) / 100}


def train(args: argparse.Namespace, name: str, seed: int, workdir: Path) -> dict[str, float]:
    """Trains one run; returns its last metrics."""
    config = make_config(args, name, seed)
    if name == PEER:
        return train_peer(config, workdir)
    if name == START:
        save_peer(random_peer(config, workdir / PEER), workdir / PEER)
        config.init_from = str(workdir / PEER)
    learning.run(config, str(workdir / "run"))
    rows = map(json.loads, (workdir / "run" / "metrics.jsonl").open())
    return {key: value for row in rows for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=learning.METRICS, default="digits")
    parser.add_argument("--path", default="", help="emoji: shards to learn from")
    parser.add_argument("--held_out", default="", help="emoji: shards of the evaluation")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows, comma-separated; else all")
    parser.add_argument("--workdir", default="learning_peer", help="folder of the runs")
    parser.add_argument("--table", action="store_true", help="print what is stored, and end")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(turns.ROOT))
    if args.child:
        name, seed, workdir = args.child[0], int(args.child[1]), Path(args.workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        results = train(args, name, seed, workdir)
        kept = {key: value for key, value in results.items() if "/" in key}
        (workdir / "results.json").write_text(json.dumps(kept))
        return
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    runs = stored.setdefault(args.data, {})
    names = args.only.split(",") if args.only else list(SETTINGS)
    left = [(name, str(seed)) for seed in range(args.seeds) for name in names]
    left = [(name, seed) for name, seed in left if seed not in runs.get(name, {})]
    for name, seed in () if args.table else left:
        began, workdir = time.perf_counter(), Path(args.workdir) / args.data / f"{name}-{seed}"
        command = [sys.executable, *sys.argv, f"--workdir={workdir}", "--child", name, seed]
        subprocess.run(command, check=True, env={**os.environ, **turns.PLATFORMS["cpu"]})
        runs.setdefault(name, {})[seed] = json.loads((workdir / "results.json").read_text())
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"{name}, seed {seed}, {time.perf_counter() - began:.0f} s", flush=True)
    print(learning.table(runs, learning.METRICS[args.data]))


if __name__ == "__main__":
    main()
