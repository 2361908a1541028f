"""Variations of larger models and recipes: forms of the towers, logit_bias, patch dropout."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_models
import pytest
from test_models import (
    EXACT,
    TINY_RESNET,
    TINY_VIT,
    apply,
    assert_trees_close,
    float64,
    make_batch,
    make_variables,
)

from clip_jax import choices, models, sharding
from clip_jax.errors import UserError
from clip_jax.models import layers, size_checks, sizes, vit

# As wide as its embeddings, so without a projection; other hidden units than four times the width.
TINY_SIGLIP = TINY_VIT | {"image_width": 12, "image_heads": 2, "image_mlp": 20, "text_mlp": 28}
TINY_SIGLIP |= {"image_mean": sizes.IMAGE_MEAN, "image_std": sizes.IMAGE_STD}  # the reference's


# ---- Forms of the towers -----------------------------------------------------------------------


@pytest.mark.parametrize("image_width", [12, 16])
def test_siglip_equals_numpy(image_width: int):
    """A head wider than the embeddings is projected."""
    net = models.create("SigLIP-B/16", size=TINY_SIGLIP | {"image_width": image_width})
    variables, (images, tokens) = make_variables(net), make_batch(net.size)
    image, text, logit_scale, logit_bias = apply(net, variables, images, tokens)
    p = float64(variables["params"])
    assert ("projection" in p["image"]) == (image_width == 16)
    assert "class_token" not in p["image"]
    assert "ln_pre" not in p["image"]
    np.testing.assert_allclose(image, numpy_models.siglip_vit(images, p["image"], 4), **EXACT)
    np.testing.assert_allclose(text, numpy_models.siglip_text(tokens, p["text"]), **EXACT)
    assert logit_scale == variables["params"]["logit_scale"]
    assert logit_bias == variables["params"]["logit_bias"]


CLIPA = {"activation": "gelu", "pre_norm": False, "image_pool": "avg", "image_registers": 1}
CLIPA |= {"text_pool": "last", "text_causal": False, "norm_after_pool": True}
PE = {"image_pool": "map", "norm_after_pool": False, "image_rope": True, "map_heads": 2}
PE |= {"map_mlp": 40, "image_projection_bias": True, "pre_norm": True}
POOLS = [
    {},
    {"norm_after_pool": False, "image_positions": "sincos", "text_pool": "first"},
    {"image_registers": 0, "text_pool": "avg", "pre_norm": True},
    {"image_registers": 3, "image_positions": "sincos"},
    {"image_pool": "map", "norm_after_pool": False},
    {"image_pool": "class", "norm_after_pool": False, "image_registers": 2},
    {"text_width": 16, "text_heads": 2, "embed_dim": 16, "text_projection": False},
    {"image_layer_scale": 0.1, "image_qk_norm": True, "text_qk_norm": True},
    PE | {"image_qk_norm": True},
    PE | {"image_registers": 0, "map_heads": 3, "embed_dim": 24, "map_projection": True},
    PE | {"image_registers": 2, "image_pool": "class", "map_heads": None, "map_mlp": None},
    {"activation": "swiglu", "norm": "rms", "text_qk_norm": True, "text_pool": "map"},
    PE | {"text_activation": "swiglu", "text_pool": "map", "text_mlp": 20, "norm": "rms"},
]


@pytest.mark.parametrize("forms", POOLS)
def test_pools_and_positions_equal_numpy(forms: dict):
    net = models.create("ViT-B/32", size=TINY_VIT | CLIPA | forms)
    variables, (images, tokens) = make_variables(net), make_batch(net.size)
    image, text, _ = apply(net, variables, images, tokens)
    p = float64(variables["params"])
    assert ("positions" in p["image"]) == (net.size.image_positions == "learned")
    assert ("ln_pre" in p["image"]) == net.size.pre_norm
    assert ("projection" in p["text"]) == net.size.text_projection
    np.testing.assert_allclose(
        image, numpy_models.pooled_vit(images, p["image"], net.size), **EXACT
    )
    wanted = numpy_models.pooled_text(tokens, p["text"], net.size)
    np.testing.assert_allclose(text, wanted, **EXACT)


@pytest.mark.parametrize("forms", [{"image_positions": "sincos"}, PE, {"image_qk_norm": True}])
def test_a_token_apart_that_is_not_read(forms: dict):
    """256 patches and a class token: the token stands apart, and the mean is of the patches."""
    forms = {"image_size": 64, "patch_size": 4, **forms}
    net = models.create("ViT-B/32", size=TINY_VIT | CLIPA | forms)
    variables, (images, tokens) = make_variables(net), make_batch(net.size)
    image, *_ = apply(net, variables, images, tokens)
    p = float64(variables["params"])
    np.testing.assert_allclose(
        image, numpy_models.pooled_vit(images, p["image"], net.size), **EXACT
    )


def test_exact_gelu_equals_numpy():
    net = models.create("ViT-g/14", size=TINY_VIT | {"image_mlp": 20, "text_layers": 2})
    variables, (images, tokens) = make_variables(net), make_batch(net.size)
    image, text, _ = apply(net, variables, images, tokens)
    p = float64(variables["params"])
    assert p["image"]["transformer"]["blocks"]["mlp_in"]["kernel"].shape == (2, 24, 20)
    form = {"activation": "gelu"}
    np.testing.assert_allclose(image, numpy_models.vit(images, p["image"], 4, **form), **EXACT)
    np.testing.assert_allclose(text, numpy_models.text(tokens, p["text"], **form), **EXACT)


def test_every_activation_is_there():
    assert set(layers.ACTIVATIONS) == set(size_checks.CHOICES["activation"])
    for name in set(layers.ACTIVATIONS) - set(choices.GATED):  # those need two halves
        function = layers.ACTIVATIONS[name]
        x = np.linspace(-6, 6, 101)
        wanted = numpy_models.ACTIVATIONS[name](x)
        np.testing.assert_allclose(function(x.astype(np.float32)), wanted, atol=2e-6)


@pytest.mark.slow
def test_where_sigmoid_models_start():
    """ln 10 and -10; the paper's temperature without a bias."""
    size = TINY_VIT | {"logit_bias": True}
    for net, scale, bias in (
        (models.create("ViT-B/32", size=size), 10, -10),
        (models.create("SigLIP-B/16", size=TINY_SIGLIP), 10, -10),
        (models.create("SigLIP-B/16", size=TINY_SIGLIP | {"logit_bias": False}), 1 / 0.07, None),
    ):
        params = jax.jit(net.init)(jax.random.key(0), *make_batch(net.size, 1))["params"]
        assert float(params["logit_scale"]) == pytest.approx(math.log(scale))
        assert params.get("logit_bias") == bias


# ---- Sizes -------------------------------------------------------------------------------------


def test_hidden_units_follow_the_width():
    assert models.get_size("ViT-B/32").image_mlp == 4 * 768
    assert models.get_size("ViT-g/14").image_mlp == 6144
    assert models.get_size("ViT-g/14", {"image_width": 64, "image_heads": 4}).image_mlp == 256
    changed = models.get_size("ViT-B/32", {"text_width": 64, "text_heads": 4, "text_mlp": 100})
    assert (changed.text_mlp, changed.image_mlp) == (100, 4 * 768)
    gated = models.get_size("ViT-g/14", {"text_activation": "swiglu"})
    assert (gated.text_mlp, gated.image_mlp) == (2736, 6144)
    gated = models.get_size("ViT-B/32", {"activation": "swiglu", "image_width": 1536})
    assert (gated.text_mlp, gated.image_mlp) == (1368, 4096)  # as DINOv2 g


@pytest.mark.parametrize("name", models.available_models())
def test_sizes_survive_json(name: str):
    size = models.get_size(name)
    assert models.Size.from_json(json.loads(json.dumps(dataclasses.asdict(size)))) == size
    assert str(size) == name


def test_sizes_of_old_checkpoints():
    """Stored before there were other forms than the paper's."""
    fields = ("embed_dim", "image_size", "image_layers", "image_width", "image_heads", "patch_size")
    fields += ("text_width", "text_heads", "text_layers", "context_length", "vocab_size")
    for name in ("ViT-B/32", "RN50"):
        size = models.get_size(name)
        assert models.Size.from_json({key: getattr(size, key) for key in fields}) == size


def test_a_model_with_another_loss_keeps_its_name():
    assert str(models.get_size("ViT-B/32", {"logit_bias": True})) == "ViT-B/32"
    assert str(models.get_size("SigLIP-B/16", {"logit_bias": False})) == "SigLIP-B/16"
    assert str(models.get_size("ViT-B/32", {"activation": "gelu"})).startswith("ViT/32 of 12")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"activation": "relu"}, r"activation is 'relu'.*quick_gelu, gelu, gelu_tanh, swiglu"),
        ({"image_pool": "mean"}, r"image_pool is 'mean'.*class, avg, map"),
        ({"norm_after_pool": True}, r"norm_after_pool is True.*image_pool='avg'"),
        ({"image_positions": "rope"}, r"image_positions is 'rope'.*learned, sincos"),
        (
            {"image_positions": "sincos", "image_width": 770, "image_heads": 1},
            r"770.*multiple of 4",
        ),
        ({"image_rope": True, "image_heads": 128}, r"image_heads is 128, of 6 .*multiple of 4"),
        ({"map_heads": 8}, r"map_heads is 8.*image_pool='map'"),
        ({"image_pool": "map", "map_heads": 7}, r"768.*multiple of map_heads \(7\)"),
        (
            {"image_pool": "map", "embed_dim": 768, "image_projection_bias": True},
            r"768.*map_projection=True",
        ),
        ({"image_registers": 14}, r"image_registers is 14.*14 at most"),
        ({"text_pool": "mean"}, r"text_pool is 'mean'.*end, first, last, avg, map"),
        ({"text_pool": "first"}, r"text_pool is 'first'.*text_causal=False"),
        ({"text_projection": False, "embed_dim": 64}, r"text_projection is False.*512.*64"),
        ({"text_causal": 1}, r"text_causal is 1: it takes True or False"),
        ({"norm_eps": 0.0}, r"norm_eps is 0.0.*positive"),
        ({"image_mlp": -1}, r"image_mlp is -1.*0 or more"),
    ],
)
def test_impossible_forms(size: dict, message: str):
    with pytest.raises(UserError, match=message):
        models.create("ViT-B/32", size=size)


# ---- Patch dropout -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "kept"), [(0.25, 12), (0.5, 8), (0.6, 6), (0.99, 1)])
@pytest.mark.parametrize("tokens", [0, 1])
def test_kept_patches(tokens: int, dropout: float, kept: int):
    """A subset without repetition, in order; leading tokens always."""
    x = np.tile(np.arange(tokens + 16.0)[None, :, None], (64, 1, 3))
    y = np.asarray(
        vit.keep_patches(jnp.asarray(x), tokens, dropout, jax.random.key(0), jnp.arange(64))
    )
    assert y.shape == (64, tokens + kept, 3)
    np.testing.assert_array_equal(y[..., 0], y[..., 2])
    np.testing.assert_array_equal(y[:, :tokens, 0], x[:, :tokens, 0])
    assert np.all(np.diff(y[..., 0], axis=1) > 0)
    assert len({tuple(row) for row in y[..., 0].tolist()}) > min(10, kept * 8)


def test_all_patches_are_equally_likely():
    x = np.tile(np.arange(16.0)[None, :, None], (4000, 1, 1))
    y = np.asarray(vit.keep_patches(jnp.asarray(x), 0, 0.75, jax.random.key(1), jnp.arange(4000)))
    counts = np.bincount(y.astype(int).ravel(), minlength=16)
    assert np.abs(counts - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)


def dropped(net, variables, images, tokens, rows, key: int = 0):
    options = {"train": True, "rngs": {"dropout": jax.random.key(key)}}
    return apply(net, variables, images, tokens, rows=rows, **options)[0]


@pytest.mark.parametrize("name", ["ViT-B/32", "SigLIP-B/16"])
@pytest.mark.slow
def test_patches_depend_on_key_and_row_alone(name: str):
    net = models.create(name, patch_dropout=0.5, size=TINY_VIT)
    variables, (images, tokens) = make_variables(net), make_batch(net.size, 8)
    rows = np.arange(8, dtype=np.int32)
    whole = dropped(net, variables, images, tokens, rows)
    part = dropped(net, variables, images[5:7], tokens[5:7], rows[5:7])
    np.testing.assert_allclose(part, whole[5:7], rtol=1e-5, atol=1e-6)
    for other in (
        dropped(net, variables, images, tokens, rows + 8),
        dropped(net, variables, images, tokens, rows, key=1),
        apply(net, variables, images, tokens)[0],
    ):
        assert np.all(np.linalg.norm(other - whole, axis=1) > 1e-3)


@pytest.mark.parametrize("forms", [PE, PE | {"image_registers": 0}])
def test_kept_patches_keep_their_rotation(forms: dict):
    """Those that matter to the result are found, and computed alone in NumPy."""
    size = TINY_VIT | CLIPA | forms
    net, whole = (models.create("ViT-B/32", patch_dropout=d, size=size) for d in (0.5, 0.0))
    variables, (images, tokens) = make_variables(net), make_batch(net.size, 2)
    rows = np.arange(2, dtype=np.int32)
    found = dropped(net, variables, images, tokens, rows)
    kept = []
    for patch in range(9):
        y, x = divmod(patch, 3)
        changed = images.copy()
        changed[0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] ^= 255
        if np.abs(dropped(net, variables, changed, tokens, rows)[0] - found[0]).max() > 1e-6:
            kept.append(patch)
    assert len(kept) == 4
    p = float64(variables["params"]["image"])
    wanted = numpy_models.pooled_vit(images[:1], p, whole.size, kept)
    np.testing.assert_allclose(found[:1], wanted, **EXACT)


def test_evaluation_sees_all_patches():
    plain, net = (models.create("ViT-B/32", patch_dropout=d, size=TINY_VIT) for d in (0.0, 0.5))
    variables, (images, tokens) = make_variables(net), make_batch(net.size)
    for actual, expected in zip(*(apply(n, variables, images, tokens) for n in (plain, net))):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_patch_dropout_on_devices(mesh8):
    """Patches are chosen where the example lies: only gradients cross devices."""
    net = models.create("ViT-B/32", patch_dropout=0.5, size=TINY_VIT)
    variables, (images, tokens) = make_variables(net), make_batch(net.size, 16)
    batch = (images, tokens, np.arange(16, dtype=np.int32))
    expected = dropped(net, variables, *batch)
    with jax.set_mesh(mesh8):
        on_mesh = jax.device_put(variables, sharding.tree_shardings(variables, mesh8))
        actual = dropped(net, on_mesh, *jax.device_put(batch, sharding.batch_sharding(mesh8)))
    assert_trees_close(jax.device_get(actual), jax.device_get(expected), 2e-5)

    mesh = sharding.make_mesh(data=8)
    encode = partial(net.apply, train=True, method="encode_image")

    def loss_fn(variables, images, rows):
        return encode(variables, images, rows=rows, rngs={"dropout": jax.random.key(0)}).sum()

    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss_fn), in_shardings=(whole, split, split), out_shardings=whole)
        program = step.lower(variables, images, batch[2]).compile().as_text()
    assert "all-reduce" in program
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert kind not in program


@pytest.mark.parametrize(
    ("name", "size", "dropout"),
    [("ViT-B/32", TINY_VIT, 1.0), ("ViT-B/32", TINY_VIT, -0.1), ("RN50", TINY_RESNET, 0.5)],
)
def test_impossible_patch_dropout(name: str, size: dict, dropout: float):
    with pytest.raises(UserError, match=rf"model.patch_dropout is {dropout}.*less than 1"):
        models.create(name, size=size, patch_dropout=dropout)


def test_patch_dropout_needs_rows():
    net = models.create("ViT-B/32", patch_dropout=0.5, size=TINY_VIT)
    variables, batch = make_variables(net), make_batch(net.size)
    with pytest.raises(ValueError, match="rows"):
        net.apply(variables, *batch, train=True, rngs={"dropout": jax.random.key(0)})
