"""The placement of parameters, on the trees of real models."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec

from clip_jax import models, sharding
from clip_jax import state as train_state
from clip_jax.errors import UserError

P = PartitionSpec


@functools.cache
def specs(name: str, data: int, fsdp: int) -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
    """Shape and placement of each array of the training state, by its path."""
    optimizer = tiny.make_optimizer()
    state = train_state.abstract_state(
        models.create(name), optimizer, sharding.make_mesh(data, fsdp)
    )
    return {
        sharding.path_name(path): (leaf.shape, leaf.sharding.spec)
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def params(name: str, data: int = 1, fsdp: int = 8):
    """Returns `specs` of the parameters alone, by names that begin there."""
    found = specs(name, data, fsdp)
    return {path[7:]: value for path, value in found.items() if path.startswith("params/")}


VIT_L14 = {
    "logit_scale": P(),
    "image/class_token": P("fsdp"),  # 1024
    "image/positions": P(None, "fsdp"),  # 257, 1024
    "image/patch_embed/kernel": P(None, None, None, "fsdp"),  # 14, 14, 3, 1024
    "image/ln_pre/scale": P(),
    "image/projection/kernel": P("fsdp"),  # 1024, 768
    "image/transformer/blocks/ln_1/scale": P(),  # 24, 1024
    "image/transformer/blocks/qkv/kernel": P(None, "fsdp"),  # 24, 1024, 3, 16, 64
    "image/transformer/blocks/qkv/bias": P(),
    "image/transformer/blocks/attn_out/kernel": P(None, None, None, "fsdp"),  # 24, 16, 64, 1024
    "image/transformer/blocks/mlp_in/kernel": P(None, None, "fsdp"),  # 24, 1024, 4096
    "image/transformer/blocks/mlp_out/kernel": P(None, "fsdp"),  # 24, 4096, 1024
    "text/token_embed/embedding": P("fsdp"),  # 49408, 768
    "text/positions": P(None, "fsdp"),  # 77, 768
    "text/transformer/blocks/mlp_out/kernel": P(None, "fsdp"),  # 12, 3072, 768
}
RN50 = {
    "logit_scale": P(),
    "image/stem_conv1/kernel": P(None, None, None, "fsdp"),  # 3, 3, 3, 32
    "image/stem_bn1/scale": P(),
    "image/stage4_block0/conv2/kernel": P(None, None, "fsdp"),  # 3, 3, 512, 512
    "image/stage4_block0/conv3/kernel": P(None, None, None, "fsdp"),  # 1, 1, 512, 2048
    "image/attention_pool/positions": P(None, "fsdp"),  # 50, 2048
    "image/attention_pool/query/bias": P(),
}


@pytest.mark.parametrize(("name", "table"), [("ViT-L/14", VIT_L14), ("RN50", RN50)])
def test_placements(name: str, table: dict):
    placed = params(name)
    for path, want in table.items():
        shape, spec = placed[path]
        assert spec == want, f"{path} {shape}"


@pytest.mark.parametrize("name", ["ViT-L/14", "RN50x64"])
def test_nothing_large_is_replicated(name: str):
    large = {k: v for k, v in params(name).items() if math.prod(v[0]) > 1_000_000}
    assert len(large) > 8
    for path, (shape, spec) in large.items():
        assert "fsdp" in spec, f"{path} {shape}"
    found = specs(name, 1, 8).values()
    total = sum(math.prod(shape) for shape, _ in found)
    held = sum(math.prod(shape) // (8 if "fsdp" in spec else 1) for shape, spec in found)
    assert held < total / 8 * 1.02  # a device's part of the whole state, moments included


def test_layers_of_a_stack_are_not_split():
    """24 layers on 8 devices would divide."""
    stacked = {k: v for k, v in params("ViT-L/14").items() if "/blocks/" in k}
    assert {shape[0] for shape, _ in stacked.values()} == {12, 24}
    for path, (_, spec) in stacked.items():
        assert not spec or spec[0] is None, path


@pytest.mark.parametrize("name", ["ViT-L/14", "RN50"])
def test_moments_follow_their_parameters(name: str):
    placed = params(name)
    moments = {k: v for k, v in specs(name, 1, 8).items() if k.startswith("opt_state/")}
    for kind in ("mu", "nu"):
        found = {k.split(f"/{kind}/")[1]: v for k, v in moments.items() if f"/{kind}/" in k}
        assert found == placed


def test_batch_statistics_are_replicated():
    found = {k: v for k, v in specs("RN50", 1, 8).items() if k.startswith("batch_stats/")}
    assert len(found) == 2 * 55  # mean and variance of each BatchNorm
    assert all(spec == P() for _, spec in found.values())


def test_data_parallel_replicates_everything():
    assert all(spec == P() for _, spec in specs("ViT-L/14", 8, 1).values())


def test_indivisible_array_is_replicated():
    mesh = sharding.make_mesh(1, 8)
    tree = {"kernel": jnp.zeros((3, 5)), "blocks": {"x": {"kernel": jnp.zeros((8, 5))}}}
    found = sharding.tree_shardings({"image": tree}, mesh)["image"]
    assert found["kernel"].spec == found["blocks"]["x"]["kernel"].spec == P()


# ---- The mesh ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (-1, 8, (1, 8)), (4, 2, (4, 2))]
)
def test_mesh(data: int, fsdp: int, shape: tuple):
    mesh = sharding.make_mesh(data, fsdp)
    assert mesh.axis_names == ("slice", "data", "fsdp", "tensor")
    assert mesh.devices.shape == (1, *shape, 1)
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(("data", "fsdp"), [(-1, 3), (-1, 16), (4, 1), (2, 8), (3, 3)])
def test_mesh_that_does_not_fit(data: int, fsdp: int):
    with pytest.raises(UserError, match=r"does not cover the 8 device.*one of: 1, 2, 4, 8\."):
        sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize(("data", "fsdp"), [(-1, 0), (-1, -1), (0, 8), (-2, 4)])
def test_mesh_axis_that_is_not_positive(data: int, fsdp: int):
    with pytest.raises(UserError, match="axes are positive, or data=-1"):
        sharding.make_mesh(data, fsdp)


def test_batch_is_split_over_every_axis(mesh8):
    batch = jax.device_put(jnp.zeros((16, 3)), sharding.batch_sharding(mesh8))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    assert len({str(shard.index) for shard in batch.addressable_shards}) == 8


def test_activations_are_constrained_inside_a_mesh_only(mesh8):
    def double(x):
        return sharding.constrain_batch(2 * x)

    x = jnp.ones((8, 3))
    assert "sharding_constraint" not in str(jax.make_jaxpr(double)(x))
    with jax.set_mesh(mesh8):
        assert "sharding_constraint" in str(jax.make_jaxpr(double)(x))
        y = jax.jit(double)(x)
    assert y.sharding.is_equivalent_to(sharding.batch_sharding(mesh8), 2)
