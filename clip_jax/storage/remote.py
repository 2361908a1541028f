"""The clients of gs:// and s3://, configured once for all that use them."""

import functools
import os
from typing import Any

import fsspec.config
from etils import epath
from etils.epath import backend

SCHEMES = ("gs", "s3")

# Concurrent requests for parts of objects, per process; more are queued.
CONCURRENCY = 256
# Timeout of one request through fsspec, in seconds.
_REQUEST_TIMEOUT = 120.0


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path names an object, or a prefix, of a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def split(path: epath.PathLike) -> tuple[str, str, str]:
    """Returns scheme, bucket and key of a remote path."""
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def filesystem(path: epath.PathLike) -> Any:
    """Returns the fsspec file system of a remote path, the same that `epath` uses."""
    _configure()
    return backend.fsspec_backend.fs(os.fspath(path))


@functools.cache
def kvstore(scheme: str, bucket: str) -> Any:
    """Opens a bucket with TensorStore, without retries of its own: `faults` retries."""
    import tensorstore as ts

    once = {"max_retries": 0}
    context = ts.Context(
        {
            "gcs_request_concurrency": {"limit": CONCURRENCY},
            "gcs_request_retries": once,
            "s3_request_concurrency": {"limit": CONCURRENCY},
            "s3_request_retries": once,
        }
    )
    return ts.KvStore.open(kvstore_spec(scheme, bucket), context=context).result()


def kvstore_spec(scheme: str, bucket: str, path: str = "") -> dict[str, Any]:
    """Returns TensorStore's spec of a bucket, or of a prefix in it."""
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": path}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    # Variables that boto reads, and so s3fs; TensorStore reads only the credentials.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    return spec


@functools.cache
def _configure() -> None:
    # Listings are not cached: other hosts, and TensorStore, write to the same prefixes.
    fsspec.config.conf["gcs"] = {
        "use_listings_cache": False,
        "timeout": _REQUEST_TIMEOUT,
        **fsspec.config.conf.get("gcs", {}),
    }
    fsspec.config.conf["s3"] = {
        "use_listings_cache": False,
        **fsspec.config.conf.get("s3", {}),
    }


_configure()
