"""The detector of near-duplicates: network against NumPy, evaluation against brute force."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lookup
import numpy as np
import numpy_models
import pytest
import tiny

from clip_jax import losses, sharding, weights
from clip_jax.configs import default, overlap_detector
from clip_jax.data.sources.base import Example
from clip_jax.data.sources.captions import Captions
from clip_jax.embed.encoder import Encoder
from clip_jax.errors import BadExample, UserError
from clip_jax.models import views
from clip_jax.training import objectives, program, validation
from clip_jax.weights.convert import tokens
from clip_jax.weights.model import Tensors, Weights, variable_shapes

DETECTOR = {
    **{"objective": "near_duplicates", "resnet_activation": "gelu", "resnet_norm": "weight"},
    "image_layers": (1, 2, 1, 1),
}


@functools.cache
def detector():
    """A small one, its forward pass, variables of size 1 or so, and images for it."""
    net = tiny.make_net("resnet", DETECTOR)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4, 2, 32, 32, 3), np.uint8)
    tokens = np.zeros((4, net.size.context_length), np.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images, tokens)

    def values(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = sharding.path_name(path)
        drawn = rng.normal(0, 0.2 if name.endswith("positions") else 0.5, leaf.shape)
        return np.float32(drawn + 2 if name.endswith("scale") else drawn)

    return (
        net,
        jax.jit(net.apply),
        jax.tree_util.tree_map_with_path(values, shapes),
        images,
        tokens,
    )


def in_form_of_batch_norm(layers: dict) -> tuple[dict, dict]:
    """Rewrites layers with plain kernels, and BatchNorm that only adds the biases."""
    params, running = {}, {}
    for name, layer in layers.items():
        if name == "attention_pool":
            params[name] = layer
        elif "scale" in layer:
            kernel, norm = layer["kernel"], name.replace("conv", "bn")
            lengths = np.sqrt((kernel**2).sum(axis=(0, 1, 2)))
            params[name] = {"kernel": layer["scale"] * kernel / lengths}
            ones = np.ones_like(layer["bias"])
            params[norm] = {"scale": ones, "bias": layer["bias"]}
            running[norm] = {"mean": 0 * ones, "var": ones - 1e-5}
        else:
            params[name], running[name] = in_form_of_batch_norm(layer)
    return params, running


def test_weight_normalised_resnet_with_gelu_equals_numpy():
    _, apply, variables, images, tokens = detector()
    assert set(variables) == {"params"}  # no statistics of batches
    (found,) = apply(variables, images, tokens)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"]["image"])
    form = in_form_of_batch_norm(exact)
    gelu = numpy_models.ACTIVATIONS["gelu"]
    assert found.shape[1] == 2
    for i, embeds in enumerate(found.swapaxes(0, 1)):
        wanted = numpy_models.resnet(images[:, i], *form, gelu)
        np.testing.assert_allclose(embeds, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.1


def test_options_leave_the_resnet_of_the_paper_alone():
    names = {}
    for kind, size in (("plain", {"image_layers": (1, 2, 1, 1)}), ("detector", DETECTOR)):
        shapes = variable_shapes(tiny.make_net("resnet", size).size)
        names[kind] = {k: v for k, v in shapes.items() if k.startswith("params/image/")}
    plain, ours = names["plain"], names["detector"]
    for name, shape in ours.items():  # what BatchNorm had is now the convolution's
        layer, _, leaf = name.rpartition("/")
        old = name if leaf == "kernel" else f"{layer.replace('conv', 'bn')}/{leaf}"
        assert plain[old] == shape
    assert len(ours) == len(plain)


def test_it_starts_with_blocks_that_do_nothing_and_tells_images_apart():
    net, apply, _, images, tokens = detector()
    variables = jax.jit(net.init)(jax.random.key(0), images, tokens)
    image = variables["params"]["image"]
    assert not np.any(image["stage2_block1"]["conv3"]["scale"])
    assert np.all(image["stage2_block1"]["conv2"]["scale"] == np.float32(2**0.5))
    embeds = np.asarray(apply(variables, images, tokens)[0][:, 0])
    assert (embeds @ embeds.T)[~np.eye(4, dtype=bool)].max() < 0.9999


def test_the_loss_has_the_temperature_of_the_config():
    config = overlap_detector.get_config("smoke")
    config.loss.temperature = 0.2
    mesh, _ = program.make_mesh_and_net(config)
    loss, augment = objectives.OBJECTIVES["near_duplicates"](config, mesh)
    rng = np.random.default_rng(0)
    pair = [jnp.float32(numpy_models.unit(rng.normal(size=(16, 8)))) for _ in range(2)]
    wanted = losses.softmax_loss(*pair, jnp.log(jnp.float32(5)))
    outputs = {"views": jnp.stack(pair, axis=1)}
    assert float(jax.jit(loss)(outputs, {})[0]) == pytest.approx(float(wanted), rel=1e-5)
    made = jax.eval_shape(augment, np.zeros((2, 32, 32, 3), np.uint8), jax.random.key(0))
    assert made["image"].shape == (2, 2, 32, 32, 3)


def test_config_of_the_detector():
    config = overlap_detector.get_config("")
    net = program.make_net(config, sharding.make_mesh())
    assert (net.size.resnet_norm, net.size.resnet_activation) == ("weight", "gelu")
    assert config.batch_size == 1712
    assert config.loss.temperature == 0.07
    config.loss.temperature = 0.0
    with pytest.raises(UserError, match=r"loss\.temperature is 0\.0"):
        validation.validate(config)


def test_no_other_format_has_weight_normalisation(tmp_path):
    size = tiny.make_net("resnet", {**DETECTOR, "objective": "contrastive"}).size
    rng = np.random.default_rng(0)
    shapes = variable_shapes(size)
    tensors = Tensors(shapes, lambda name: rng.normal(size=shapes[name]))
    found = Weights(size, tensors, tokens.OPENAI, {"source": "x", "format": "y"})
    with pytest.raises(UserError, match=r"open_clip has no such model.*--to=clip_jax"):
        weights.save(found, tmp_path / "out", "open_clip")


# ---- Evaluation --------------------------------------------------------------------------------

SIDE, COUNT = 16, 21
STRENGTHS = default.get_config().data.views


class Colours:
    """A model that embeds an image by its pixels, most of which the views leave alike."""

    @dataclasses.dataclass
    class size:
        image_size = SIDE
        image_crop = "center"
        image_filter = "bicubic"
        objective = "near_duplicates"

    def apply(self, variables, images, method):
        assert method == "encode_image"
        pixels = images.reshape(len(images), -1).astype(jnp.float32) - variables["grey"]
        return pixels / jnp.linalg.norm(pixels, axis=1, keepdims=True)


class Pictures:
    """Images of noise in large fields; the fourth cannot be read."""

    class_names = templates = ()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Example:
        if index == 3:
            raise BadExample("unreadable image", "3")
        return Example(picture(index), Captions((), ()), labels=(), key=str(index))


def picture(index: int) -> np.ndarray:
    fields = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
    return fields.repeat(SIDE // 4, axis=0).repeat(SIDE // 4, axis=1)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.slow
def test_recall_of_the_second_view(devices: int):
    mesh, net = tiny.make_mesh(devices, 1), Colours()
    variables = {"grey": jnp.float32(128), "params": {}}
    encoder = Encoder(net, mesh, 8, threads=2)
    first, again = (
        lookup.evaluate("near_duplicates", Pictures(), lookup.Words(), variables, encoder)
        for _ in range(2)
    )
    found, used = first.headline.value, [i for i in range(COUNT) if i != 3]
    assert found == again.headline.value
    assert (first.headline.n, first.headline.chance) == (20, 1 / 20)
    images = np.stack([picture(i) for i in used])
    make = jax.jit(lambda *of: views.two_views(of[0], jax.random.key(7), STRENGTHS, of[1]))
    pairs = np.asarray(make(images, jnp.array(used)), np.float64).reshape(len(used), 2, -1) - 128
    pairs /= np.linalg.norm(pairs, axis=2, keepdims=True)
    right = (pairs[:, 0] @ pairs[:, 1].T).argmax(axis=1) == np.arange(len(used))
    assert found == pytest.approx(right.mean(), abs=1e-9)
    assert 0.2 < found < 1
