"""The operations that a model needs: formulas against traced programs and published counts."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_plan import TINY, jaxpr_flops, unread_flops

from clip_jax import models
from clip_jax.models import flops as model_flops
from clip_jax.models.sizes import SIZES


def traced_flops(name: str, overrides: dict) -> float:
    """Counts the forward pass of one pair as JAX traces it."""
    net = models.create(name, size=overrides)
    size = net.size
    images = np.zeros((1, size.image_size, size.image_size, 3), np.uint8)
    if size.objective == "near_duplicates":
        images = np.stack([images, images], axis=1)
    tokens = np.ones((1, size.context_length), np.int32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images, tokens)
    traced = jax.make_jaxpr(lambda v: net.apply(v, images, tokens))(variables)
    return jaxpr_flops(traced.jaxpr)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ViT-B/32", TINY),
        ("ViT-B/32", {"image_layers": (2,), "text_layers": 1}),
        ("ViT-B/32", {**TINY, "image_pool": "map", "text_pool": "last", "text_mlp": 48}),
        ("ViT-B/32", {**TINY, "image_pool": "avg", "image_registers": 2}),
        ("ViT-B/32", {**TINY, "image_pool": "map", "text_pool": "map", "activation": "swiglu"}),
        ("ViT-B/32", {**TINY, "text_projection": False, "embed_dim": TINY["text_width"]}),
        ("RN50", {"image_layers": (1, 2, 1, 1), "text_layers": 1, "image_size": 64}),
        ("ViT-B/32", {**TINY, "text_pool": "bag", "text_layers": 0}),
        ("ViT-B/32", {**TINY, "objective": "bag_of_words"}),
        ("ViT-B/32", {**TINY, "objective": "captioning", "context_length": 17}),
        ("ViT-B/32", {**TINY, "objective": "near_duplicates"}),
        ("ViT-B/32", {**TINY, "context_length": 17, "text_decoder_layers": 3}),
        (
            "ViT-B/32",
            {**TINY, "context_length": 17, "text_decoder_layers": 1, "text_decoder_shared": True},
        ),
    ],
)
def test_model_flops(name, overrides):
    """The formulas agree with the products and convolutions that JAX traces."""
    size = models.create(name, size=overrides).size
    found = model_flops.image_flops(size) + model_flops.text_flops(size)
    traced = traced_flops(name, overrides) + unread_flops(size)
    assert found == pytest.approx(traced, rel=1e-9)


def test_views_cost_two_more_images_and_their_heads():
    net = models.create("ViT-B/32", size={**TINY, "views_mlp": 24, "views_embed": 8})
    image = np.zeros((1, 16, 16, 3), np.uint8)
    tokens = np.ones((1, 8), np.int32)
    batch = {"image": image, "tokens": tokens, "views": np.stack([image, image], axis=1)}
    variables = jax.eval_shape(net.init, jax.random.key(0), image, tokens)
    traced = jax.make_jaxpr(lambda v: net.apply(v, batch, method="outputs"))(variables)
    # What no program executes of an image, of three of them; the views' projection is not read.
    text = unread_flops(dataclasses.replace(net.size, image_pool="avg", image_registers=1))
    unread = text + 3 * (unread_flops(net.size) - text)
    found = model_flops.pair_flops(net.size, captions=1)
    assert found == pytest.approx(jaxpr_flops(traced.jaxpr) + unread, rel=1e-9)


# Counts of one image and one caption in open_clip's docs/model_profile.csv; for a ResNet it counts
# normalisation and pooling as well.
@pytest.mark.parametrize(
    ("name", "image", "text", "tolerance"),
    [
        ("ViT-B/32", 8.82, 5.96, 0.001),
        ("ViT-B/16", 35.13, 5.96, 0.001),
        ("ViT-L/14", 162.03, 13.3, 0.001),
        ("ViT-L/14@336px", 381.92, 13.3, 0.001),
        ("RN50", 12.22, 5.96, 0.06),
        ("RN50x4", 42.56, 9.27, 0.06),
    ],
)
def test_model_flops_of_known_models(name, image, text, tolerance):
    size = SIZES[name]
    assert model_flops.image_flops(size) / 1e9 == pytest.approx(image, rel=tolerance)
    assert model_flops.text_flops(size) / 1e9 == pytest.approx(text, rel=0.001)


def test_every_further_caption_costs_its_text_and_its_logits():
    size = SIZES["ViT-B/32"]
    one, two = (model_flops.step_flops(size, 64, captions) for captions in (1, 2))
    text = model_flops.text_flops(size) + 2 * 64 * size.embed_dim
    assert two - one == pytest.approx(3 * 64 * text)
