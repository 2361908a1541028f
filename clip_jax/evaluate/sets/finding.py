"""Opens a split of a data set wherever it lies, or names the command that fetches it."""

import dataclasses
import itertools
import os
from concurrent import futures

from etils import epath

from clip_jax.configs import default
from clip_jax.data.sources import opening
from clip_jax.data.sources.base import Source
from clip_jax.data.sources.digits import DigitScenes
from clip_jax.errors import UserError
from clip_jax.evaluate.sets import classes, directories, registry
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.sets.views import Part, Relabelled
from clip_jax.storage import locations, remote

_TFDS_DIR = "~/tensorflow_datasets"  # TFDS's own, unless TFDS_DATA_DIR says otherwise
_THREADS = 16  # look-ups of directories at a time


class NotOnDisk(UserError):
    """A data set or its split is not there; the message says how to fetch it."""


def open_split(
    dataset: Dataset,
    split: str,
    data_dir: str,
    *,
    image_size: int,
    fallback_dir: epath.Path | None = None,
) -> Source:
    """Opens a split with the data set's classes.

    It looks first for the directory of the set in `data_dir`, under any of its names, then for the
    set as TFDS prepares it, in `data_dir` or TFDS's own directory.

    Args:
      dataset: the set.
      split: "train", "validation" or "test".
      data_dir: directory of data sets, local, gs:// or s3://; "": only TFDS's own directory.
      image_size: pixels along a side of embedded sets, which are drawn.
      fallback_dir: directory for indices of shards whose own cannot be written to.

    Returns:
      A source whose labels and `class_names` are those of the set.

    Raises:
      NotOnDisk: it is not there.
      UserError: the set has no such split, or what is there cannot be used.
    """
    if split not in dataset.splits:
        have = ", ".join(dataset.splits) or "none"
        raise UserError(f"The set {dataset.name} has no split for {split}; it has: {have}.")
    if dataset.where.digits:
        return _digits(dataset, split, image_size)
    roots = _roots(dataset, data_dir)
    for root in roots:
        if (found := directories.open_split(dataset, split, root, fallback_dir)) is not None:
            return _relabel(dataset, *found)
    if (tfds_dir := _prepared(dataset, split, data_dir)) is not None:
        return _relabel(dataset, *_tfds(dataset, split, tfds_dir, fallback_dir))
    if remote.is_remote(data_dir):
        locations.check_bucket(locations.parse(data_dir))
    raise NotOnDisk(_not_on_disk(dataset, split, data_dir, next(iter(roots), None)))


def with_classes_of(dataset: Dataset, source: Source) -> Dataset:
    """Completes a set that names no classes with those of its source."""
    if dataset.class_names:
        return dataset
    return dataclasses.replace(dataset, class_names=source.class_names)


def fetching(dataset: Dataset, data_dir: str) -> str:
    """Returns commands or instructions that fetch a set; "": none are known."""
    where, commands = dataset.where, []
    target = data_dir or "DIR"
    if where.hub:
        folder = where.hub.rpartition("/")[2]
        commands.append(
            f"hf download {where.hub} --repo-type dataset --local-dir {target}/{folder}"
        )
    if where.tfds:
        into = f" --data_dir={data_dir}" if data_dir else ""
        commands.append(f"tfds build {where.tfds.name}{into} --file_format=array_record")
    ways = [" or ".join(commands), where.obtain]
    return " ".join(filter(None, ways))


def _digits(dataset: Dataset, split: str, image_size: int) -> Source:
    splits = dataset.where.digits
    if split == "test" or "validation" in splits:
        return DigitScenes(splits[split], image_size, seed=0)
    source = DigitScenes(splits["train"], image_size, seed=0)
    return Part(source, dataset.where.validation_fraction, split == "validation")


def _roots(dataset: Dataset, data_dir: str) -> list[epath.Path]:
    """Returns the directories of the set that exist."""
    where, roots = dataset.where, []
    if where.path:
        roots = [locations.parse(where.path)]
    elif data_dir:
        names = dict.fromkeys((dataset.name, *where.directories))
        names |= dict.fromkeys(f"wds_{name.replace('/', '-')}" for name in names)
        roots = [locations.parse(data_dir) / name for name in names]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        exists = pool.map(lambda root: root.is_dir(), roots)
        return list(itertools.compress(roots, exists))


def _prepared(dataset: Dataset, split: str, data_dir: str) -> str | None:
    """Finds TFDS's data_dir with the set, without importing TensorFlow; None: nowhere."""
    tfds = dataset.where.tfds
    if tfds is None or split not in tfds.splits:
        return None
    for tfds_dir in filter(None, (data_dir, os.environ.get("TFDS_DATA_DIR", _TFDS_DIR))):
        root = locations.parse(tfds_dir) / tfds.name
        if root.is_dir() and next(iter(root.glob("*/features.json")), None):
            return str(locations.parse(tfds_dir))
    return None


def _tfds(
    dataset: Dataset, split: str, tfds_dir: str, fallback_dir: epath.Path | None
) -> tuple[Source, str]:
    form = dataset.where.tfds
    assert form is not None
    keys = ("image_key", "text_key", "label_key", "group_keys")
    spec = default.source(
        type="tfds",
        name=form.name,
        path=tfds_dir,
        split=form.splits[split],
        **{key: getattr(form, key) for key in keys},
    )
    source = opening.create(spec, image_size=0, seed=0, fallback_dir=fallback_dir)
    return source, f"{form.name} of TFDS"


def _relabel(dataset: Dataset, source: Source, where: str) -> Source:
    if dataset.kind == "retrieval" or not dataset.class_names:
        return source
    base = registry.base_of(dataset)
    numbers = classes.match(dataset, base, source.class_names, where)
    return Relabelled(source, numbers, dataset.class_names)


def _not_on_disk(dataset: Dataset, split: str, data_dir: str, found: epath.Path | None) -> str:
    name, where = dataset.name, dataset.where
    if found is not None:
        message = f"The {split} split of {name} is not in {found}"
        if names := where.splits.get(split):
            message += f", which has no directory {' or '.join(names)}"
    else:
        folder = where.hub.rpartition("/")[2]
        looked = [f"{data_dir}/{n}" for n in (name, folder) if n and data_dir]
        if where.tfds:
            looked.append(f"{where.tfds.name} of TFDS")
        message = f"The set {name} is not on disk (looked for {', '.join(looked) or 'nothing'})"
        if not data_dir:
            message += "; name the directory of data sets by --data_dir, in training "
            message += "--config.eval.data_dir"
    commands = fetching(dataset, data_dir)
    return f"{message}. Fetch it by: {commands}" if commands else f"{message}."
