"""The whole suite runs on 8 virtual CPU devices, whatever the machine has."""

import os

from xla_flags import DEVICES, QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8 {QUICK}"

import jax
import pytest

from clip_jax import sharding

jax.jit(lambda x: x + 1)(0.0)  # XLA reads its flags
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(QUICK)  # unknown to libtpu


@pytest.fixture(scope="session")
def mesh8() -> jax.sharding.Mesh:
    """Mesh of 8 devices with both axes in use: data 4 x fsdp 2."""
    return sharding.make_mesh(data=4, fsdp=2)


@pytest.fixture(scope="session")
def mesh1() -> jax.sharding.Mesh:
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


@pytest.fixture(params=["one", "eight"])
def mesh(request, mesh1, mesh8) -> jax.sharding.Mesh:
    """A test that asks for it runs on one device and on eight."""
    return mesh1 if request.param == "one" else mesh8
