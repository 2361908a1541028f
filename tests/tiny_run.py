"""The smallest run that uses every part, and one finished run of it that several tests read."""

import functools
import pathlib
import tempfile

from ml_collections import ConfigDict

from clip_jax import train
from configs import vit_b32

# Also given on a command line, so flat and by dotted name.
SETTINGS = {
    "model.size.image_size": 16,
    "model.size.image_layers": (1,),
    "model.size.image_width": 32,
    "model.size.image_heads": 2,
    "model.size.text_layers": 1,
    "model.size.text_width": 32,
    "model.size.text_heads": 2,
    "model.size.embed_dim": 16,
    "batch_size": 16,
    "duration": "12 steps",
    "optim.warmup": "3 steps",
    "log.every": "1 steps",
    "eval.every": "6 steps",
    "eval.batch_size": 128,
    "eval.retrieval.max_examples": 100,
    "checkpoint.every": "4 steps",
}


def config(**overrides) -> ConfigDict:
    """`SETTINGS` on top of configs/vit_b32.py:smoke; overrides as a dict of dotted names."""
    made = vit_b32.get_config("smoke")
    made.update_from_flattened_dict({**SETTINGS, **overrides})
    return made


@functools.cache
def finished() -> pathlib.Path:
    """The workdir of an uninterrupted run; to be read, or copied, but not changed."""
    folder = pathlib.Path(_folder().name) / "finished"
    train.train(config(), folder, command="python main.py")
    return folder


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="clip_jax_tests_")  # removed at exit
