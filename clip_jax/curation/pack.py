"""Packs any data into tar shards: 00000.tar, 00001.tar, ... with KEY.jpg beside KEY.txt.

    python -m clip_jax data pack pictures gs://BUCKET/pictures
    python -m clip_jax data pack tfds:coco_captions coco --shuffle --resize=256
    python -m clip_jax data pack "raw/*.tar" clean --keep=dedup/keep.txt

Every example is checked as training would use it; unusable ones are left out and counted. Image
files are copied unchanged; stored pixels become PNG. KEY is the number of the example. Where an
example has several captions or a class, KEY.json takes the place of KEY.txt: "caption", one or a
list; "label", its number, or a list; "class", the same by name. Training reads the captions without
a setting, and the classes with source.label_key=label.

Run the same command again after an interruption: finished shards are kept.
"""

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from clip_jax.common import commands
from clip_jax.curation import parallel
from clip_jax.curation.check import make_tokenizer, try_example
from clip_jax.data import arguments, images, order
from clip_jax.data.sources import captions, reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import locations, ranges, writing

MANIFEST = "pack.json"  # the plan of the shards beside it
NOT_KEPT = "not in --keep"
_QUALITY = 95  # quality of JPEG files made here
_SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further views of the scene behind it
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A description of the shards; equal plans write equal shards.

    Attributes:
      data: name of the data on the command line.
      examples: number of examples in the source.
      shard_size: number of examples of the source per shard.
      shuffle_seed: PRNG seed of the order; None: as stored.
      resize: pixels of the shorter side at most; None: images stay unchanged.
      keep: file with the keys of the examples to write; None: all.
      tokenizer: name of the tokenizer by which captions must not be empty.
      text_key: fields of the captions.
      label_key: field of the class.
    """

    data: str
    examples: int
    shard_size: int
    shuffle_seed: int | None
    resize: int | None
    keep: str | None
    tokenizer: str
    text_key: str
    label_key: str


def main(argv: list[str]) -> None:
    """Runs the command."""
    options = _parser().parse_args(argv)
    _refuse_weights(options.text_key)
    data = arguments.data(options.data, options, in_order=not options.shuffle)
    output, source = locations.reachable(options.out), data.open()
    plan = Plan(
        data=options.data,
        examples=len(source),
        shard_size=options.shard_size,
        shuffle_seed=options.seed if options.shuffle else None,
        resize=options.resize,
        keep=options.keep,
        tokenizer=options.tokenizer,
        text_key=options.text_key,
        label_key=options.label_key,
    )
    try:
        _write_manifest(plan, output / MANIFEST)
        counts = write(plan, source, data, output, options.workers)
    except OSError as error:
        raise UserError(
            f"The shards cannot be written: {error}. Once that is solved, run the same command "
            "again; finished shards are kept."
        ) from error
    found = counts.total() - counts["shards"] - counts["there already"] - counts[NOT_KEPT]
    if options.keep and not found and not counts["there already"]:
        raise UserError(
            f"No key of --keep={options.keep} is that of an example of {options.data}: the list "
            "must be of the same DATA, with a key a line, as data dedup writes it."
        )
    print(_report(counts, Counter(getattr(source, "problems", {})), output))


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("pack", __doc__)
    add, at_least = parser.add_argument, commands.at_least
    add("out", metavar="OUT", help="directory of the shards, local, gs:// or s3://")
    add("--shard_size", type=at_least(1), default=10_000, help="examples; default: 10000")
    add("--shuffle", action="store_true", help="in random order; default: as stored")
    add("--seed", type=at_least(0), default=0, help="seed of --shuffle; default: 0")
    add(
        "--resize",
        type=at_least(1),
        metavar="PIXELS",
        help="shorter side to which larger images are resized, as JPEG of quality 95",
    )
    add("--keep", metavar="FILE", help="writes only the examples whose keys are its lines")
    add("--tokenizer", default="openai", help="tokenizer, see configs/default.py")
    return parser


def _refuse_weights(text_key: str) -> None:
    if any(field.weight != 1 for field in captions.parse_fields(text_key)):
        raise UserError(
            f"--text_key={text_key} gives weights to fields, but shards store captions without: "
            "name the fields alone."
        )


def _write_manifest(plan: Plan, path: epath.Path) -> None:
    """Writes the plan of the shards; raises UserError where shards of another plan are there."""
    fields = dataclasses.asdict(plan)
    try:
        found = json.loads(ranges.read(path))
    except FileNotFoundError:
        if next(iter(path.parent.glob("*.tar")), None):
            raise UserError(
                f"{path.parent} holds other shards already. Choose another directory."
            ) from None
        writing.write(path, json.dumps(fields, indent=2) + "\n")
    else:
        if changed := [name for name in fields if fields[name] != found.get(name)]:
            raise UserError(
                f"{path.parent} holds shards of another command: {', '.join(changed)} differ from "
                f"{path}. Choose another directory, or remove that one."
            )


def write(
    plan: Plan, source: Source, data: arguments.Data, output: epath.Path, workers: int
) -> Counter[str]:
    """Writes the shards that are not there yet, in parallel.

    Returns:
      The numbers of examples "written" and of those left out, by reason; and the numbers of
      "shards" and of those "there already".
    """
    starts = range(0, plan.examples, plan.shard_size)
    todo = [range(start, min(start + plan.shard_size, plan.examples)) for start in starts]
    work = functools.partial(_write_shard, plan, str(output))
    return sum(
        parallel.map_parts(work, source, data, todo, workers, "packing"), Counter(shards=len(todo))
    )


def _write_shard(plan: Plan, output: str, source: Source, places: Sequence[int]) -> Counter[str]:
    """Writes the examples at some places of the order as a shard."""
    path = epath.Path(output) / f"{places[0] // plan.shard_size:05}.tar"
    if locations.stat(path) is not None:
        return Counter({"there already": 1})
    counts: Counter[str] = Counter()
    with (
        writing.replacing(path) as temporary,
        tarfile.open(temporary, mode="w") as tar,
    ):
        reads = reading.in_order(source, (_index(plan, place) for place in places))
        for place, read in zip(places, reads):
            try:
                members = _members(plan, read(), source.class_names)
            except BadExample as bad:
                counts[bad.reason] += 1
                continue
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{place:09}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            counts["written"] += 1
    return counts


def _index(plan: Plan, place: int) -> int:
    if plan.shuffle_seed is None:
        return place
    return order.permutation(plan.examples, plan.shuffle_seed, 0)[place]


def _members(plan: Plan, example: Example, class_names: Sequence[str]) -> dict[str, bytes]:
    """Returns the files of an example, by suffix.

    Raises:
      BadExample: the example is not wanted or not usable.
    """
    if plan.keep and not _kept(plan.keep, example.key):
        raise BadExample(NOT_KEPT, example.key)
    image = try_example(example, make_tokenizer(plan.tokenizer, 77))
    return dict([_image_file(example, image, plan.resize), _text_file(example, class_names)])


def _image_file(example: Example, image: Image.Image, resize: int | None) -> tuple[str, bytes]:
    """Returns suffix and contents of the image file; `image` is the decoded image."""
    file = io.BytesIO()
    if resize and min(image.size) > resize:
        scale = resize / min(image.size)
        width, height = (round(scale * length) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        image.save(file, "JPEG", quality=_QUALITY)
        return "jpg", file.getvalue()
    if isinstance(example.image, bytes):
        form = images.open_header(example.image).format
        if form in _SUFFIXES:
            return _SUFFIXES[form], example.image
    image.save(file, "PNG")
    return "png", file.getvalue()


def _text_file(example: Example, class_names: Sequence[str]) -> tuple[str, bytes]:
    texts = example.captions.texts
    if len(texts) == 1 and not example.labels:
        try:
            return "txt", texts[0].encode()
        except UnicodeEncodeError as error:  # half a character, as JSON can spell
            raise BadExample("invalid UTF-8 caption", example.key, str(error)) from None
    fields: dict[str, Any] = {"key": example.key}
    if texts:
        fields["caption"] = _one_or_all(texts)
    if example.labels:
        fields["label"] = _one_or_all(example.labels)
        if class_names:
            fields["class"] = _one_or_all([class_names[label] for label in example.labels])
    return "json", json.dumps(fields).encode()


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _kept(path: str, key: str) -> bool:
    hashes, wanted = _keep_list(path), _hash(key.encode("utf-8", "replace"))
    return bool((hashes[np.searchsorted(hashes, wanted) :][:1] == wanted).any())


@functools.lru_cache(maxsize=1)
def _keep_list(path: str) -> np.ndarray:
    """Returns sorted hashes of the keys in a file: 8 bytes each, in place of some hundred."""
    try:
        with ranges.scanning(locations.parse(path)) as file:
            hashes = (_hash(line.rstrip(b"\r\n")) for line in file)
            return np.sort(np.fromiter(hashes, np.uint64))
    except OSError as error:
        raise UserError(f"--keep={path} cannot be read: {error}.") from error


def _hash(key: bytes) -> np.uint64:
    return np.frombuffer(hashlib.blake2b(key, digest_size=8).digest(), np.uint64)[0]


def _report(counts: Counter[str], problems: Counter[str], output: epath.Path) -> str:
    there = f" ({counts['there already']:,} were there already)" if counts["there already"] else ""
    lines = [f"{counts['written']:,} examples written; {counts['shards']:,} shards{there}."]
    left_out = {
        reason: count
        for reason, count in (counts + problems).most_common()
        if reason not in ("written", "shards", "there already")
    }
    if left_out:
        lines.append("Left out: " + ", ".join(f"{n:,} {name}" for name, n in left_out.items()))
    lines.append(
        f"Train with --config.data.source.type=tar '--config.data.source.path={output}/*.tar'"
    )
    return "\n".join(lines)
