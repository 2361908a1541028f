"""The whole suite runs on 8 virtual CPU devices, whatever the machine has."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

from clip_jax import sharding


@pytest.fixture(scope="session")
def mesh8() -> jax.sharding.Mesh:
    """Mesh of 8 devices with both axes in use: data 4 x fsdp 2."""
    return sharding.make_mesh(data=4, fsdp=2)
