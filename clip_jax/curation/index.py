"""python -m clip_jax data index: indexes the samples of shards ahead of the first run."""

import time

from clip_jax.data import arguments
from clip_jax.data.sources import shard_index, tar, tar_index, tfrecord
from clip_jax.errors import UserError
from clip_jax.storage import locations

_ABOUT = """\
Reads the headers of tar shards or TFRecord files, in parallel, and writes an index into their
directory (clip_jax.tar.index), with which a run opens them at once. A shard that changes is read
again by itself. A run makes the index itself where there is none; on many hosts, make it before.

  python -m clip_jax data index "shards/*.tar"
  python -m clip_jax data index gs://BUCKET/shards --workers=64
"""


def main(argv: list[str]) -> None:
    """Runs the command."""
    options = arguments.parser("index", _ABOUT).parse_args(argv)
    spec = arguments.data(options.data, options).spec
    if spec.type == "tar":
        paths, kind = tar.find(spec.path), tar_index.KIND
    elif spec.type == "tfrecord":
        paths, kind = locations.expand(spec.path, ".tfrecord"), tfrecord.KIND
    else:
        raise UserError(
            f"{options.data!r} needs no index: only tar shards and TFRecord files do. `python -m "
            f"clip_jax data check {options.data}` tries its examples."
        )
    began = time.monotonic()
    found = shard_index.load(paths, kind, workers=options.workers, must_keep=True)
    count, seconds = sum(len(shard.rows) for shard in found), time.monotonic() - began
    print(f"{count:,} examples in {len(paths):,} shards, {seconds:,.1f} s.")
    for problem, times in shard_index.count_problems(found).most_common():
        print(f"  {times:>10,}  {problem}")
