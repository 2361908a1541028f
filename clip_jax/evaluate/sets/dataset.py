"""What is known of an evaluation data set: its classes, prompts, splits and where it lies."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from clip_jax.errors import UserError

KINDS = ("classification", "retrieval")
ROLES = ("train", "validation", "test")
METRICS = ("accuracy", "mean_per_class", "map_11_point", "roc_auc", "mean_top1_top5")


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A set as TFDS prepares it.

    Attributes:
      name: with its configuration, such as "voc/2007".
      splits: in TFDS's notation, by role.
      image_key, text_key, label_key, group_keys: features; "": the usual one, or none.
    """

    name: str
    splits: Mapping[str, str]
    image_key: str = ""
    text_key: str = ""
    label_key: str = ""
    group_keys: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Tables that list the images of a set.

    Attributes:
      files: by role, relative to the set's directory; the first that is there is taken. A pattern
        stands for several .parquet files.
      image_key, text_key, label_key, group_keys: columns; "": the usual one, or none.
    """

    files: Mapping[str, tuple[str, ...]]
    image_key: str = ""
    text_key: str = ""
    label_key: str = ""
    group_keys: str = ""


@dataclasses.dataclass(frozen=True)
class Where:
    """Where a set may lie, and how to get it.

    Attributes:
      path: the set's own directory; "": it is one of `directories` in the data directory.
      directories: names that its directory may have, CLIP_benchmark's among them.
      splits: by role, names that the directory of the split may have.
      validation_share: of the training split, where a directory has none for validation.
      tfds: as prepared by TFDS; None: TFDS does not have it, or not with these labels.
      table: that lists the images; None: directories tell.
      digits: by role, splits of the embedded digits.
      hub: the repository with tar shards in CLIP_benchmark's layout; "": none.
      obtain: what a person must do where a command does not suffice; "": nothing.
    """

    path: str = ""
    directories: tuple[str, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    validation_share: float = 0.1
    tfds: Tfds | None = None
    table: Table | None = None
    digits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hub: str = ""
    obtain: str = ""


@dataclasses.dataclass(frozen=True)
class Naming:
    """How sources name the classes, where it is not as `Dataset.class_names` does.

    Attributes:
      ids: identifiers of the classes, such as WordNet's, in the order of the class names.
      aliases: other names of classes, and the class name or its first alternative.
      left_out: names of classes that are not evaluated: their images have no label.
      same_names: names that several classes share on purpose.
      numbered: whether labels without names count the classes in the order of the class names.
    """

    ids: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    same_names: tuple[str, ...] = ()
    numbered: bool = False


class PromptSet(NamedTuple):
    """Class names and templates that belong together, and what they are called."""

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An evaluation data set.

    Attributes:
      name: by which it is asked for.
      title: for people.
      kind: of `KINDS`.
      metric: of `METRICS`; "" for retrieval.
      class_names: by label; alternatives of one class joined by "|". Empty: the source's own.
      prompts: sets of templates with one {} each, by name: "paper", "clip_benchmark", ...
      class_sets: class names in the same order, where a set of prompts has its own.
      multi_label: whether an image has any number of classes.
      partial: whether classes may have no image.
      collections: that it belongs to.
      base: the set that this one is a shift of; "": none.
      base_classes: for each class, the classes of the base that it stands for.
      added_classes: for a bias probe, names that are offered beside the classes, by category.
      further_classes: likewise, offered beside these once more, as the paper did with "child".
      where: it is to be found.
      naming: of its classes in sources.
      sources: where these facts come from.
      notes: what one should know of it.
    """

    name: str
    title: str
    kind: str
    metric: str
    class_names: tuple[str, ...] = ()
    prompts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    class_sets: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    multi_label: bool = False
    partial: bool = False
    collections: tuple[str, ...] = ()
    base: str = ""
    base_classes: tuple[tuple[int, ...], ...] = ()
    added_classes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    further_classes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    where: Where = dataclasses.field(default_factory=Where)
    naming: Naming = dataclasses.field(default_factory=Naming)
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """Of `ROLES`, those that it has in some form; a directory may still lack one."""
        where = self.where
        forms = [where.splits, where.tfds.splits if where.tfds else {}, where.digits]
        forms.append(where.table.files if where.table else {})
        held = {role for form in forms for role in form}
        # What has no split for validation lends a part of its training split.
        return tuple(r for r in ROLES if r in held or (r == "validation" and "train" in held))

    @property
    def group_keys(self) -> tuple[str, ...]:
        """What its examples are grouped by, for bias probes."""
        forms = [form for form in (self.where.table, self.where.tfds) if form is not None]
        return tuple(filter(None, forms[0].group_keys.split(","))) if forms else ()

    def prompt_set(self, name: str) -> PromptSet:
        """The class names and templates of a set of prompts.

        Where there is a single one, as for sets of the user's own, it is that one, whatever its
        name.

        Raises:
          UserError: there is none of this name.
        """
        found = name if name in self.prompts or len(self.prompts) != 1 else next(iter(self.prompts))
        if found not in self.prompts:
            have = ", ".join(self.prompts) or "none"
            raise UserError(f"The set {self.name} has no prompts named {name!r}; it has: {have}.")
        class_names = self.class_sets.get(found, self.class_names)
        return PromptSet(found, class_names, self.prompts[found])


def inherit(shift: Dataset, base: Dataset) -> Dataset:
    """Class names, identifiers and prompts of the base, for the classes that the shift has.

    Raises:
      UserError: a class stands for several of the base, and so needs a name of its own.
    """
    numbers = shift.base_classes or tuple((label,) for label in range(len(base.class_names)))
    if any(len(each) != 1 for each in numbers):
        raise UserError(
            f"A class of {shift.name} stands for none or several of {base.name}'s in base_classes: "
            "give class_names of its own."
        )
    check_base(shift, base)

    def part(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names[label] for (label,) in numbers) if names else ()

    ids, same_names = part(base.naming.ids), base.naming.same_names
    return dataclasses.replace(
        shift,
        class_names=part(base.class_names),
        class_sets={name: part(names) for name, names in base.class_sets.items()},
        prompts=shift.prompts or base.prompts,
        base_classes=numbers,
        naming=dataclasses.replace(shift.naming, ids=ids, same_names=same_names),
    )


def check_base(shift: Dataset, base: Dataset) -> None:
    """Raises UserError where a shift has classes that its base does not have."""
    for number in (number for each in shift.base_classes for number in each):
        if not isinstance(number, int) or not 0 <= number < len(base.class_names):
            raise UserError(
                f"base_classes of {shift.name} has {number!r}, but the classes of {base.name} are "
                f"numbered from 0 to {len(base.class_names) - 1}."
            )


def check(dataset: Dataset) -> Dataset:
    """The same set, if its names and prompts can be used.

    Raises:
      UserError: a template without its slot, class names twice, or lists that do not fit.
    """
    for role, templates in dataset.prompts.items():
        check_templates(templates, f"the prompts {role!r} of {dataset.name}")
    lists = {"class_names": dataset.class_names, **dataset.class_sets}
    for which, names in lists.items():
        check_names(names, dataset.naming.same_names, f"{which} of {dataset.name}")
    lists |= {"ids": dataset.naming.ids, "base_classes": dataset.base_classes}
    for which, values in lists.items():
        if values and len(values) != len(dataset.class_names):
            raise UserError(
                f"The set {dataset.name} has {len(dataset.class_names)} class names, but "
                f"{len(values)} in {which}: they must be as many, in the same order."
            )
    for field, value, choices in (
        ("kind", dataset.kind, KINDS),
        ("metric", dataset.metric, METRICS if dataset.kind == "classification" else ("",)),
    ):
        if value not in choices:
            raise UserError(
                f"The set {dataset.name} has the {field} {value!r}, and must have one of "
                f"{', '.join(map(repr, choices))}."
            )
    return dataset


def check_templates(templates: Iterable[str], what: str) -> None:
    """Raises UserError where a template has no slot for the class name, or several."""
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(
                f"The template {template!r} in {what} must have exactly one {{}} for the class "
                "name."
            )


def check_names(names: Sequence[str], same_names: Sequence[str], what: str) -> None:
    """Raises UserError where a class name is empty, or where two classes share one."""
    spoken = [name for alternatives in names for name in set(alternatives.split("|"))]
    if not all(name.strip() for name in spoken):
        raise UserError(f"There is an empty name among the {what}.")
    twice = [name for name, count in Counter(spoken).items() if count > 1]
    if unmeant := [name for name in twice if name not in same_names]:
        raise UserError(
            f"The name {unmeant[0]!r} stands for {spoken.count(unmeant[0])} classes in the {what}: "
            "no prompt could tell them apart. Give each class a name of its own; alternatives of "
            'one class are joined by "|".'
        )


def missing_classes(labels: Iterable[Sequence[int]], class_names: Sequence[str]) -> list[str]:
    """Names of the classes that none of `labels` (the labels of each example) has."""
    seen = {label for each in labels for label in each}
    return [name for label, name in enumerate(class_names) if label not in seen]


def check_classes(labels: Iterable[Sequence[int]], class_names: Sequence[str], what: str) -> None:
    """Checks that every class has images.

    Args:
      labels: of each example, () where it has none.
      class_names: of all classes.
      what: names the split in the message, such as "the training split of cifar10".

    Raises:
      UserError: names the classes without images, and how many they are.
    """
    if missing := missing_classes(labels, class_names):
        shown = ", ".join(name.split("|")[0] for name in missing[:5])
        raise UserError(
            f"{len(missing)} of {len(class_names)} classes have no image in {what}: {shown}"
            f"{', ...' if len(missing) > 5 else ''}. Is it the whole split, and are its classes "
            "those of the set?"
        )
