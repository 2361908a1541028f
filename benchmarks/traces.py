"""Trains the same weights on the same batches here and in PyTorch, and compares the steps.

    python benchmarks/traces.py                                  # open_clip
    python benchmarks/traces.py --peer=transformers --steps=50

Needs requirements-open-clip.txt, or for transformers requirements-parity.txt. Both sides start from
one model, which `clip_jax.weights` writes and the peer loads, and take the batches of our pipeline:
cropped pixels as bytes, and token ids. AdamW, the groups that decay, warm-up, cosine and the bound
on the scale are the peer's own code on its side. Everything is done in float32 and again in
float64, from the same float32 weights: what float64 leaves of a difference is an algorithm's, the
rest is rounding.

Prints a table of the differences, and names the tensors that part first. Keeps all of it in
traces.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import turns

STORED = Path(__file__).with_suffix(".json")
FORMATS = {"open_clip": "open_clip", "transformers": "huggingface"}  # by peer
DTYPES = ("float32", "float64")
SHOWN = (1, 2, 10, 50, 100, 200)  # steps in the table
METRICS = ("loss", "grad_norm/image", "grad_norm/text", "logit_scale")
BOUNDS = {"gradients": 1e-3, "parameters": 2e-2}  # relative differences of a tensor that has parted
# The bias of the keys changes no softmax: its gradient is rounding, which Adam makes steps of. In a
# tensor that has it as a part, those are some thousandths of the steps.
IDLE = "k_proj.bias"
FLOOR = 1e-4  # of the norm of all tensors: a smaller one counts as that large

Arrays = Mapping[str, np.ndarray]
Row = dict[str, float]


def make_config(steps: int, batch_size: int = 64):
    """Makes the config: the quickstart's model and the paper's optimiser, in open_clip's groups."""
    from clip_jax.configs import default, quickstart

    config = quickstart.get_config()
    config.update(duration=f"{steps} steps", batch_size=batch_size)
    config.data.update(crop="resized", threads=1)
    config.optim.update(
        warmup=f"{steps // 10} steps",
        grad_clip_norm=0.0,
        decay_params="(kernel|embedding|positions)$",  # as open_clip, not the class token
    )
    config.eval.zeroshot.source = config.eval.retrieval.source = default.source()
    return config


# ---- Our side ----------------------------------------------------------------------------------


class Ours:
    """The training step that main.py runs, from weights in a folder."""

    def __init__(self, config: Any, folder: Path):
        import jax
        from etils import epath

        from clip_jax import weights
        from clip_jax.training import run

        self._run = run.prepare(config, epath.Path(folder / "run"))
        self.size = self._run.net.size
        program = self._run.program
        variables = weights.open(folder / "ours").variables(self._run.mesh)
        params = jax.tree.map(
            lambda x, like: x.astype(like.dtype), variables["params"], program.state.params
        )
        self._variables = {**variables, "params": params}
        self._step = program.lower().compile()
        self.restart()

    def restart(self) -> None:
        """Takes the weights of the folder again."""
        self._state = self._run.program.init(self._variables)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of the run: image uint8 [b, h, w, 3] and tokens int32 [b, l]."""
        from clip_jax.training import run

        yield from run.open_data(self._run, 0)

    def take_step(self, batch: Arrays) -> Row:
        import jax

        shardings = {name: like.sharding for name, like in self._run.program.batch.items()}
        self._state, metrics = self._step(self._state, jax.device_put(dict(batch), shardings))
        return {name: float(metrics[name]) for name in METRICS}

    def tensors(self, table: Any) -> tuple[Arrays, Arrays]:
        """Returns parameters and first moments by the names in a table of the peer's tensors."""
        import optax

        from clip_jax.weights.convert.mapping import export_tensors

        trees = self._state.params, optax.tree.get(self._state.opt_state, "mu")
        params, moments = (export_tensors(table, _tensors(tree)) for tree in trees)
        return tuple({name: t.read(name) for name in t.shapes} for t in (params, moments))


def _tensors(params: Any) -> Any:
    """Returns parameters, or what is shaped like them, as `clip_jax.weights` takes them."""
    import jax

    from clip_jax.weights.model import Tensors, variables_by_path

    arrays = variables_by_path({"params": jax.device_get(params)})
    return Tensors({name: np.shape(x) for name, x in arrays.items()}, arrays.__getitem__)


def random_model(config: Any, folder: Path) -> Any:
    """Returns the model that a run begins with, as `clip_jax.weights` takes it."""
    from etils import epath

    from clip_jax.training import run
    from clip_jax.weights.convert import tokens
    from clip_jax.weights.model import Weights

    made = run.prepare(config, epath.Path(folder / "run"))
    origin = {"source": "random", "format": "clip_jax"}
    return Weights(made.net.size, _tensors(made.program.init().params), tokens.OPENAI, origin)


def write(model: Any, folder: Path, peer: str) -> None:
    """Writes a model for both sides."""
    from clip_jax import weights

    weights.save(model, folder / "ours")
    weights.save(model, folder / "theirs", FORMATS[peer])


# ---- The peer's side ---------------------------------------------------------------------------


class Theirs:
    """A PyTorch model and its optimiser, from weights in a folder; `table` places them in ours."""

    def __init__(self, peer: str, config: Any, folder: Path, size: Any, dtype: str):
        import torch

        torch.set_num_threads(1)
        self._peer, self._size, self._dtype = peer, size, getattr(torch, dtype)
        self.model, self.table = _load(peer, folder / "theirs", size)
        self.model.to(self._dtype).train()
        self.optimizer = make_optimizer(self.model, config.optim)
        self._adjust = schedule(peer, self.optimizer, config)
        self._taken = 0

    def take_step(self, batch: Arrays) -> Row:
        import torch

        self._adjust(self._taken)
        self.optimizer.zero_grad()
        loss = self._loss(*(torch.from_numpy(batch[name]) for name in ("image", "tokens")))
        loss.backward()
        norms = self._norms()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        self._taken += 1
        return {"loss": loss.item(), **norms, "logit_scale": self.model.logit_scale.exp().item()}

    def tensors(self) -> tuple[Arrays, Arrays]:
        """Returns parameters and first moments by name."""
        state = self.optimizer.state
        named = dict(self.model.named_parameters())
        moments = {n: state[p]["exp_avg"].numpy() for n, p in named.items() if p in state}
        return {name: p.detach().numpy() for name, p in named.items()}, moments

    def _loss(self, images: Any, tokens: Any) -> Any:
        import torch

        mean, deviation = (
            torch.tensor(part, dtype=self._dtype)[:, None, None]
            for part in (self._size.image_mean, self._size.image_std)
        )
        pixels = (images.permute(0, 3, 1, 2).to(self._dtype) / 255 - mean) / deviation
        if self._peer == "transformers":
            return self.model(tokens.long(), pixels, return_loss=True).loss
        import open_clip

        return open_clip.ClipLoss()(*self.model(pixels, tokens.long()))

    def _norms(self) -> Row:
        """Measures the norm of the gradient of each tower."""
        paths = {row.name: row.pieces[0].path for row in self.table}
        squares = dict.fromkeys(METRICS[1:3], 0.0)
        for name, parameter in self.model.named_parameters():
            tower = "grad_norm/" + paths[name].split("/")[1]
            if tower in squares:
                squares[tower] += parameter.grad.square().sum().item()
        return {tower: math.sqrt(square) for tower, square in squares.items()}


def _load(peer: str, folder: Path, size: Any) -> tuple[Any, Any]:
    """Has the peer load a folder of ours; returns the model and the table of its tensors."""
    if peer == "transformers":
        import transformers

        from clip_jax.weights.convert import huggingface

        return transformers.CLIPModel.from_pretrained(folder), huggingface.table(size)
    import open_clip

    from clip_jax.weights.convert import openai

    return open_clip.create_model(f"local-dir:{folder}"), openai.table(size)


def make_optimizer(model: Any, settings: Any) -> Any:
    """Makes AdamW in the groups of open_clip_train/main.py: vectors and scalars do not decay."""
    import torch

    groups = [[p for p in model.parameters() if (p.ndim > 1) == decays] for decays in (False, True)]
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}],
        weight_decay=settings.weight_decay,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
    )


def schedule(peer: str, optimizer: Any, config: Any) -> Any:
    """Returns the function that sets the rate of a step, counted from 0: open_clip's own."""
    peak = config.optim.learning_rate
    warmup, steps = (int(text.split()[0]) for text in (config.optim.warmup, config.duration))
    if peer == "open_clip":
        from open_clip_train import scheduler

        return scheduler.cosine_lr(optimizer, peak, warmup, steps)

    def adjust(step: int) -> None:
        cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * ((step + 1) / warmup if step < warmup else cosine)

    return adjust


# ---- The comparison ----------------------------------------------------------------------------


def part(ours: Arrays, theirs: Arrays, start: Arrays | None = None) -> dict[str, float]:
    """Computes the relative difference of each tensor.

    With the arrays that they began with, it is relative to how far they have come.
    """
    origin = start or dict.fromkeys(theirs, 0.0)
    sizes = {name: np.linalg.norm(x - origin[name]) for name, x in theirs.items()}
    entries = sum(x.size for x in theirs.values())
    whole = math.sqrt(sum(size**2 for size in sizes.values()) / entries)
    return {
        name: float(
            np.linalg.norm(ours[name] - x) / max(sizes[name], FLOOR * whole * math.sqrt(x.size))
        )
        for name, x in theirs.items()
        if not name.endswith(IDLE)
    }


def follow(ours: Ours, theirs: Theirs, steps: int) -> dict[str, Any]:
    """Takes steps on both sides, and compares their tensors after the first and every tenth.

    Returns:
      The metrics of each side by step; and of gradients (as first moments) and of parameters the
      step, name and difference of the tensor that was "furthest" when last compared, and of the
      one that was when it first went beyond the bound, "parted".
    """
    start = {name: x.copy() for name, x in theirs.tensors()[0].items()}
    result: dict[str, Any] = {"clip_jax": [], "peer": [], "parted": {}, "furthest": {}}
    for step, batch in zip(range(1, steps + 1), ours.batches()):
        result["clip_jax"].append(ours.take_step(batch))
        result["peer"].append(theirs.take_step(batch))
        if step > 1 and step % 10:
            continue
        params, moments = ours.tensors(theirs.table)
        their_params, their_moments = theirs.tensors()
        found = {
            "gradients": part(moments, their_moments),
            "parameters": part(params, their_params, start),
        }
        for kind, tensors in found.items():
            difference, name = max((value, name) for name, value in tensors.items())
            entry = {"step": step, "tensor": name, "difference": difference}
            result["furthest"][kind] = entry
            if difference > BOUNDS[kind]:
                result["parted"].setdefault(kind, entry)
    return result


def trace(peer: str, dtype: str, steps: int, folder: Path, batch_size: int = 64) -> dict[str, Any]:
    """Traces both sides in this process, in one dtype; arguments as on the command line."""
    if dtype == "float64":
        use_float64()
    config = make_config(steps, batch_size)
    config.model.dtype = dtype
    ours = Ours(config, folder)
    theirs = Theirs(peer, config, folder, ours.size, dtype)
    return follow(ours, theirs, steps)


def use_float64() -> None:
    """Has clip_jax compute in float64 what it computes in float32; to call before it is imported.

    The softmax of `jax.nn.dot_product_attention` remains float32.
    """
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.numpy.float32 = jax.numpy.float64


# ---- The table ---------------------------------------------------------------------------------


def differences(ours: list[Row], theirs: list[Row], metric: str) -> np.ndarray:
    """Returns the absolute difference by step; of the loss, divided by the first loss."""
    a, b = (np.array([row[metric] for row in rows]) for rows in (ours, theirs))
    return np.abs(a - b) / (b[0] if metric == "loss" else np.abs(b))


def table(peer: str, traces: Mapping[str, Any]) -> str:
    """Formats the greatest differences up to a step: of the loss, and in float32 of the rest."""
    single, double = (traces[dtype] for dtype in DTYPES)
    columns = {
        f"loss, clip_jax - {peer}": (single["clip_jax"], single["peer"], "loss"),
        "the same in float64": (double["clip_jax"], double["peer"], "loss"),
        "clip_jax from its float64": (single["clip_jax"], double["clip_jax"], "loss"),
        f"{peer} from its float64": (single["peer"], double["peer"], "loss"),
        **{name: (single["clip_jax"], single["peer"], name) for name in METRICS[1:]},
    }
    lines = ["| steps | loss | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for step in [step for step in SHOWN if step <= len(single["peer"])]:
        cells = [f"{step} | {single['peer'][step - 1]['loss']:.4f}"]
        cells += [f"{differences(*column)[:step].max():.1e}" for column in columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(peer: str, traces: Mapping[str, Any]) -> str:
    """Formats the table, and the tensors that part first and furthest."""
    form = "{tensor} by {difference:.1e}, step {step}".format_map
    lines = [table(peer, traces), ""]
    for dtype, result in traces.items():
        for kind, furthest in result["furthest"].items():
            first = result["parted"].get(kind)
            where = f"part first in {form(first)}" if first else "stay together"
            lines.append(f"{dtype}, {kind}: {where}; furthest {form(furthest)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer", choices=FORMATS, default="open_clip")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="pairs per step")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 10:
        parser.error("a tenth of the steps is the warm-up: --steps must be at least 10")
    sys.path.insert(0, str(turns.ROOT))
    if args.child:
        dtype, folder = args.child[0], Path(args.child[1])
        result = trace(args.peer, dtype, args.steps, folder, args.batch)
        (folder / f"{dtype}.json").write_text(json.dumps(result))
        return
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    traces = stored[f"{args.peer}, {args.steps} steps"] = run_children(args)
    STORED.write_text(json.dumps(stored) + "\n")
    print(report(args.peer, traces))


def run_children(args: argparse.Namespace) -> dict[str, Any]:
    """Traces in a process for each dtype."""
    environment, traces = {**os.environ, **turns.PLATFORMS["cpu"]}, {}
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(make_config(args.steps, args.batch), Path(folder))
        write(model, Path(folder), args.peer)
        for dtype in DTYPES:
            child = [sys.executable, *sys.argv, "--child", dtype, folder]
            subprocess.run(child, check=True, env=environment)
            traces[dtype] = json.loads((Path(folder) / f"{dtype}.json").read_text())
    return traces


if __name__ == "__main__":
    main()
