"""Data sets as directories: ROOT/SPLIT with tar shards, class-named folders or a table."""

from collections.abc import Mapping, Sequence

from etils import epath

from clip_jax.data.sources import tar_labels
from clip_jax.data.sources.base import IMAGE_SUFFIXES, Source
from clip_jax.data.sources.folder import ImageFolder
from clip_jax.data.sources.labels import name_order
from clip_jax.data.sources.tar import TarShards
from clip_jax.errors import UserError
from clip_jax.evaluate.sets import classes
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.sets.views import Part
from clip_jax.storage import locations


def open_split(
    dataset: Dataset, split: str, root: epath.Path, fallback_dir: epath.Path | None
) -> tuple[Source, str] | None:
    """Opens a split of a set in a directory.

    Args:
      dataset: the set.
      split: "train", "validation" or "test".
      root: the directory.
      fallback_dir: directory for indices of shards whose own cannot be written to.

    Returns:
      The source, labels as stored, and its path, for messages; None: the split is not there.

    Raises:
      UserError: it is there and cannot be used.
    """
    where = dataset.where
    path = _path(dataset, split, root)
    if path is None and split == "validation":
        path = _path(dataset, "train", root)
        fraction, held_out = where.validation_fraction, True
    elif split == "train" and _path(dataset, "validation", root) is None:
        fraction, held_out = where.validation_fraction, False
    else:
        fraction, held_out = 0.0, False
    if path is None:
        return None
    source = _open(dataset, root, path, fallback_dir)
    return (Part(source, fraction, held_out) if fraction else source), str(path)


def class_folders(root: epath.Path, splits: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the class folders of all splits, or of the root if it has none; sorted."""
    directories = [root / name for names in splits.values() for name in names]
    found = {name for directory in directories for name in _image_folders(directory)}
    return tuple(sorted(found or _image_folders(root), key=name_order))


def _path(dataset: Dataset, split: str, root: epath.Path) -> epath.Path | None:
    """Returns the table or directory of a split; None: there is none."""
    where = dataset.where
    for name in where.table.files.get(split, ()) if where.table else ():
        if (root / name).exists() or ("*" in name and locations.expand(str(root / name), "")):
            return root / name
    for name in where.splits.get(split, ()):
        if (root / name).is_dir():
            return root / name
    everywhere = [root / name for names in where.splits.values() for name in names]
    # A set without splits, such as a shift as it is distributed, is for testing.
    if split == "test" and split in where.splits and not any(each.is_dir() for each in everywhere):
        return root if _image_folders(root) else None
    return None


def _open(
    dataset: Dataset, root: epath.Path, path: epath.Path, fallback_dir: epath.Path | None
) -> Source:
    source = _source(dataset, root, path, fallback_dir)
    if dataset.kind == "classification" and source.labels is None:
        raise UserError(
            f"The images of {path} have no classes: for {dataset.name} they should lie in folders "
            "named by class, without captions beside them, or stand in a table that a JSON file "
            "describes (clip_jax/evaluate/sets/README.md)."
        )
    if source.labels is not None and not source.class_names and dataset.class_names:
        classes.check_numbers(source.labels.largest, dataset, str(path))
    return source


def _source(
    dataset: Dataset, root: epath.Path, path: epath.Path, fallback_dir: epath.Path | None
) -> TarShards | ImageFolder:
    if path.is_dir() and any(each.suffix == ".tar" for each in path.iterdir()):
        type_ = tar_labels.read_layout(root).type
        label_key = {"retrieval": "", "multilabel": "npy"}.get(type_, "cls")
        return TarShards(str(path), "", label_key, fallback_dir=fallback_dir)
    by_image = dataset.kind == "retrieval"
    table = dataset.where.table
    if table is not None and not path.is_dir():
        keys = table.text_key, table.label_key, table.group_keys
        return ImageFolder(str(path), *keys, image_key=table.image_key, by_image=by_image)
    return ImageFolder(str(path), "", "", by_image=by_image)


def _image_folders(root: epath.Path) -> set[str]:
    """Returns the folders below the root that have images, relative to it."""
    visible = (name for name in locations.tree(root) if "/." not in f"/{name}")
    images = (name for name in visible if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES)
    return {name.rpartition("/")[0] for name in images} - {""}
