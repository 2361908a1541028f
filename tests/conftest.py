"""The whole suite runs on 8 virtual CPU devices, whatever the machine has."""

import os
import pathlib
import signal

from xla_flags import DEVICES, QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8 {QUICK}"

from collections.abc import Iterator

import jax
import jaxtyping
import pytest
from bucket_server import Server

# Shapes and types of the annotated modules are checked under test, and free at run time. Before the
# first of them is imported.
_HERE = pathlib.Path(__file__).parent
CHECKED = ["losses", "optim", "sharding"]
CHECKED += ["training.augment", "training.program", "training.step"]
CHECKED += ["data.crops", "embed.store", "evaluate.measures"]
CHECKED += ["plan.groups", "plan.network", "search.approximate", "search.exact"]
# Not models.sizes, whose errors are for the user; nor state, whose leaves are also shapes and
# shardings.
CHECKED += [f"models.{p.stem}" for p in _HERE.parent.glob("clip_jax/models/[a-z]*.py")]
CHECKED.remove("models.sizes")
jaxtyping.install_import_hook([f"clip_jax.{name}" for name in CHECKED], "beartype.beartype")

from clip_jax import sharding
from clip_jax.storage import faults

# In the background a suite is told to ignore Ctrl-C; its runs and processes must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.jit(lambda x: x + 1)(0.0)  # XLA reads its flags
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(QUICK)  # unknown to libtpu
# Processes that tests start find the package and the tests' helpers too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE.parent), str(_HERE / "support")])


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


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[Server]:
    """A Google Cloud Storage that this process, and those it starts, take for the real one."""
    with Server("bucket") as server:
        os.environ.update(server.env)  # for good: its clients read it once
        yield server


@pytest.fixture
def bucket(bucket_server: Server, monkeypatch) -> Iterator[Server]:
    """The bucket server, reset: no faults, latency or restrictions, and counts at 0."""

    def reset() -> None:
        bucket_server.faults([])
        bucket_server.latency(0)
        bucket_server.rights("bucket", "all")
        bucket_server.stats(reset=True)
        bucket_server.requests(reset=True)
        faults._counts.clear()
        faults._logged.clear()
        faults._accessed.clear()

    reset()
    yield bucket_server
    reset()
