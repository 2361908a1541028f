"""The smallest run that uses every part, and one finished run of it that several tests read."""

import contextlib
import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from clip_jax.configs import vit_b32
from clip_jax.training import train

# By dotted name, so that they can be given on a command line as well.
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


def config(overrides: dict | None = None) -> ConfigDict:
    """`SETTINGS`, then `overrides`, on top of configs/vit_b32.py:smoke."""
    made = vit_b32.get_config("smoke")
    made.update_from_flattened_dict({**SETTINGS, **(overrides or {})})
    return made


@functools.cache
def finished() -> pathlib.Path:
    """The workdir of an uninterrupted run; to be read or copied, not changed."""
    workdir = folder() / "finished"
    with compile_once():
        train.train(config(), workdir, command="python main.py --config=tiny")
    return workdir


def read_rows(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_metrics(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    """Values by step and name; no such pair may stand there twice."""
    found: dict[tuple[int, str], float] = {}
    for row in read_rows(workdir):
        step = row.pop("step")
        for name, value in row.items():
            assert (step, name) not in found
            found[step, name] = value
    return found


def learned(workdir: pathlib.Path) -> dict[tuple[int, str], str]:
    """Returns the metrics that do not depend on the machine, as text, so that NaN equals NaN.

    Failures of storage are counted by process, so that other tests add to them.
    """
    of_machine = ("train/images_per_second", "train/mfu", "data/", "time/", "host/", "device/")
    of_machine += ("storage/",)
    return {
        key: str(value)
        for key, value in read_metrics(workdir).items()
        if not key[1].startswith(of_machine)
    }


def read_checkpoint(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, read with orbax alone."""
    arrays = {}
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("model", "optimizer"):
            tree = reader.restore(workdir / "checkpoints" / str(step) / item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def assert_same_checkpoint(one: pathlib.Path, other: pathlib.Path, step: int) -> None:
    arrays, others = read_checkpoint(one, step), read_checkpoint(other, step)
    assert len(arrays) > 50
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        assert array.tobytes() == others[path].tobytes(), path


@functools.cache
def folder() -> pathlib.Path:
    """A temporary directory, removed when Python ends."""
    made = tempfile.TemporaryDirectory(prefix="clip_jax_tests_", ignore_cleanup_errors=True)
    folder.kept = made
    return pathlib.Path(made.name)


@contextlib.contextmanager
def compile_once() -> Iterator[None]:
    """Programs compiled within are kept on disk: the same run again spends no time on them."""
    wanted = {
        "jax_compilation_cache_dir": str(folder() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
