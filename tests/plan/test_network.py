"""Topologies, and the interconnect model over them."""

import numpy as np
import pytest
from tiny_plan import V5E_8, check_paragraph, needs_compiler, tiny_config

from clip_jax.errors import UserError
from clip_jax.plan import make, topology
from clip_jax.plan.network import Network

# ---- Topologies --------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("name", "slices", "devices"),
    [
        ("v5e:1x1", 1, 1),
        ("v5e:2x2", 3, 12),
        ("v6e:16x16", 1, 256),
        ("v4:2x2x1", 1, 4),
        ("v4:4x4x4", 2, 128),
        ("v5p:8x16x16", 1, 2048),
        ("tpu7x:2x2x1", 1, 8),
        ("tpu7x:4x4x4", 2, 256),
    ],
)
def test_topologies(name, slices, devices):
    found = topology.parse_topology(name, slices)
    made = found.devices()
    assert len(made) == found.size == devices
    assert len({getattr(device, "slice_index", 0) for device in made}) == slices
    assert all(device.platform == "tpu" for device in made)


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
    link, size = net.topology.chip.ici_link, 2.0**30
    everyone = np.arange(256)[None]
    gather = net.seconds("all-gather", size, everyone)
    assert gather == pytest.approx(size * 255 / 256 / (4 * link), rel=0.02)
    assert net.seconds("all-reduce", size, everyone) == pytest.approx(2 * gather)
    row = np.arange(16)[None]
    assert net.seconds("all-gather", size, row) == pytest.approx(2 * gather, rel=0.1)


def test_a_part_of_a_pod_has_no_rings():
    net = grid("v5e:4x4", data=16)
    size, link = 2.0**30, net.topology.chip.ici_link
    row = np.arange(4)[None]
    assert net.seconds("reduce-scatter", size, row) == pytest.approx(size * 3 / 4 / link, rel=0.01)
    # Every other chip: two groups share the links between.
    half = np.array([[0, 2], [1, 3]])
    assert net.seconds("all-gather", size, half) == pytest.approx(size / link * 3 / 4, rel=0.01)


def test_neighbours_and_the_way_round():
    size = 2.0**20
    for name, hops in (("v5e:4x4", 3), ("v5e:16x16", 1), ("v5p:4x4x4", 1)):
        net = grid(name, data=topology.parse_topology(name).size)
        side = net.topology.shape[-1]
        neighbours = net.seconds("collective-permute", size, np.array([[0, 1]]))
        around = net.seconds("collective-permute", size, np.array([[0, side - 1]]))
        assert around == pytest.approx(hops * neighbours)


def test_two_devices_of_a_chip_share_its_links():
    slice_ = topology.parse_topology("tpu7x:4x4x4")
    places = np.repeat(np.argwhere(np.ones(slice_.shape)), 2, axis=0)  # both of a chip in turn
    net = Network(slice_, {"data": 128}, places)
    size, link = 2.0**30, slice_.chip.ici_link
    everyone = net.seconds("all-gather", size, np.arange(128)[None])
    assert everyone == pytest.approx(size / (6 * link), rel=0.05)
    # Each of two groups of 64 chips' halves has half of every link.
    halves = net.seconds("all-gather", size, np.arange(128).reshape(64, 2).T)
    assert halves == pytest.approx(2 * everyone, rel=0.05)
    one_chip = net.seconds("all-gather", size, np.array([[0, 1]]))
    assert one_chip == pytest.approx(size / 2 / (6 * link), rel=0.01)


def test_nothing_to_exchange():
    net = grid("v5e:2x2", data=4)
    assert net.seconds("all-reduce", 100.0, np.arange(4)[:, None]) == 0
    assert net.seconds("collective-permute", 100.0, np.zeros((0, 2), int)) == 0
