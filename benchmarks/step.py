"""Training-step speed: clip_jax next to open_clip and big_vision, taking turns step by step.

    python benchmarks/step.py
    python benchmarks/step.py --model=small --big_vision=DIR
    python benchmarks/step.py --device=gpu --batch=1024
    python benchmarks/step.py --device=gpu --model=ViT-L/14 --batch=256

On a GPU captions are also packed, and attention also taken from cuDNN, beside XLA's own. Needs
open_clip_torch; DIR is a checkout of google-research/big_vision, left out without it. See
benchmarks/README.md for what is compared.

Prints medians, and the speed relative to open_clip.
"""

import argparse
import functools
import math
import sys

import numpy as np
import turns
from turns import Step

# Forms of our step: (scanned layers, packed captions, attention).
FORMS = {
    "clip_jax scanned": (True, False, "xla"),
    "clip_jax unrolled": (False, False, "xla"),
    "clip_jax packed": (False, True, "xla"),
    "clip_jax cudnn": (False, False, "cudnn"),
    "clip_jax packed cudnn": (False, True, "cudnn"),
}
COMPETITORS = ("open_clip", "open_clip compiled", "big_vision", *FORMS)
ON_GPU = ("open_clip compiled", *list(FORMS)[2:])  # elsewhere only where asked for
SMALL = {
    "embed_dim": 192,
    "image_size": 32,
    "image_layers": (6,),
    "image_width": 192,
    "image_heads": 3,
    "patch_size": 8,
    "text_layers": 4,
    "text_width": 192,
    "text_heads": 3,
}
# Name: (model, shapes, batch).
MODELS = {
    "ViT-B/32": ("ViT-B/32", {}, 32),
    "ViT-L/14": ("ViT-L/14", {}, 32),
    "small": ("ViT-B/32", SMALL, 256),
}
# AdamW of the paper, at a constant rate that needs no warm-up.
ADAMW = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.2}

Batch = tuple[np.ndarray, np.ndarray]


def make_batch(size, count: int) -> Batch:
    """Makes uint8 images [n, h, w, 3] and int32 captions [n, context] of 6 to 30 tokens, padded."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size.image_size, size.image_size, 3), np.uint8)
    tokens = np.zeros((count, size.context_length), np.int32)
    for row in tokens:
        length = rng.integers(6, 31)
        row[:length] = rng.integers(1, size.vocab_size - 2, length)
        row[0], row[length - 1] = size.vocab_size - 2, size.vocab_size - 1
    return images, tokens


# ---- Competitors: each returns its step and the number of parameters that it trains -----------


def clip_jax_step(
    size, batch: Batch, scan_layers: bool, packing=None, device: str = "cpu", attention: str = "xla"
) -> tuple[Step, int]:
    """Makes the step of the training loop, with uint8 pixels and norms measured."""
    import jax
    import jax.numpy as jnp

    from clip_jax import losses, models, optim, sharding, state
    from clip_jax.configs import default
    from clip_jax.training import objectives, step

    dtype = jnp.bfloat16 if device == "gpu" else jnp.float32  # as by model.dtype="auto"
    net = models.CLIP(
        size, scan_layers=scan_layers, packing=packing, dtype=dtype, attention=attention
    )
    mesh = sharding.make_mesh()
    settings = default.get_config().optim
    settings.update(ADAMW, schedule="constant", warmup="0 steps")
    schedule = optim.make_schedule(settings, lambda duration: int(duration.split()[0]), 1_000_000)
    optimizer = optim.make_optimizer(schedule, settings, seed=0)
    like = state.abstract_state(net, optimizer, mesh)
    train_state = state.init_state(like, net, optimizer, seed=0)
    parameters = state.count_params(train_state.params)
    arrays = dict(zip(("image", "tokens"), batch))
    arrays = jax.device_put(arrays, sharding.batch_sharding(mesh))
    take = functools.partial(
        step.train_step,
        net=net,
        optimizer=optimizer,
        loss_fn=objectives.weighted_sum(
            contrastive=(
                1.0,
                objectives.of_pairs(functools.partial(losses.softmax_loss, mesh=mesh)),
            )
        ),
        accum_steps=1,
        zero1=False,
        seed=0,
        augment=lambda images, key: {"image": images},
        max_logit_scale=100.0,
        skip_above=None,
    )
    compiled_step = step.lower_step(take, train_state, arrays, mesh).compile()

    def take_step() -> float:
        nonlocal train_state
        train_state, metrics = compiled_step(train_state, arrays)
        return float(jax.block_until_ready((train_state, metrics))[1]["loss"])

    return take_step, parameters


def open_clip_step(
    size, batch: Batch, device: str = "cpu", compiled: bool = False
) -> tuple[Step, int]:
    """Makes a step with fused AdamW, no decay on gains, biases and logit_scale, images normalised.

    On a GPU it runs as with --precision=amp_bf16, on a CPU in float32.
    """
    import open_clip
    import torch

    torch.manual_seed(0)
    place = "cuda" if device == "gpu" else "cpu"
    model = open_clip.model.CLIP(
        embed_dim=size.embed_dim,
        quick_gelu=True,
        vision_cfg={
            "image_size": size.image_size,
            "layers": size.image_layers[0],
            "width": size.image_width,
            "head_width": size.image_width // size.image_heads,
            "patch_size": size.patch_size,
        },
        text_cfg={
            "context_length": size.context_length,
            "vocab_size": size.vocab_size,
            "width": size.text_width,
            "heads": size.text_heads,
            "layers": size.text_layers,
        },
        output_dict=True,
    ).to(place)
    named = dict(model.named_parameters())
    plain = [n for n, p in named.items() if p.ndim < 2 or "ln" in n or "bias" in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in plain], "weight_decay": 0.0},
            {"params": [p for n, p in named.items() if n not in plain]},
        ],
        lr=ADAMW["learning_rate"],
        betas=(ADAMW["b1"], ADAMW["b2"]),
        eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
        fused=True,
    )
    loss_fn = open_clip.ClipLoss()
    images, tokens = batch
    pixels = torch.from_numpy(normalised(images)).permute(0, 3, 1, 2).contiguous().to(place)
    ids = torch.from_numpy(tokens).long().to(place)
    forward = torch.compile(model) if compiled else model

    def take_step() -> float:
        with torch.autocast(place, torch.bfloat16, enabled=device == "gpu"):
            out = forward(pixels, ids)
            loss = loss_fn(out["image_features"], out["text_features"], out["logit_scale"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return take_step, sum(p.numel() for p in model.parameters())


def big_vision_step(size, batch: Batch, checkout: str) -> tuple[Step, int]:
    """Makes a step of two_towers at the same sizes, with its trainer's softmax loss.

    Its blocks are unrolled and its text tower sees all tokens (no causal mask) and reads the last.
    """
    sys.path.insert(0, checkout)
    import jax
    import jax.numpy as jnp
    import optax
    from big_vision.models.proj.image_text import two_towers

    def tower(layers: int, width: int, heads: int, **more) -> dict:
        return {"depth": layers, "width": width, "mlp_dim": 4 * width, "num_heads": heads, **more}

    patch = {"patch_size": (size.patch_size,) * 2, "pool_type": "tok", "head_zeroinit": False}
    model = two_towers.Model(
        image=tower(size.image_layers[0], size.image_width, size.image_heads, **patch),
        text=tower(size.text_layers, size.text_width, size.text_heads, vocab_size=size.vocab_size),
        out_dim=size.embed_dim,
        temperature_init=1 / 0.07,
    )
    images, tokens = batch
    images, tokens = jax.device_put((normalised(images), tokens))
    tx = optax.adamw(**ADAMW, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    params = jax.jit(lambda key: model.init(key, images, tokens)["params"])(jax.random.key(0))
    train_state = {"params": params, "opt": jax.jit(tx.init)(params)}

    def update(train_state, images, tokens):
        def loss_fn(params):
            zimg, ztxt, extras = model.apply({"params": params}, images, tokens, train=True)
            logits = jnp.dot(zimg, ztxt.T) * extras["t"]
            labels = jnp.arange(len(logits))
            directions = [
                optax.softmax_cross_entropy_with_integer_labels(side, labels)
                for side in (logits, logits.T)
            ]
            return jnp.mean(jnp.stack(directions))

        params, opt = train_state["params"], train_state["opt"]
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        norms = [optax.global_norm(tree) for tree in (grads, params, updates)]
        return {"params": params, "opt": opt}, (loss, norms)

    program = jax.jit(update, donate_argnums=0).lower(train_state, images, tokens).compile()

    def take_step() -> float:
        nonlocal train_state
        train_state, (loss, _) = jax.block_until_ready(program(train_state, images, tokens))
        return float(loss)

    return take_step, sum(leaf.size for leaf in jax.tree.leaves(params))


def normalised(images: np.ndarray) -> np.ndarray:
    from clip_jax.models.sizes import IMAGE_MEAN, IMAGE_STD

    return ((images / 255 - IMAGE_MEAN) / IMAGE_STD).astype(np.float32)


# ---- The run -----------------------------------------------------------------------------------


def prepare(competitor: str, args: argparse.Namespace) -> tuple[Step, dict]:
    from clip_jax import models
    from clip_jax.models.packing import Packing

    name, shapes, batch = MODELS[args.model]
    size = models.get_size(name, shapes)
    batch = make_batch(size, args.batch or batch)
    if competitor.startswith("open_clip"):
        compiled = competitor == "open_clip compiled"
        take_step, parameters = open_clip_step(size, batch, args.device, compiled)
    elif competitor == "big_vision":
        take_step, parameters = big_vision_step(size, batch, args.big_vision)
    else:
        scan_layers, packed, attention = FORMS[competitor]
        packing = Packing(length=80, rows=0.3) if packed else None
        take_step, parameters = clip_jax_step(
            size, batch, scan_layers, packing, args.device, attention
        )
    return take_step, {"parameters": parameters}


def peak(competitor: str, device: str) -> float:
    """Returns the peak memory in GiB, on a GPU that of the GPU."""
    if device == "cpu":
        return turns.host_peak()
    if competitor.startswith("open_clip"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30


def report(workers: list[turns.Worker], batch: int):
    base = workers[0]
    print(
        f"| | speed over {base.competitor} | s/step | fastest - slowest | images/s | peak GiB "
        "| start, s | M parameters | loss |\n|---|---|---|---|---|---|---|---|---|"
    )
    for worker in workers:
        print(
            f"| {worker.competitor} | {base.seconds / worker.seconds:.2f} | {worker.seconds:.3g} "
            f"| {worker.spread} | {batch / worker.seconds:,.1f} "
            f"| {worker.steps[-1]['peak']:.1f} | {worker.ready['start']:.0f} "
            f"| {worker.ready['parameters'] / 1e6:.1f} | {worker.losses} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32")
    parser.add_argument("--batch", type=int, help="pairs per step; default 32, small: 256")
    parser.add_argument("--device", choices=turns.PLATFORMS, default="cpu")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each competitor")
    parser.add_argument("--big_vision", help="checkout of google-research/big_vision")
    parser.add_argument("--only", help=f"comma-separated, of: {', '.join(COMPETITORS)}")
    parser.add_argument("--verbose", action="store_true", help="show what the competitors print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return turns.work(
            lambda: prepare(args.worker, args), lambda: peak(args.worker, args.device)
        )

    chosen = args.only.split(",") if args.only else list(COMPETITORS)
    if unknown := set(chosen) - set(COMPETITORS):
        parser.error(f"no {', '.join(unknown)}; choose of: {', '.join(COMPETITORS)}")
    if not args.big_vision:
        chosen = [name for name in chosen if name != "big_vision"]
    if args.device == "cpu" and not args.only:  # open_clip would take minutes to compile there
        chosen = [name for name in chosen if name not in ON_GPU]
    workers = turns.take_turns(__file__, chosen, args.steps, args.device)
    batch = args.batch or MODELS[args.model][2]
    packages = turns.versions("jax", "flax", "optax", "torch", "open_clip_torch")
    dtype = "bfloat16" if args.device == "gpu" else "float32"
    print(f"{args.model}, batch {batch}, {dtype}; medians of {args.steps} steps\n{packages}\n")
    report(workers, batch)
    return None


if __name__ == "__main__":
    main()
