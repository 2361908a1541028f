"""Places for the tests of storage, on disk and in a bucket."""

import time

import pytest
from etils import epath

from clip_jax.storage import faults


@pytest.fixture(params=["local", "gs"])
def place(request, tmp_path) -> epath.Path:
    """An empty directory, on disk and in a bucket."""
    if request.param == "local":
        return epath.Path(tmp_path)
    request.getfixturevalue("bucket")
    return epath.Path(f"gs://bucket/{tmp_path.name}-{time.monotonic_ns()}")


@pytest.fixture
def remote(bucket, tmp_path) -> epath.Path:
    return epath.Path(f"gs://bucket/{tmp_path.name}-{time.monotonic_ns()}")


@pytest.fixture
def hurry(monkeypatch):
    """Sets the deadline of retries to one second."""
    monkeypatch.setattr(faults, "RETRY_FOR", 1.0)
