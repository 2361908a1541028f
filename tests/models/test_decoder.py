"""The decoder that writes captions beside a contrastive model, in both of its forms."""

import functools

import jax
import numpy as np
import numpy_models
import pytest
import tiny

from clip_jax import models
from clip_jax.errors import UserError

FORMS = {
    "coca": {"text_decoder_layers": 3},
    # Two layers of the text tower, the first of which looks at the image when it writes.
    "mammut": {
        "text_decoder_layers": 1,
        "text_decoder_shared": True,
        "text_causal": False,
        "text_pool": "avg",
        "image_pool": "avg",
        "end_token": 62,  # which is not the largest id: make_batch begins captions by 62
        "activation": "gelu",
    },
}
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def model(form: str):
    """Returns a model with random numbers in all parameters, biases too."""
    net = tiny.make_net("vit", FORMS[form])
    batch = tiny.make_batch(net, captions=2)
    if form == "mammut":  # exchange start and end token
        tokens = batch["tokens"]
        batch["tokens"] = np.where(tokens >= 62, 125 - tokens, tokens).astype(np.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), batch["image"], batch["tokens"])
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: np.float32(  # noqa: E731
        (path[-1].key == "scale") + rng.normal(size=leaf.shape) / 5
    )
    return net, jax.tree_util.tree_map_with_path(draw, shapes), batch


def cross(x, image, p, activation: str):
    y = numpy_models.layer_norm(x, p["ln_1"])
    seen = numpy_models.layer_norm(image, p["ln_image"])
    kernel, bias = p["qkv"]["kernel"], p["qkv"]["bias"]
    q, k, v = (
        np.einsum("bsw,whd->bhsd", tokens, kernel[:, i]) + bias[i][:, None]
        for i, tokens in enumerate((y, seen, seen))
    )
    weights = numpy_models.softmax(np.einsum("bhsd,bhtd->bhst", q, k) / np.sqrt(q.shape[-1]))
    y = np.einsum("bhst,bhtd->bshd", weights, v)
    x = x + np.einsum("bshd,hdw->bsw", y, p["attn_out"]["kernel"]) + p["attn_out"]["bias"]
    return x + numpy_models.mlp(numpy_models.layer_norm(x, p["ln_2"]), p, activation)


def written(x, image, transformer, activation: str):
    """Runs causal layers, each followed by a look at the image while there are such blocks."""
    own, looks = transformer["blocks"], transformer["cross"]["blocks"]
    for layer in range(len(own["ln_1"]["scale"])):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], own)
        x = numpy_models.block(x, one, causal=True, activation=activation)
        if layer < len(looks["ln_1"]["scale"]):
            one = jax.tree.map(lambda leaf, i=layer: leaf[i], looks)
            x = cross(x, image, one, activation)
    return x


@pytest.mark.parametrize("form", FORMS)
def test_outputs_equal_numpy(form: str):
    net, variables, batch = model(form)
    size = net.size
    found = jax.jit(functools.partial(net.apply, method="outputs"))(variables, batch)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    image = numpy_models.vit_tokens(batch["image"], p["image"], 8, activation=size.activation)
    read = image @ p["decoder"]["image_projection"]["kernel"]
    text = p["text"]
    nats, counts = np.zeros(tiny.BATCH), np.zeros(tiny.BATCH)
    for caption in range(2):
        tokens = batch["tokens"][:, caption]
        x = text["token_embed"]["embedding"][tokens] + text["positions"]
        if form == "coca":
            x = numpy_models.transformer(x, text["transformer"]["blocks"], causal=True)
            x = written(x, read, p["decoder"]["transformer"], size.activation)
            x = numpy_models.layer_norm(x, p["decoder"]["ln_final"])
        else:
            x = written(x, read, text["transformer"], size.activation)
            x = numpy_models.layer_norm(x, text["ln_final"])
        chances = np.log(numpy_models.softmax(x @ p["decoder"]["output_embedding"].T))
        for row, ids in enumerate(tokens):
            end = list(ids).index(63 if form == "coca" else 62)
            nats[row] -= sum(chances[row, place, ids[place + 1]] for place in range(end))
            counts[row] += end
    np.testing.assert_allclose(found["nats"], nats, **EXACT)
    np.testing.assert_array_equal(found["predicted"], counts)
    assert np.std(nats / counts) > 0.05
    first = batch["tokens"][:, 0]
    if form == "coca":
        embeds = numpy_models.vit(batch["image"], p["image"], 8), numpy_models.text(first, text)
    else:
        patches = numpy_models.layer_norm(image, p["image"]["ln_post"]).mean(axis=1)
        pictures = numpy_models.unit(patches @ p["image"]["projection"]["kernel"])
        embeds = pictures, numpy_models.pooled_text(first, text, net.size)
    np.testing.assert_allclose(found["image"], embeds[0], **EXACT)
    np.testing.assert_allclose(found["text"][:, 0], embeds[1], **EXACT)
    called = jax.eval_shape(net.apply, variables, batch["image"], batch["tokens"])
    assert len(called) == 3


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"text_decoder_shared": True}, "no layer attends to the image"),
        ({"text_decoder_layers": 2, "objective": "captioning"}, "contrastive objective"),
        ({"text_decoder_layers": 2, "text_causal": False}, "from itself.*text_causal=True"),
        ({"text_decoder_layers": 2, "text_pool": "bag", "text_layers": 0}, "a bag of words"),
        (
            {"text_decoder_layers": 5, "text_decoder_shared": True},
            r"takes a divisor of text_layers \(12\)",
        ),
        ({"text_decoder_layers": -1}, "whole numbers, 0 or more"),
    ],
)
def test_decoders_that_there_are_not(size: dict, message: str):
    with pytest.raises(UserError, match=message):
        models.create("ViT-B/32", size=size)


def test_neither_resnets_nor_packed_captions_are_written_from():
    with pytest.raises(UserError, match="the image tower is a ResNet"):
        models.create("RN50", size={"text_decoder_layers": 2})
    with pytest.raises(UserError, match=r"--config\.model\.packing\.length=0"):
        models.create(
            "ViT-B/32", size={"text_decoder_layers": 2}, packing={"length": 80, "rows": 0.3}
        )


def test_a_size_with_a_decoder_says_so():
    size = models.get_size("ViT-B/32", {"text_decoder_layers": 12})
    assert str(size) == "ViT-B/32 (decoder 12 layers)"
