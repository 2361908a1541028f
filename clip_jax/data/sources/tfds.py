"""Prepared TensorFlow Datasets (TFDS), read at random from ArrayRecord or TFRecord files."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from ml_collections import ConfigDict
from tensorflow_datasets.core import decode

import clip_jax.common.tensorflow_cpu  # noqa: F401  before TFDS brings TensorFlow, with its GPUs
from clip_jax.data.sources import captions, reading, tfrecord
from clip_jax.data.sources.base import Example, Request
from clip_jax.data.sources.labels import GROUP_SETTINGS, class_ids, group, parse_groups
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import remote

_IMAGE_KEYS = ("image",)
_TEXT_KEYS = ("caption", "captions/text", "captions", "text", "title")


def open_source(request: Request) -> "TfdsSource":
    """Opens a source of type "tfds"."""
    return TfdsSource(request.spec, request.fallback_dir)


class TfdsSource:
    """One split of a dataset that TFDS has prepared.

    All captions of an image are kept (a sequence feature, such as "captions/text" of
    coco_captions). A set with `label_key` needs no captions.

    Attributes:
      problems: number of damaged files, by kind.
      class_names: names of the classes, from the label feature.
      templates: empty.
    """

    templates: tuple[str, ...] = ()

    def __init__(self, spec: ConfigDict, fallback_dir: epath.Path | None = None):
        """Opens the split; TFRecord files are passed through once to find their records.

        Args:
          spec: name, path (data_dir; "": that of TFDS), split, image_key, text_key, label_key and
            group_keys as in `source()` of configs/default.py.
          fallback_dir: directory for the index of TFRecord files where theirs cannot be written to.

        Raises:
          UserError: no such dataset, split or feature, or the dataset is not prepared.
        """
        builder = _builder(spec.name, spec.path)
        features = builder.info.features
        leaves = _leaves(features)
        self._image_key = _choose(leaves, spec.image_key, _IMAGE_KEYS, "image_key")
        self._fields = captions.parse_fields(spec.text_key) or tuple(
            captions.Field(name, 1.0)
            for name in [_choose(leaves, "", _TEXT_KEYS, "text_key", spec.label_key)]
            if name
        )
        for field in self._fields:
            _choose(leaves, field.name, (), "text_key")
        self._label_key = _choose(leaves, spec.label_key, (), "label_key", True)
        if self._label_key and np.dtype(leaves[self._label_key].np_dtype).kind not in "biuf":
            raise UserError(
                f"The feature source.label_key = {spec.label_key!r} of {spec.name} holds texts, "
                "which TFDS does not number: name a feature of type ClassLabel, or of integers."
            )
        groups = parse_groups(spec.group_keys)
        self._groups = {_choose(leaves, key, (), GROUP_SETTINGS): leaves[key] for key in groups}
        texts = (name for name, _ in self._fields)
        self._features, self._decoders = _partial(
            features, self._image_key, self._label_key, *texts, *self._groups
        )
        label = leaves.get(self._label_key)
        self.class_names: tuple[str, ...] = tuple(getattr(label, "names", None) or ())
        self._key = f"{builder.info.full_name} {spec.split}"
        self.problems: Counter[str] = Counter()
        self._records = _records(builder, spec.split, self.problems, fallback_dir)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return self.start([index])[0]()

    def listing(self) -> list[str]:
        """Lists the data set and its files, as `Source` says."""
        files = self._records.listing() if isinstance(self._records, tfrecord.TfRecords) else []
        return [self._key, *files]

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read records, as `reading.start` does."""
        begun = zip(indices, reading.start(self._records, indices))
        return [functools.partial(self._example, index, read) for index, read in begun]

    def _example(self, index: int, read: Callable[[], bytes]) -> Example:
        key = f"{self._key} {index}"
        try:
            values = self._features.deserialize_example_np(read(), decoders=self._decoders)
        except OSError as error:
            raise BadExample("unreadable record", key, str(error)) from None
        texts = [(_lookup(values, name), weight) for name, weight in self._fields]
        return Example(
            image=_image(_lookup(values, self._image_key)),
            captions=captions.collect(texts, key, required=not self._label_key),
            labels=class_ids(_lookup(values, self._label_key)) if self._label_key else (),
            key=key,
            groups=tuple(
                _group(_lookup(values, name), feature) for name, feature in self._groups.items()
            ),
        )


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if not name:
        raise UserError('A TFDS source needs source.name, such as "coco_captions".')
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"TFDS knows no dataset source.name = {name!r}, and none of this name is prepared in "
            f"{data_dir or 'its data_dir'}. Names: https://www.tensorflow.org/datasets/catalog."
        ) from None
    except (ValueError, AssertionError) as error:  # no such configuration or version
        raise UserError(f"TFDS cannot use source.name = {name!r}: {error}") from None
    if not builder.is_prepared():
        where = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"The dataset {name!r} is not prepared in {builder.data_dir}. Prepare it once with: "
            f"tfds build {name}{where} --file_format=array_record"
        )
    return builder


def _leaves(features: Any, prefix: str = "") -> dict[str, Any]:
    """The features that hold values, by path; a sequence counts as the feature that it holds."""
    while isinstance(features, tfds.features.Sequence):
        features = features.feature
    if not isinstance(features, tfds.features.FeaturesDict):
        return {prefix: features}
    found = {}
    for name, feature in features.items():
        found |= _leaves(feature, f"{prefix}/{name}" if prefix else name)
    return found


def _choose(
    leaves: dict[str, Any], wanted: str, usual: tuple[str, ...], field: str, optional: Any = False
) -> str:
    """Returns the path of a feature: the wanted one, or the first usual one; "" if optional."""
    for key in (wanted,) if wanted else usual:
        if key in leaves:
            return key
    if optional and not wanted:
        return ""
    raise UserError(
        f"The dataset has no feature {wanted or ' or '.join(usual)!r}. Set source.{field} to one "
        f"of: {', '.join(sorted(leaves))}."
    )


def _partial(features: Any, image_key: str, *others: str) -> tuple[Any, dict[str, Any]]:
    """Returns the features that are needed, and decoders that leave images encoded."""
    wanted: dict[str, Any] = {}
    for key in filter(None, (image_key, *others)):
        _set(wanted, key, True)
    part = decode.PartialDecoding(wanted).extract_features(features)
    decoders: dict[str, Any] = {}
    if isinstance(_leaves(features)[image_key], tfds.features.Image):
        _set(decoders, image_key, decode.SkipDecoding())
    return part, decoders


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split("/")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _lookup(tree: Any, key: str) -> Any:
    return functools.reduce(lambda node, name: node[name], key.split("/"), tree)


def _group(value: Any, feature: Any) -> Any:
    names = getattr(feature, "names", None)
    return names[int(value)] if names else group(value)


def _image(value: Any) -> bytes | np.ndarray:
    """Returns bytes unchanged, and grey arrays with three channels."""
    if isinstance(value, np.ndarray) and value.shape[-1] == 1:
        return np.repeat(value, 3, axis=-1)
    return value


def _records(
    builder: tfds.core.DatasetBuilder,
    split: str,
    problems: Counter[str],
    fallback_dir: epath.Path | None,
) -> tfrecord.TfRecords | Sequence[bytes]:
    """Opens the serialised examples of a split for random access."""
    try:
        info = builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The dataset has no split source.split = {split!r}; it has "
            f"{', '.join(builder.info.splits)}, and slices of them such as "
            f'"{next(iter(builder.info.splits), "train")}[:90%]" ({error}).'
        ) from None
    file_format = builder.info.file_format.value
    if file_format == "tfrecord":
        return _tfrecords(info.file_instructions, problems, fallback_dir)
    if file_format == "array_record" and remote.is_remote(builder.data_dir):
        raise UserError(
            f"The ArrayRecord files of {builder.info.full_name} cannot be read from a bucket: copy "
            f"{builder.data_dir} to a disk, or prepare the set with --file_format=tfrecord."
        )
    if file_format == "array_record":
        raw = decode.DeserializeMethod.RAW_BYTES
        return builder.as_data_source(split=split, deserialize_method=raw)
    raise UserError(
        f"The dataset {builder.info.full_name} is stored as {file_format}, which clip_jax does "
        "not read; prepare it with --file_format=array_record."
    )


def _tfrecords(
    instructions: Any, problems: Counter[str], fallback_dir: epath.Path | None
) -> tfrecord.TfRecords:
    """Opens the records of the files, and slices of files, that make up a split."""
    wanted = [
        (each.skip, None if each.take == -1 else each.skip + each.take) for each in instructions
    ]
    paths = [epath.Path(each.filename) for each in instructions]
    records = tfrecord.TfRecords(paths, [slice(*bounds) for bounds in wanted], fallback_dir)
    for each, path, stored in zip(instructions, paths, records.stored):
        if stored < each.examples_in_shard:
            problems["damaged file"] += 1
            logging.warning("%s has only %d whole records", path, stored)
    return records
