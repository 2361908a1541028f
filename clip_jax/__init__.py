"""Pretrain CLIP in JAX, from a laptop CPU to a TPU pod, and use what comes out.

model = clip_jax.load("runs/quickstart")
model.zero_shot(["picture.png"], ["a seven", "a three"])
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# Before anything reads a path: etils, and with it orbax and TFDS, would take TensorFlow's file
# system for gs://, which reads 64 MiB ahead; and gcsfs would ask for rights on the bucket itself.
os.environ.setdefault("EPATH_USE_TF", "0")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# Seconds after which a connection of TensorStore's that carries nothing is broken off.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

# Loaded on first use: training must not wait for what only inference needs, and the reverse.
_HOMES = {
    "load": "clip_jax.api",
    "Model": "clip_jax.api",
    "tokenize": "clip_jax.data.tokenizer",
    "available_models": "clip_jax.models",
    "export": "",
    "losses": "",
    "models": "",
}

__all__ = [
    "Model",
    "__version__",
    "available_models",
    "export",
    "load",
    "losses",
    "models",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
    if not _HOMES[name]:
        return importlib.import_module(f"clip_jax.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
