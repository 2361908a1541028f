"""A split of a data set as a source, wherever it lies; or how to get it."""

import dataclasses
import itertools
import os
from concurrent import futures

from etils import epath

from clip_jax.data.sources.base import Source
from clip_jax.data.sources.digits import DigitScenes
from clip_jax.errors import UserError
from clip_jax.evaluate.sets import classes, directories, registry
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.sets.views import Part, Relabelled
from clip_jax.storage import locations, remote

_TFDS_DIR = "~/tensorflow_datasets"  # TFDS's own, unless TFDS_DATA_DIR says otherwise
_THREADS = 16  # that look for directories


class NotOnDisk(UserError):
    """A data set or its split is not there; the message names what fetches it."""


def open_split(
    dataset: Dataset,
    role: str,
    data_dir: str,
    *,
    image_size: int,
    fallback_dir: epath.Path | None = None,
) -> Source:
    """A split with the data set's classes.

    Looked for are, in this order: the directory of the set in `data_dir`, in any of its names;
    the set as TFDS prepares it, in `data_dir` or TFDS's own directory.

    Args:
      dataset: the set.
      role: "train", "validation" or "test".
      data_dir: where data sets lie, local, gs:// or s3://; "": only TFDS's own directory.
      image_size: pixels along a side, of embedded sets, which are drawn.
      fallback_dir: directory for indices of shards whose own cannot be written to.

    Returns:
      A source whose labels and `class_names` are those of the set.

    Raises:
      NotOnDisk: it is not there.
      UserError: the set has no such split, or what is there cannot be used.
    """
    if role not in dataset.roles:
        have = ", ".join(dataset.roles) or "none"
        raise UserError(f"The set {dataset.name} has no split for {role}; it has: {have}.")
    if dataset.where.digits:
        return _digits(dataset, role, image_size)
    roots = _roots(dataset, data_dir)
    for root in roots:
        if (found := directories.open_role(dataset, role, root, fallback_dir)) is not None:
            return _relabel(dataset, *found)
    if (place := _prepared(dataset, role, data_dir)) is not None:
        return _relabel(dataset, *_tfds(dataset, role, place, fallback_dir))
    if remote.is_remote(data_dir):
        locations.check_bucket(locations.parse(data_dir))
    raise NotOnDisk(_not_on_disk(dataset, role, data_dir, next(iter(roots), None)))


def with_classes_of(dataset: Dataset, source: Source) -> Dataset:
    """The same set; if its file names no classes, with those that a source of it has."""
    if dataset.class_names:
        return dataset
    return dataclasses.replace(dataset, class_names=source.class_names)


def fetching(dataset: Dataset, data_dir: str) -> str:
    """What gets a set: commands, or what a person must do; "": nothing is known."""
    where, commands = dataset.where, []
    place = data_dir or "DIR"
    if where.hub:
        folder = where.hub.rpartition("/")[2]
        commands.append(f"hf download {where.hub} --repo-type dataset --local-dir {place}/{folder}")
    if where.tfds:
        into = f" --data_dir={data_dir}" if data_dir else ""
        commands.append(f"tfds build {where.tfds.name}{into} --file_format=array_record")
    ways = [" or ".join(commands), where.obtain]
    return " ".join(filter(None, ways))


def _digits(dataset: Dataset, role: str, image_size: int) -> Source:
    splits = dataset.where.digits
    apart = "validation" not in splits and role != "test"
    source = DigitScenes(splits["train" if apart else role], image_size, seed=0)
    return Part(source, dataset.where.validation_share, role == "validation") if apart else source


def _roots(dataset: Dataset, data_dir: str) -> list[epath.Path]:
    """Directories of the set, of those that it may have."""
    where, roots = dataset.where, []
    if where.path:
        roots = [locations.parse(where.path)]
    elif data_dir:
        names = dict.fromkeys((dataset.name, *where.directories))
        names |= dict.fromkeys(f"wds_{name.replace('/', '-')}" for name in names)
        roots = [locations.parse(data_dir) / name for name in names]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        there = pool.map(lambda root: root.is_dir(), roots)
        return list(itertools.compress(roots, there))


def _prepared(dataset: Dataset, role: str, data_dir: str) -> str | None:
    """TFDS's data_dir with the set, found without importing TensorFlow; None: nowhere."""
    tfds = dataset.where.tfds
    if tfds is None or role not in tfds.splits:
        return None
    for place in filter(None, (data_dir, os.environ.get("TFDS_DATA_DIR", _TFDS_DIR))):
        root = locations.parse(place) / tfds.name
        if root.is_dir() and next(iter(root.glob("*/features.json")), None):
            return str(locations.parse(place))
    return None


def _tfds(
    dataset: Dataset, role: str, place: str, fallback_dir: epath.Path | None
) -> tuple[Source, str]:
    from clip_jax.configs import default
    from clip_jax.data.sources import opening

    form = dataset.where.tfds
    assert form is not None
    keys = ("image_key", "text_key", "label_key", "group_keys")
    spec = default.source(
        type="tfds",
        name=form.name,
        path=place,
        split=form.splits[role],
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


def _not_on_disk(dataset: Dataset, role: str, data_dir: str, there: epath.Path | None) -> str:
    name, where = dataset.name, dataset.where
    if there is not None:
        message = f"The {role} split of {name} is not in {there}"
        if names := where.splits.get(role):
            message += f", which has no directory {' or '.join(names)}"
    else:
        folder = where.hub.rpartition("/")[2]
        looked = [f"{data_dir}/{n}" for n in (name, folder) if n and data_dir]
        if where.tfds:
            looked.append(f"{where.tfds.name} of TFDS")
        message = f"The set {name} is not on disk (looked for {', '.join(looked) or 'nothing'})"
        if not data_dir:
            message += "; name the directory of data sets by --data_dir"
    way = fetching(dataset, data_dir)
    return f"{message}. Fetch it by: {way}" if way else f"{message}."
