"""Data sets of the user's own: a directory, or a JSON file that describes one."""

import dataclasses
from collections.abc import Callable

from etils import epath

from clip_jax.data.sources import tar_labels
from clip_jax.errors import UserError
from clip_jax.evaluate.sets import dataset, directories, reading
from clip_jax.evaluate.sets.dataset import Dataset, Where
from clip_jax.storage import locations, ranges

_TEMPLATES = ("a photo of a {}.",)


def read(path: epath.Path, get: Callable[[str], Dataset]) -> Dataset:
    """The data set at a path: a .json file or a directory.

    Args:
      path: of either.
      get: finds the set that a shift names as its base.

    Raises:
      UserError: it describes no data set that can be evaluated.
    """
    if path.is_dir():
        return _directory(path)
    if path.suffix != ".json":
        raise UserError(
            f"{path} is no data set: give a directory of class-named folders, or a .json file."
        )
    found = reading.read(ranges.read(path), path.stem, str(path))
    where = found.where
    if where.tfds is None and not (where.directories or where.digits):
        where = dataclasses.replace(where, path=str(path.parent / locations.parse(where.path)))
    found = dataclasses.replace(found, where=where)
    if found.base and found.class_names:
        dataset.check_base(found, get(found.base))
    elif found.base:
        found = dataset.inherit(found, get(found.base))
    if found.kind == "classification" and not found.class_names:
        found = dataclasses.replace(found, **_classes(epath.Path(where.path), found))
    if found.kind == "classification" and not found.prompts:
        found = dataclasses.replace(found, prompts={"own": _TEMPLATES})
    return dataset.check(found)


def _directory(root: epath.Path) -> Dataset:
    """A set that its directory alone describes."""
    layout = tar_labels.read_layout(root)
    where = Where(path=str(root), splits=_splits(root))
    name = root.name or str(root)
    found = Dataset(name, name, "classification", "accuracy", where=where)
    if layout.type == "retrieval":
        return dataclasses.replace(found, kind="retrieval", metric="")
    if layout.type == "multilabel":
        found = dataclasses.replace(found, metric="map_11_point", multi_label=True)
    found = dataclasses.replace(found, **_classes(root, found))
    return dataset.check(
        dataclasses.replace(found, prompts={"own": layout.templates or _TEMPLATES})
    )


def _splits(root: epath.Path) -> dict[str, tuple[str, ...]]:
    """The splits that a directory has; where there are other folders too, those are classes."""
    folders = {name.partition("/")[0] for name in locations.tree(root) if "/" in name}
    folders = {name for name in folders if name[0] != "."}
    names = {name for names in reading.SPLITS.values() for name in names}
    if folders and folders <= names:
        return {role: names for role, names in reading.SPLITS.items() if folders & set(names)}
    return {"test": ()}


def _classes(root: epath.Path, found: Dataset) -> dict:
    """The class names that a directory tells, as fields of the set."""
    if not found.where.path:
        raise UserError(f"The description of {found.name} must list its class_names.")
    if names := tar_labels.read_layout(root).class_names:
        naming = dataclasses.replace(found.naming, numbered=True)
        return {"class_names": names, "naming": naming}
    folders = directories.class_folders(root, found.where.splits)
    if not folders:
        raise UserError(
            f"The classes of {root} are not known: it has neither folders named by class (with "
            "images, and none or train/ and test/ above them) nor a classnames.txt, one name in a "
            "line. A JSON file with class_names can describe it; see clip_jax/datasets/README.md."
        )
    # The folder is an identifier; its name is what a prompt says.
    spoken = tuple(name.replace("/", " ").replace("_", " ") for name in folders)
    return {"class_names": spoken, "naming": dataclasses.replace(found.naming, ids=folders)}
