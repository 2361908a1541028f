"""The description of an evaluation data set: classes, prompts, splits and location."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from clip_jax.errors import UserError

KINDS = ("classification", "retrieval")
SPLITS = ("train", "validation", "test")
METRICS = ("accuracy", "mean_per_class", "map_11_point", "roc_auc", "mean_top1_top5")


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A set as TFDS prepares it.

    Attributes:
      name: name with its configuration, such as "voc/2007".
      splits: name of each split in TFDS's notation.
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
      files: paths for each split, relative to the set's directory; the first that exists is
        taken. A pattern stands for several .parquet files.
      image_key, text_key, label_key, group_keys: columns; "": the usual one, or none.
    """

    files: Mapping[str, tuple[str, ...]]
    image_key: str = ""
    text_key: str = ""
    label_key: str = ""
    group_keys: str = ""


@dataclasses.dataclass(frozen=True)
class Location:
    """The places of a set, and the way to get it.

    Attributes:
      path: the set's own directory; "": it is one of `directories` in the data directory.
      directories: names of its directory, CLIP_benchmark's among them.
      splits: possible directory names for each split.
      validation_fraction: part of the training split that stands in for a missing validation split.
      tfds: the set as TFDS prepares it; None: TFDS does not have it, or not with these labels.
      table: tables that list the images; None: directories tell.
      digits: split of the embedded digits for each split.
      hub: repository with tar shards in CLIP_benchmark's layout; "": none.
      obtain: instructions for a person where a command does not suffice; "": none.
    """

    path: str = ""
    directories: tuple[str, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    validation_fraction: float = 0.1
    tfds: Tfds | None = None
    table: Table | None = None
    digits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hub: str = ""
    obtain: str = ""


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names of the classes in sources, where they differ from `Dataset.class_names`.

    Attributes:
      ids: identifiers of the classes, such as WordNet's, in the order of the class names.
      aliases: class name, or its first alternative, for each further name of a class.
      ignored: names of classes that are not evaluated: their images have no label.
      same_names: names that several classes share on purpose.
      numbered: whether labels without names count the classes in the order of the class names.
    """

    ids: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    same_names: tuple[str, ...] = ()
    numbered: bool = False


class PromptSet(NamedTuple):
    """Class names and templates that belong together.

    Attributes:
      name: name of the set of prompts.
      class_names: names by label.
      templates: texts with one {} each.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An evaluation data set.

    Attributes:
      name: name on the command line.
      title: name in reports.
      kind: one of `KINDS`.
      metric: one of `METRICS`; "" for retrieval.
      class_names: names by label; alternatives of one class joined by "|". Empty: the source's own.
      prompts: sets of templates with one {} each, by name: "paper", "clip_benchmark", ...
      class_sets: class names of a set of prompts that has its own, by name, in the same order.
      multi_label: whether an image has any number of classes.
      partial: whether classes may have no image.
      collections: collections that it belongs to.
      base: reference set that this one is a shift of; "": none.
      base_classes: for each class, its classes in the base.
      added_classes: for a bias probe, names that are offered beside the classes, by category.
      further_classes: names that are offered besides in a second step, by category, as "child" in
        the paper.
      where: places of the set.
      naming: names of the classes in sources.
      sources: references for these facts.
      notes: remarks for people who compare numbers.
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
    where: Location = dataclasses.field(default_factory=Location)
    naming: Naming = dataclasses.field(default_factory=Naming)
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The members of `SPLITS` that it has in some form; a directory may still lack one."""
        where = self.where
        forms = [where.splits, where.tfds.splits if where.tfds else {}, where.digits]
        forms.append(where.table.files if where.table else {})
        held = {split for form in forms for split in form}
        # Without a validation split, a part of the training split stands in.
        return tuple(s for s in SPLITS if s in held or (s == "validation" and "train" in held))

    @property
    def group_keys(self) -> tuple[str, ...]:
        """The keys of the group labels, for bias probes."""
        forms = [form for form in (self.where.table, self.where.tfds) if form is not None]
        return tuple(filter(None, forms[0].group_keys.split(","))) if forms else ()

    def prompt_set(self, name: str) -> PromptSet:
        """Returns the class names and templates of a set of prompts.

        A single set of prompts, as data sets of the user's own have, answers to any name.

        Raises:
          UserError: there is no set of this name.
        """
        found = name if name in self.prompts or len(self.prompts) != 1 else next(iter(self.prompts))
        if found not in self.prompts:
            have = ", ".join(self.prompts) or "none"
            raise UserError(f"The set {self.name} has no prompts named {name!r}; it has: {have}.")
        class_names = self.class_sets.get(found, self.class_names)
        return PromptSet(found, class_names, self.prompts[found])


def inherit(shift: Dataset, base: Dataset) -> Dataset:
    """Completes a shift with the class names, identifiers and prompts of its base.

    Raises:
      UserError: a class stands for several classes of the base, and needs a name of its own.
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
    """Checks that the base has the classes of a shift; UserError where it has not."""
    for number in (number for each in shift.base_classes for number in each):
        if not isinstance(number, int) or not 0 <= number < len(base.class_names):
            raise UserError(
                f"base_classes of {shift.name} has {number!r}, but the classes of {base.name} are "
                f"numbered from 0 to {len(base.class_names) - 1}."
            )


def check(dataset: Dataset) -> Dataset:
    """Checks the names and prompts of a set, and returns it.

    Raises:
      UserError: a template without its slot, class names twice, or lists of different lengths.
    """
    for name, templates in dataset.prompts.items():
        check_templates(templates, f"the prompts {name!r} of {dataset.name}")
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
    """Checks that each template has one slot for the class name; UserError where not."""
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(
                f"The template {template!r} in {what} must have exactly one {{}} for the class "
                "name."
            )


def check_names(names: Sequence[str], same_names: Sequence[str], what: str) -> None:
    """Checks that no class name is empty or stands for two classes; UserError where one does."""
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
    """Returns the names of the classes that no example has, by the labels of each example."""
    seen = {label for each in labels for label in each}
    return [name for label, name in enumerate(class_names) if label not in seen]


def check_classes(labels: Iterable[Sequence[int]], class_names: Sequence[str], what: str) -> None:
    """Checks that every class has images.

    Args:
      labels: labels of each example, () where it has none.
      class_names: names of all classes.
      what: name of the split in the message, such as "the training split of cifar10".

    Raises:
      UserError: some classes have no images; it names them.
    """
    if missing := missing_classes(labels, class_names):
        shown = ", ".join(name.split("|")[0] for name in missing[:5])
        raise UserError(
            f"{len(missing)} of {len(class_names)} classes have no image in {what}: {shown}"
            f"{', ...' if len(missing) > 5 else ''}. Is it the whole split, and are its classes "
            "those of the set?"
        )
