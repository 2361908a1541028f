"""The kinds of sources, and the function that opens the one a config names."""

import importlib

from etils import epath
from ml_collections import ConfigDict

from clip_jax.data.sources.base import Request, Source
from clip_jax.errors import UserError

# The module of each `source.type`; its function `open_source` takes a `Request`. A module is
# imported when a config names its type: TensorFlow, which two of them need, takes seconds.
TYPES = {
    "digits": "clip_jax.data.sources.digits",
    "folder": "clip_jax.data.sources.folder",
    "tar": "clip_jax.data.sources.tar",
    "tfds": "clip_jax.data.sources.tfds",
    "tfrecord": "clip_jax.data.sources.tfrecord_source",
    "synthetic": "clip_jax.data.sources.synthetic",
}


def create(
    spec: ConfigDict,
    image_size: int,
    seed: int,
    *,
    fallback_dir: epath.Path | None = None,
    chunk: int = 1,
    cached_chunks: int = 0,
) -> Source:
    """Opens a source; arguments as in `Request`.

    Raises:
      UserError: there is no such type, or the data are not there or not in the expected form.
    """
    if spec.type not in TYPES:
        raise UserError(
            f"The config names no data it can read: source.type is {spec.type!r}, and must be one "
            f"of {', '.join(TYPES)}. To try it with the embedded set, add "
            "--config.data.source.type=digits --config.data.source.split=train to the command."
        )
    request = Request(spec, image_size, seed, fallback_dir, chunk, cached_chunks)
    return importlib.import_module(TYPES[spec.type]).open_source(request)
