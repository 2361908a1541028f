"""TFRecord files of tf.train.Example, as many pipelines other than TFDS write them."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from clip_jax.common.tensorflow_cpu import tf
from clip_jax.data.sources import captions, reading, tfrecord
from clip_jax.data.sources.base import Example, Request
from clip_jax.data.sources.labels import (
    GROUP_SETTINGS,
    Labels,
    group,
    number_labels,
    parse_groups,
)
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations

IMAGE_KEYS = ("image", "image/encoded", "jpg", "jpeg", "png", "webp", "image_bytes", "image_raw")
TEXT_KEYS = ("caption", "text", "txt", "captions", "image/caption", "TEXT", "title")

_TRIED = 100  # records that are looked at for the names of features


def open_source(request: Request) -> "TfRecordSource":
    """Opens a source of type "tfrecord"."""
    return TfRecordSource(request.spec, request.fallback_dir)


class TfRecordSource:
    """Random access to the examples of TFRecord files, through an index kept beside them.

    Attributes:
      problems: number of damaged files.
      labels: the classes of every example; None: without `label_key`.
      class_names: names of the classes, where `label_key` names a feature of text.
      templates: empty.
    """

    templates: tuple[str, ...] = ()

    def __init__(self, spec: ConfigDict, fallback_dir: epath.Path | None = None):
        """Reads the index, or the headers of all records; with `label_key` all records.

        Args:
          spec: path (as for tar shards), image_key, text_key, label_key and group_keys, features
            of the examples, as in `source()` of configs/default.py.
          fallback_dir: directory for the index where that of the files cannot be written to.

        Raises:
          UserError: no files, no records, or none of the features.
        """
        paths = locations.expand(spec.path, ".tfrecord")
        records = tfrecord.TfRecords(paths, [slice(None)] * len(paths), fallback_dir)
        if not len(records):
            raise UserError(
                f"No records in the {len(paths)} file(s) of source.path = {spec.path!r}. It takes "
                'TFRecord files, directories and patterns, such as "DIR/train-*".'
            )
        self._records = records
        self.problems: Counter[str] = records.problems
        features = _first_features(records, spec.path)
        self._image_key = _choose(features, spec.image_key, IMAGE_KEYS, "image_key")
        self._fields = captions.parse_fields(spec.text_key)
        if not self._fields and not spec.label_key:
            self._fields = (captions.Field(_choose(features, "", TEXT_KEYS, "text_key"), 1.0),)
        self._group_keys = parse_groups(spec.group_keys)
        for key in self._group_keys:
            _choose(features, key, (), GROUP_SETTINGS)
        self.labels: Labels | None = None
        self.class_names: tuple[str, ...] = ()
        if spec.label_key:
            reads = reading.in_order(records, range(len(records)))
            labels = [_label(read, spec.label_key) for read in reads]
            self.labels, self.class_names = number_labels(labels)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return self.start([index])[0]()

    def listing(self) -> list[str]:
        """Lists the files, as `Source` says."""
        return self._records.listing()

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read records, as `reading.start` does."""
        begun = zip(indices, self._records.start(indices))
        return [functools.partial(self._example, index, read) for index, read in begun]

    def _example(self, index: int, read: Callable[[], bytes]) -> Example:
        key = f"record {index}"
        features = _parse(read(), key)
        images = _values(features, self._image_key)
        if not images or not isinstance(images[0], bytes):
            raise BadExample("no image", key)
        texts = [(_values(features, name), weight) for name, weight in self._fields]
        return Example(
            image=images[0],
            captions=captions.collect(texts, key, required=self.labels is None),
            labels=() if self.labels is None else self.labels[index],
            key=key,
            groups=tuple(group(_value(_values(features, name))) for name in self._group_keys),
        )


def _first_features(records: tfrecord.TfRecords, path: str) -> Any:
    """Returns the features of the first record that has any, of those at the beginning."""
    problem = ""
    for index in range(min(len(records), _TRIED)):
        try:
            if features := _parse(records[index], f"record {index}"):
                return features
        except BadExample as bad:
            problem = problem or str(bad)
    raise UserError(
        f"None of the first {_TRIED} records of source.path = {path!r} is a tf.train.Example with "
        f"features{f' ({problem})' if problem else ''}. Other records are not read."
    )


def _label(read: Callable[[], bytes], label_key: str) -> Any:
    try:
        values = _values(_parse(read(), ""), label_key)
    except BadExample:
        return None
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in values]


def _parse(record: bytes, key: str) -> Any:
    """Parses a serialised tf.train.Example; returns its features by name."""
    try:
        return tf.train.Example.FromString(record).features.feature
    except Exception as error:  # protobuf's own
        raise BadExample("unreadable record", key, str(error)) from None


def _values(features: Any, name: str) -> list[Any]:
    """The values of a feature; [] where there is none."""
    if name not in features:
        return []
    feature = features[name]
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []


def _value(values: list[Any]) -> Any:
    """The only value of a feature, or the first; several floats together; None: there is none."""
    several_floats = len(values) > 1 and isinstance(values[0], float)
    return values if several_floats else next(iter(values), None)


def _choose(features: Any, wanted: str, usual: tuple[str, ...], field: str) -> str:
    for name in (wanted,) if wanted else usual:
        if name in features:
            return name
    raise UserError(
        f"The records have no feature {wanted or ' or '.join(usual)!r}. Set source.{field} to one "
        f"of: {', '.join(sorted(features))}."
    )
