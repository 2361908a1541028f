"""Attention with a token apart against NumPy, and where the image tower makes use of it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_models
import pytest

from clip_jax import models
from clip_jax.models.attention import attend, attend_with_token

HEADS, D = 3, 8


def draw(shape: tuple[int, ...], size: float) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(size * rng.normal(size=shape), jnp.float32) for _ in range(3))


def apart(heads):
    """Splits each of the arrays [b, 1 + s, ...] into what follows the first token, and that."""
    return tuple(x[:, 1:] for x in heads), tuple(x[:, 0] for x in heads)


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["soft", "nearly hard"])
def test_a_token_apart_changes_nothing(size: float):
    """Against NumPy in float64; at the larger size a few logits lead by hundreds."""
    q, k, v = draw((2, 1 + 7, HEADS, D), size)
    logits = np.einsum("bqhd,bkhd->bhqk", np.asarray(q, np.float64), k) / np.sqrt(D)
    want = np.einsum("bhqk,bkhd->bqhd", numpy_models.softmax(logits), v)
    sequence, token = attend_with_token(*apart((q, k, v)))
    got = np.concatenate([token[:, None], sequence], axis=1)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=3e-5 * size)
    np.testing.assert_allclose(attend((q, k, v)), want, rtol=2e-4, atol=3e-5 * size)


@pytest.mark.slow
def test_gradients_of_a_token_apart():
    heads = draw((2, 1 + 7, HEADS, D), 1.0)
    weights = draw((2, 1 + 7, HEADS, D), 1.0)[2]

    def together(heads):
        return jnp.sum(attend(heads) * weights)

    def split(heads):
        sequence, token = attend_with_token(*apart(heads))
        return jnp.sum(sequence * weights[:, 1:]) + jnp.sum(token * weights[:, 0])

    for got, want in zip(jax.grad(split)(heads), jax.grad(together)(heads)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_its_dtype_and_is_near():
    heads = draw((2, 1 + 7, HEADS, D), 1.0)
    sequence, token = attend_with_token(*apart([jnp.asarray(x, jnp.bfloat16) for x in heads]))
    assert sequence.dtype == token.dtype == jnp.bfloat16
    want = attend(heads)
    np.testing.assert_allclose(np.float32(sequence), want[:, 1:], atol=0.05)
    np.testing.assert_allclose(np.float32(token), want[:, 0], atol=0.05)


SIZE = {
    "embed_dim": 8,
    "image_layers": (2,),
    "image_width": 32,
    "image_heads": 4,
    "text_layers": 1,
    "text_width": 16,
    "text_heads": 2,
    "context_length": 8,
    "vocab_size": 16,
}


@pytest.mark.parametrize(
    ("image_size", "patch_size", "expected"),
    [(32, 2, True), (28, 2, False), (24, 1, False)],
    ids=["256 patches", "196 patches", "576 patches"],
)
@pytest.mark.slow
def test_vit_with_the_class_token_apart_equals_numpy(image_size, patch_size, expected):
    size = {**SIZE, "image_size": image_size, "patch_size": patch_size}
    net = models.create("ViT-B/32", size=size)
    images = np.random.default_rng(1).integers(0, 256, (2, image_size, image_size, 3), np.uint8)
    tokens = np.ones((2, 8), np.int32)
    variables = jax.jit(net.init)(jax.random.key(0), images, tokens)
    encode = jax.jit(lambda v, x: net.apply(v, x, method="encode_image"))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"]["image"])
    want = numpy_models.vit(images, p, patch_size)
    np.testing.assert_allclose(encode(variables, images), want, rtol=1e-4, atol=1e-5)
    text = str(jax.make_jaxpr(encode)(variables, images))
    patches = (image_size // patch_size) ** 2
    assert (f"f32[2,4,{patches},{patches}]" in text) == expected
