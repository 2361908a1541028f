"""The basis of a plan: topologies, the interconnect model, the FLOPs of a model."""

import jax
import jax.extend
import numpy as np
import pytest
from tiny_plan import TINY, V5E_8, check_paragraph, needs_compiler, tiny_config, unread_flops

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models import flops as model_flops
from clip_jax.models.sizes import SIZES
from clip_jax.plan import make, topology
from clip_jax.plan.network import Network

# ---- Topologies --------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("name", "slices", "chips"),
    [
        ("v5e:1x1", 1, 1),
        ("v5e:2x2", 3, 12),
        ("v6e:16x16", 1, 256),
        ("v4:2x2x1", 1, 4),
        ("v4:4x4x4", 2, 128),
        ("v5p:8x16x16", 1, 2048),
    ],
)
def test_topologies(name, slices, chips):
    found = topology.parse_topology(name, slices)
    devices = found.devices()
    assert len(devices) == found.size == chips
    assert len({getattr(device, "slice_index", 0) for device in devices}) == slices
    assert all(device.platform == "tpu" for device in devices)


@pytest.mark.parametrize(
    "name", ["v5e:3x3", "v5e:32x32", "v5e:4x4x4", "v5p:4x4", "v6e:0x2", "v7:2x2", "v5e", "16x16"]
)
def test_impossible_topologies(name):
    with pytest.raises(UserError, match=r"v5e:16x16|v5p:2x2x2|v6e:16x16") as caught:
        topology.parse_topology(name)
    check_paragraph(str(caught.value))


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]"') as caught:
        V5E_8.devices()
    check_paragraph(str(caught.value))


@needs_compiler
def test_slices_of_config_and_topology():
    with pytest.raises(UserError, match=r"--slices=2"):
        make.build(tiny_config(**{"mesh.slices": 2}), V5E_8, 100)


# ---- Interconnect ------------------------------------------------------------------------------


def grid(name: str, **shape: int) -> Network:
    found = topology.parse_topology(name)
    return Network(found, shape, np.argwhere(np.ones(found.shape)))


def test_a_whole_pod_uses_both_rings():
    net = grid("v5e:16x16", data=256)
    link, size = net.topology.chip.ici_link, 2**30
    everyone = np.arange(256)[None]
    gather = net.seconds("all-gather", size, everyone)
    assert gather == pytest.approx(size * 255 / 256 / (4 * link), rel=0.02)
    assert net.seconds("all-reduce", size, everyone) == pytest.approx(2 * gather)
    row = np.arange(16)[None]
    assert net.seconds("all-gather", size, row) == pytest.approx(2 * gather, rel=0.1)


def test_a_part_of_a_pod_has_no_rings():
    net = grid("v5e:4x4", data=16)
    size, link = 2**30, net.topology.chip.ici_link
    row = np.arange(4)[None]
    assert net.seconds("reduce-scatter", size, row) == pytest.approx(size * 3 / 4 / link, rel=0.01)
    # Every other chip: two groups share the links between.
    half = np.array([[0, 2], [1, 3]])
    assert net.seconds("all-gather", size, half) == pytest.approx(size / link * 3 / 4, rel=0.01)


def test_neighbours_and_the_way_round():
    size = 2**20
    for name, hops in (("v5e:4x4", 3), ("v5e:16x16", 1), ("v5p:4x4x4", 1)):
        net = grid(name, data=topology.parse_topology(name).size)
        side = net.topology.shape[-1]
        neighbours = net.seconds("collective-permute", size, np.array([[0, 1]]))
        around = net.seconds("collective-permute", size, np.array([[0, side - 1]]))
        assert around == pytest.approx(hops * neighbours)


def test_nothing_to_exchange():
    net = grid("v5e:2x2", data=4)
    assert net.seconds("all-reduce", 100, np.arange(4)[:, None]) == 0
    assert net.seconds("collective-permute", 100, np.zeros((0, 2), int)) == 0


# ---- Operations that a model needs -------------------------------------------------------------


def traced_flops(name: str, overrides: dict) -> float:
    """Counts the FLOPs of the forward pass of one pair, as JAX traces it."""
    net = models.create(name, size=overrides)
    size = net.size
    images = np.zeros((1, size.image_size, size.image_size, 3), np.uint8)
    if size.objective == "near_duplicates":
        images = np.stack([images, images], axis=1)
    tokens = np.ones((1, size.context_length), np.int32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images, tokens)
    traced = jax.make_jaxpr(lambda v: net.apply(v, images, tokens))(variables)
    return jaxpr_flops(traced.jaxpr)


def jaxpr_flops(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * out.size * np.prod([shape[d] for d in contracted])
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            total += 2 * out.size * np.prod(kernel[:-1])
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            total += times * jaxpr_flops(inner)
    return total


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ViT-B/32", TINY),
        ("ViT-B/32", {"image_layers": (2,), "text_layers": 1}),
        ("ViT-B/32", {**TINY, "image_pool": "map", "text_pool": "last", "text_mlp": 48}),
        ("RN50", {"image_layers": (1, 2, 1, 1), "text_layers": 1, "image_size": 64}),
        ("ViT-B/32", {**TINY, "text_pool": "bag", "text_layers": 0}),
        ("ViT-B/32", {**TINY, "objective": "bag_of_words"}),
        ("ViT-B/32", {**TINY, "objective": "captioning", "context_length": 17}),
        ("ViT-B/32", {**TINY, "objective": "near_duplicates"}),
    ],
)
def test_model_flops(name, overrides):
    """By the formulas, and by the products and convolutions that jax traces."""
    size = models.create(name, size=overrides).size
    found = model_flops.image_flops(size) + model_flops.text_flops(size)
    traced = traced_flops(name, overrides) + unread_flops(size)
    assert found == pytest.approx(traced, rel=1e-9)


# Of one image and one caption, by open_clip's docs/model_profile.csv; for a ResNet it counts
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
