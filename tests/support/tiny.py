"""Models and runs so small that a test can train them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax import losses, models, optim, sharding
from clip_jax import state as train_state
from clip_jax.common import clock
from clip_jax.configs import default
from clip_jax.training import objectives
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
    """The paper's optimiser, without a warm-up."""
    settings = optim_settings(learning_rate=LEARNING_RATE, **overrides)
    return optim.make_optimizer(make_schedule(settings, STEPS), settings, seed=0)


def optim_settings(**overrides):
    """The default settings of the optimiser, without a warm-up, with changes."""
    settings = default.get_config().optim
    settings.update(warmup="0 steps", **overrides)
    return settings


def make_schedule(settings, total: int):
    """The schedule of a run whose durations are in steps."""
    to_steps = functools.partial(
        clock.to_steps, batch_size=1, examples_per_epoch=1, total_steps=total
    )
    return optim.make_schedule(settings, to_steps, total)


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


def compile_step(net, mesh: Mesh, state, batch, **settings):
    """The training step for these arrays, with the settings of `make_step`."""
    return train_step.lower_step(make_step(net, mesh, **settings), state, batch, mesh).compile()


def make_step(net, mesh: Mesh, *, method="all_gather", optim=None, **overrides):
    """The training step, a function of state and batch, with the optimiser of `make_optimizer`."""
    settings = {
        "optimizer": make_optimizer(**(optim or {})),
        "loss_fn": contrastive(functools.partial(losses.softmax_loss, mesh=mesh, method=method)),
        "augment": lambda images, key: {"image": images},
        "accum_steps": 1,
        "zero1": False,
        "seed": 0,
        "max_logit_scale": 100.0,
        "skip_above": None,
        **overrides,
    }
    return functools.partial(train_step.train_step, net=net, **settings)


def contrastive(loss) -> train_step.Objective:
    """Makes a loss of pairs the whole objective."""
    return objectives.weighted_sum(contrastive=(1.0, objectives.of_pairs(loss)))


def init_state(
    net: models.ImageModel, mesh: Mesh, *, zero1=False, **optim
) -> train_state.TrainState:
    """Initialises a state, equal on every mesh."""
    optimizer = make_optimizer(**optim)
    like = train_state.abstract_state(net, optimizer, mesh, zero1=zero1)
    return train_state.init_state(like, net, optimizer, 0)


def copy(state: train_state.TrainState) -> train_state.TrainState:
    """Copies a state, for a step that donates it."""
    return jax.tree.map(jnp.copy, state)


def named_leaves(tree) -> dict[str, np.ndarray]:
    return {sharding.path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def put_batch(net: models.ImageModel, mesh: Mesh, captions: int = 1) -> dict[str, jax.Array]:
    return jax.device_put(make_batch(net, captions=captions), sharding.batch_sharding(mesh))
