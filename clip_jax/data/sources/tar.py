"""Tar shards as img2dataset and webdataset write them: KEY.jpg beside KEY.txt or KEY.json."""

import bisect
import dataclasses
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from clip_jax.data.sources import captions, shard_index, tar_index, tar_labels
from clip_jax.data.sources.base import Example, Request
from clip_jax.data.sources.labels import Labels, group, number_labels, parse_groups
from clip_jax.data.sources.reading import ChunkCache, Once
from clip_jax.data.sources.tar_index import Sample
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import faults, locations, ranges, remote

MISSING_FOR = 60.0  # seconds until a missing shard is tried again


class _Contents(NamedTuple):
    """The contents of the files of a sample by kind, and its key."""

    key: str
    files: Mapping[str, bytes]


def open_source(request: Request) -> "TarShards":
    """Opens a source of type "tar"."""
    spec = request.spec
    return TarShards(
        spec.path,
        spec.text_key,
        spec.label_key,
        spec.group_keys,
        fallback_dir=request.fallback_dir,
        chunk=request.chunk,
        cached_chunks=request.cached_chunks,
    )


class TarShards:
    """Random access to the samples of tar shards, through an index that is kept beside them.

    The index takes 27 bytes per sample, mapped from its file. A shard is opened for each read, so
    there may be more shards than a process may have files open. The description of the set in
    CLIP_benchmark's layout, in the directory above that of the shards, is used where it is there.

    Attributes:
      problems: number of damaged shards, and of samples left out for lack of a file, by reason.
      labels: the classes of every sample; None: without `label_key`.
      class_names: names of the classes, where `label_key` names a field of text or the layout has
        them.
      templates: prompt templates of the layout.
    """

    def __init__(
        self,
        paths: str,
        text_key: str = "",
        label_key: str = "",
        group_keys: str = "",
        *,
        fallback_dir: epath.Path | None = None,
        chunk: int = 1,
        cached_chunks: int = 0,
    ):
        """Reads the index, or every header of every shard; with `label_key` every label too.

        Args:
          paths: files, directories, patterns and brace ranges, comma-separated; local or gs://.
          text_key: fields of the .json file with captions, "txt" standing for the .txt file, as
            `captions.parse_fields` has them; "": the .txt file, or else "caption" of the .json.
          label_key: field of the .json file with the class, or "cls" or "npy": the file with it;
            "": no classes. With it, captions may be missing.
          group_keys: fields of the .json file with the groups of an example, comma-separated.
          fallback_dir: directory for the index where that of the shards cannot be written to.
          chunk: number of neighbours that are read at once.
          cached_chunks: number of chunks held in memory; 0: every sample is read by itself.

        Raises:
          UserError: no shards, no usable sample in them, or a class without a name.
        """
        self._fields = captions.parse_fields(text_key)
        self._captioned = not label_key
        self._group_keys = parse_groups(group_keys)
        self._shards = find(paths)
        self._names = locations.short_names(self._shards)
        self._missing_until: dict[int, float] = {}
        kind = tar_index.LABELLED if label_key in tar_labels.FILES else tar_index.KIND
        found = shard_index.load(self._shards, kind, fallback_dir)
        self.problems: Counter[str] = shard_index.count_problems(found)
        self._rows = [shard.rows for shard in found]
        self._listing = shard_index.listing(self._shards, found, list(map(len, self._rows)))
        self._versions = [shard.version for shard in found]
        self._is_remote = remote.is_remote(self._shards[0])
        # Number of the first sample of each shard, and of all samples.
        self._first = list(itertools.accumulate(map(len, self._rows), initial=0))
        if not len(self):
            raise UserError(
                f"No usable sample in the {len(self._shards)} shard(s) of source.path = {paths!r}"
                f" ({dict(self.problems) or 'they are empty'}). A sample is KEY.jpg, .png or .webp"
                " beside KEY.txt, or beside KEY.json with the caption under source.text_key."
            )
        layout = tar_labels.read_layout(self._shards[0].parent.parent)
        self.templates: tuple[str, ...] = layout.templates
        self.class_names: tuple[str, ...] = ()
        self._a_caption_per_line = layout.type == "retrieval"
        self.labels: Labels | None = None
        if label_key:
            self.labels, names = number_labels(self._read_labels(label_key))
            self.class_names = names or layout.class_names
            if layout.class_names and self.labels.largest >= len(self.class_names):
                raise UserError(
                    f"The shards of source.path = {paths!r} have class {self.labels.largest}, but "
                    f"classnames.txt above them names only {len(self.class_names)}."
                )
        self._chunk = chunk
        self._chunks = ChunkCache(self._start_chunk, cached_chunks) if cached_chunks else None

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Example:
        return self.start([index])[0]()

    def listing(self) -> list[str]:
        """Lists the shards, as `Source` says."""
        return self._listing

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read samples, as `reading.start` does."""
        if self._chunks is not None:
            reads = [(self._chunks.start(i // self._chunk), i % self._chunk) for i in indices]
        else:
            # From a disk, neighbours are read one by one: in one piece, each would wait for all.
            groups = (
                _neighbours(indices, self._shard) if self._is_remote else [[i] for i in indices]
            )
            reads = []
            for group in groups:
                read = Once(self._start_neighbours(group[0], group[-1] + 1))
                reads += [(read, place) for place in range(len(group))]
        return [
            functools.partial(self._example, index, *read) for index, read in zip(indices, reads)
        ]

    def _example(self, index: int, read: Once[list[_Contents | BadExample]], place: int) -> Example:
        contents = read()[place]
        if isinstance(contents, BadExample):
            raise contents
        key, files = contents
        txt, record = files.get("txt"), files.get("json")
        if txt is not None and self._a_caption_per_line:
            txt = txt.splitlines()
        return Example(
            image=files["image"],
            captions=captions.read_files(txt, record, self._fields, key, self._captioned),
            labels=() if self.labels is None else self.labels[index],
            key=key,
            groups=tuple(
                group(captions.read_field(record, name, key)) for name in self._group_keys
            ),
        )

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self._first, index) - 1

    def _sample(self, index: int) -> Sample:
        """Returns a sample with those of its files that are needed."""
        shard = self._shard(index)
        found = tar_index.sample_of(self._rows[shard][index - self._first[shard]])
        if self._fields:
            wanted = {"txt" if name == "txt" else "json" for name, _ in self._fields}
        else:
            wanted = {"txt" if "txt" in found.files else "json"}
        if self._group_keys:
            wanted.add("json")
        files = {kind: span for kind, span in found.files.items() if kind in wanted | {"image"}}
        return dataclasses.replace(found, files=files)

    def _start_chunk(self, number: int) -> Callable[[], list[_Contents | BadExample]]:
        """Begins to read a chunk; where it spans shards, one part from each."""
        index, end = number * self._chunk, min((number + 1) * self._chunk, len(self))
        parts: list[Callable[[], list[_Contents | BadExample]]] = []
        while index < end:
            stop = min(end, self._first[self._shard(index) + 1])
            parts.append(self._start_neighbours(index, stop))
            index = stop
        return lambda: [contents for part in parts for contents in part()]

    def _start_neighbours(
        self, index: int, stop: int
    ) -> Callable[[], list[_Contents | BadExample]]:
        """Begins to read the files of neighbours in one shard."""
        shard = self._shard(index)
        path = self._shards[shard]
        wanted = [self._sample(i) for i in range(index, stop)]
        spans = [span for sample in wanted for span in (sample.headers, *sample.files.values())]

        def start() -> Callable[[], list[bytes]]:
            return ranges.start(path, spans, self._versions[shard])

        begun = [start()]  # further tries begin anew

        def read() -> list[bytes]:
            return (begun.pop() if begun else start())()

        def finish() -> list[_Contents | BadExample]:
            known_missing = time.monotonic() < self._missing_until.get(shard, 0)
            try:
                pieces = faults.briefly(read, () if known_missing else None)
            except ranges.Replaced as error:
                return [
                    BadExample("replaced shard", _place(path, each), str(error)) for each in wanted
                ]
            except OSError as error:
                self._missing_until[shard] = time.monotonic() + MISSING_FOR
                return [
                    BadExample("missing shard", _place(path, each), str(error)) for each in wanted
                ]
            return _by_sample(pieces, self._names[shard], wanted)

        return finish

    def _read_labels(self, label_key: str) -> list[Any]:
        """Reads the class of every sample; None where it has no readable one."""
        kind = tar_labels.label_kind(label_key)
        labels: list[Any] = []
        for path, rows in zip(self._shards, self._rows):
            samples = [tar_index.sample_of(row).files for row in rows]
            found = [each[kind] for each in samples if kind in each]
            pieces = iter(ranges.start(path, found)()) if found else iter(())
            labels += [
                tar_labels.decode_label(next(pieces), label_key) if kind in each else None
                for each in samples
            ]
        return tar_labels.decode_arrays(labels) if label_key == "npy" else labels


def find(paths: str) -> list[epath.Path]:
    """Returns the shards that `paths` names; raises UserError where there are none."""
    shards = locations.expand(paths, ".tar")
    if not shards:
        raise UserError(
            f"No tar shards match source.path = {paths!r}. It takes files, directories and "
            'patterns, comma-separated, such as --config.data.source.path="DIR/*.tar" or '
            '"gs://BUCKET/{00000..00099}.tar".'
        )
    return shards


def _neighbours(indices: Sequence[int], shard_of: Callable[[int], int]) -> list[list[int]]:
    """Groups indices that follow each other and lie in one shard."""
    groups: list[list[int]] = []
    for index in indices:
        if groups and index == groups[-1][-1] + 1 and shard_of(index) == shard_of(index - 1):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _place(path: epath.Path, sample: Sample) -> str:
    return f"{path} at byte {sample.files['image'].offset}"


def _by_sample(
    found: list[bytes], shard: str, wanted: list[Sample]
) -> list[_Contents | BadExample]:
    """Groups the pieces that were read by sample and kind of file."""
    pieces = iter(found)
    samples: list[_Contents | BadExample] = []
    for sample in wanted:
        key = f"{shard}/{sample.key(next(pieces))}"
        files = {kind: next(pieces) for kind in sample.files}
        if any(len(files[kind]) < span.size for kind, span in sample.files.items()):
            samples.append(BadExample("truncated shard", key))
        else:
            samples.append(_Contents(key, files))
    return samples
