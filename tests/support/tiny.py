"""Models and runs so small that a test can train them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax import losses, models, optim, sharding
from clip_jax import state as train_state
from clip_jax.configs import default
from clip_jax.training import step as train_step

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
_RESNET = {"image_size": 32, "image_layers": (1, 1, 1, 1), "image_width": 8, "image_heads": 4}
DECAY_PARAMS = default.get_config().optim.decay_params
BATCH = 16
LEARNING_RATE, STEPS = 1e-3, 100


def make_net(name: str, size: dict | None = None, **settings) -> models.ImageModel:
    """ "vit" or "resnet"; `size`: overrides of its shapes."""
    if name == "vit":
        return models.create("ViT-B/32", size=_TEXT | _VIT | (size or {}), **settings)
    return models.create("RN50", size=_TEXT | _RESNET | (size or {}), **settings)


def make_mesh(*axes: int) -> Mesh:
    """Over the first devices: data, fsdp and, where given, tensor and slices."""
    return sharding.make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])


def make_optimizer(**overrides):
    """A schedule without warm-up, and the paper's optimiser."""
    schedule = optim.make_schedule(LEARNING_RATE, 0, STEPS)
    settings = {"b1": 0.9, "b2": 0.98, "eps": 1e-6, "weight_decay": 0.2, "grad_clip_norm": 0.0}
    settings |= {"decay_params": DECAY_PARAMS, "moment_dtype": "float32", "seed": 0, **overrides}
    return schedule, optim.make_optimizer(schedule, **settings)


def make_batch(net: models.ImageModel, seed: int = 0, captions: int = 1) -> dict[str, np.ndarray]:
    """Noise as images, and captions of different lengths."""
    size, rng = net.size, np.random.default_rng(seed)
    shape = (BATCH, *[captions] * (captions > 1))
    tokens = rng.integers(1, size.vocab_size - 2, (*shape, size.context_length)).astype(np.int32)
    lengths = rng.integers(3, size.context_length + 1, (*shape, 1))
    places = np.arange(size.context_length)
    tokens = np.where(places < lengths, tokens, 0)
    tokens[..., 0] = size.vocab_size - 2
    tokens = np.where(places == lengths - 1, size.vocab_size - 1, tokens).astype(np.int32)
    # Low frequencies, or a convolution would average all images to the same grey.
    coarse = rng.integers(0, 256, (BATCH, 4, 4, 3), np.uint8)
    repeat = size.image_size // 4
    return {"image": coarse.repeat(repeat, axis=1).repeat(repeat, axis=2), "tokens": tokens}


def compile_step(
    net, mesh: Mesh, state, batch, *, moment_dtype="float32", method="all_gather", **overrides
):
    """The training step for these arrays, with the optimiser of `make_optimizer`."""
    schedule, tx = make_optimizer(moment_dtype=moment_dtype)
    settings = {
        "tx": tx,
        "loss_fn": functools.partial(losses.softmax_loss, mesh=mesh, method=method),
        "augment": lambda images, key: images,
        "accum_steps": 1,
        "zero1": False,
        "seed": 0,
        "max_logit_scale": 100.0,
        "skip_above": None,
        **overrides,
    }
    step = functools.partial(train_step.train_step, net=net, schedule=schedule, **settings)
    return train_step.lower_step(step, state, batch, mesh).compile()


def init_state(
    net: models.ImageModel, mesh: Mesh, *, zero1=False, bf16_params="", moment_dtype="float32"
) -> train_state.TrainState:
    """Initialises a state, equal on every mesh."""
    _, tx = make_optimizer(moment_dtype=moment_dtype)
    like = train_state.abstract_state(net, tx, mesh, zero1=zero1, bf16_params=bf16_params)
    return train_state.init_state(like, net, tx, 0, bf16_params=bf16_params)


def copy(state: train_state.TrainState) -> train_state.TrainState:
    """Copies a state, for a step that donates it."""
    return jax.tree.map(jnp.copy, state)


def named_leaves(tree) -> dict[str, np.ndarray]:
    return {sharding.path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def put_batch(net: models.ImageModel, mesh: Mesh, captions: int = 1) -> dict[str, jax.Array]:
    return jax.device_put(make_batch(net, captions=captions), sharding.batch_sharding(mesh))
