"""model.remat on a ResNet: the same numbers, fewer of them kept. Transformers: test_models.py."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from clip_jax import models
from clip_jax.errors import UserError

SIZE = {"image_layers": (1, 1, 2, 1)}  # enough to see, and soon compiled
IMAGES = tiny.make_batch(tiny.make_net("resnet"))["image"]


def make_net(remat: str) -> models.ImageModel:
    return tiny.make_net("resnet", SIZE, remat=remat)


def abstract(net: models.ImageModel) -> dict:
    return jax.eval_shape(lambda key: net.init(key, IMAGES, method="encode_image"), KEY)


KEY = jax.random.key(0)


def loss_and_statistics(net: models.ImageModel, params: dict, statistics: dict):
    variables = {"params": params, "batch_stats": statistics}
    embeds, updated = net.apply(
        variables, IMAGES, train=True, mutable=["batch_stats"], method="encode_image"
    )
    weights = np.random.default_rng(0).normal(size=embeds.shape)
    return jnp.sum(embeds * weights), updated


@pytest.mark.slow
def test_the_same_numbers():
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(  # no gain is zero, so no block does nothing
        lambda leaf: np.float32(rng.uniform(0.1, 0.4, leaf.shape)), abstract(make_net("none"))
    )
    results = []
    for remat in ("none", "full"):
        net = make_net(remat)
        assert jax.tree.structure(abstract(net)) == jax.tree.structure(drawn)
        step = jax.value_and_grad(functools.partial(loss_and_statistics, net), has_aux=True)
        compiled = jax.jit(step)
        results.append(compiled(drawn["params"], drawn["batch_stats"]))
    plain, again = results
    for wanted, found in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    statistics = plain[0][1]["batch_stats"]
    for before, after in zip(jax.tree.leaves(drawn["batch_stats"]), jax.tree.leaves(statistics)):
        assert np.abs(after - before).max() > 1e-3


@functools.cache
def kept(remat: str) -> list[tuple[int, ...]]:
    """Shapes of what the forward pass keeps for the backward."""
    net = make_net(remat)
    shapes = abstract(net)

    def forward(params, statistics):
        return jax.vjp(lambda p: loss_and_statistics(net, p, statistics)[0], params)[1]

    backward = jax.eval_shape(forward, shapes["params"], shapes["batch_stats"])
    return [leaf.shape for leaf in jax.tree.leaves(backward)]


def test_less_is_kept():
    none, dots, full = (
        sum(map(math.prod, kept(name))) for name in ("none", "dots_saveable", "full")
    )
    assert full < dots < none
    assert full < none / 3
    # Of the stem, whose maps are the largest, only the images are kept.
    half = (16, 16)
    assert any(shape[1:3] == half for shape in kept("none"))
    assert not any(shape[1:3] == half for shape in kept("full"))


def test_unknown_name():
    with pytest.raises(UserError, match=r"'some'.*dots_saveable"):
        abstract(make_net("some"))
