"""Models and runs so small that a test can train them."""

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import losses, models, optim, sharding
from clip_jax import state as train_state
from clip_jax import step as train_step

_TEXT = {
    "text_width": 32,
    "text_heads": 4,
    "text_layers": 2,
    "context_length": 8,
    "vocab_size": 64,
    "embed_dim": 16,
}
_VIT = {
    "image_size": 16,
    "image_layers": (2,),
    "image_width": 32,
    "image_heads": 4,
    "patch_size": 8,
}
_RESNET = {"image_size": 64, "image_layers": (1, 1, 1, 1), "image_width": 8, "image_heads": 4}
BATCH = 16


def make_net(name: str) -> models.CLIP:
    """ "vit" or "resnet"."""
    if name == "vit":
        return models.create("ViT-B/32", size=_TEXT | _VIT)
    return models.create("RN50", size=_TEXT | _RESNET)


def make_mesh(data: int, fsdp: int) -> Mesh:
    """Over the first data * fsdp devices."""
    return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


def make_optimizer(learning_rate: float = 1e-3, total: int = 100, **overrides):
    """The schedule and an optimiser with the paper's settings."""
    schedule = optim.make_schedule(learning_rate, 0, total)
    settings = {"b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.2, "grad_clip_norm": 0.0}
    return schedule, optim.make_optimizer(schedule, **settings | overrides)


def make_batch(net: models.CLIP, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise as images, and captions of different lengths."""
    size, rng = net.size, np.random.default_rng(seed)
    tokens = rng.integers(1, size.vocab_size - 2, (BATCH, size.context_length)).astype(np.int32)
    lengths = rng.integers(3, size.context_length + 1, (BATCH, 1))
    places = np.arange(size.context_length)[None]
    tokens = np.where(places < lengths, tokens, 0)
    tokens[:, 0] = size.vocab_size - 2
    tokens = np.where(places == lengths - 1, size.vocab_size - 1, tokens).astype(np.int32)
    # Low frequencies, or a convolution would average all images to the same grey.
    coarse = rng.integers(0, 256, (BATCH, 4, 4, 3), np.uint8)
    repeat = size.image_size // 4
    return {"image": coarse.repeat(repeat, axis=1).repeat(repeat, axis=2), "tokens": tokens}


def compile_step(net, tx, schedule, mesh, state, batch, max_logit_scale: float = 100.0):
    """The training step for these arrays."""
    return train_step.compile_step(
        state,
        batch,
        mesh=mesh,
        net=net,
        tx=tx,
        schedule=schedule,
        loss_method="all_gather",
        max_logit_scale=max_logit_scale,
    )


def train(net, mesh: Mesh, steps: int, **settings):
    """Takes steps on one batch; returns the last state and the metrics of each step."""
    schedule, tx = make_optimizer(**settings)
    state = train_state.init_state(net, tx, mesh, seed=0)
    batch = jax.device_put(make_batch(net), sharding.batch_sharding(mesh))
    step = compile_step(net, tx, schedule, mesh, state, batch)
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def plain_loss(net: models.CLIP, variables, batch, train: bool = True):
    """What a step minimises, on one device, without anything of clip_jax.step."""
    embeds, _ = net.apply(
        variables, batch["image"], batch["tokens"], train=train, mutable=["batch_stats"]
    )
    return losses.softmax_loss(*embeds, mesh=None)
