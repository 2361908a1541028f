"""The training data as a whole: one source or several, and the order of their examples."""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

from etils import epath
from ml_collections import ConfigDict

from clip_jax.configs import default
from clip_jax.data import order, teachers
from clip_jax.data.sources import opening, reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.errors import UserError

# Interleaved streams of a windowed order. Every host has some of its own if the number of hosts
# divides this; a constant, so that the order stays the same when hosts or batch size change.
_STREAMS = 256


class Mixture:
    """Several sources, one after the other.

    Attributes:
      parts: the sources.
      problems: number of problems of all sources, by reason.
      class_names, templates: empty.
    """

    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __init__(self, parts: Sequence[Source]):
        self.parts = parts
        self._first = list(itertools.accumulate(map(len, parts), initial=0))
        self.problems: Counter[str] = Counter()
        for part in parts:
            self.problems.update(getattr(part, "problems", {}))

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Example:
        return self.start([index])[0]()

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read examples, as `reading.start` does."""
        places: dict[int, list[int]] = {}  # in `indices`, by part
        for place, index in enumerate(indices):
            places.setdefault(bisect.bisect_right(self._first, index) - 1, []).append(place)
        begun: dict[int, Callable[[], Example]] = {}
        for part, own in places.items():
            within = [indices[place] - self._first[part] for place in own]
            begun |= zip(own, reading.start(self.parts[part], within))
        return [begun[place] for place in range(len(indices))]


def windowed_streams(batch_size: int) -> int:
    """Returns the number of interleaved streams of the windowed order, a divisor of the batch."""
    return math.gcd(batch_size, _STREAMS)


def create(
    config: ConfigDict,
    image_size: int,
    seed: int,
    *,
    batch_size: int,
    parts: int,
    fallback_dir: epath.Path | None = None,
) -> tuple[Source, order.Order]:
    """Opens the training data.

    Args:
      config: the fields of `data` in configs/default.py.
      image_size: pixels along a side, for sources that draw their images.
      seed: PRNG seed of the order, and of sources that draw their images.
      batch_size: examples per step, over all hosts.
      parts: number of hosts, or of their processes, that share a batch.
      fallback_dir: directory for indices of shards whose own cannot be written to.

    Returns:
      The source of the examples, and their order.

    Raises:
      UserError: the data are not there or not in the expected form.
    """
    specs = [spec.copy_and_resolve_references() for spec in default.sources(config)]
    for spec in specs:  # no groups are needed here, and what else a pair has is read as one
        names = [name for each in teachers.parse(spec.teacher_keys) for name in each[:2]]
        spec.group_keys = ",".join(filter(None, (spec.weight_key, *names)))
    streams, chunk, cached_chunks = 1, 1, 0
    window = config.shuffle_window
    if config.order == "windowed":
        streams, chunk = windowed_streams(batch_size), config.chunk
        window = max(config.shuffle_window // streams, 1)
        own = min(-(-streams // parts) + 1, streams)  # two parts may share a stream
        # Reads begin when a batch is submitted, which may be in the next window.
        ahead = -(-batch_size * (config.prefetch + 1) // streams)
        cached_chunks = own * (window // chunk + 2 + min(-(-ahead // chunk), window // chunk + 1))
    sources = [
        opening.create(
            spec,
            image_size,
            seed,
            fallback_dir=fallback_dir,
            chunk=chunk,
            cached_chunks=cached_chunks,
        )
        for spec in specs
    ]

    def order_of(size: int, part: int) -> order.Order:
        if config.order == "windowed":
            return order.Windowed(size, seed, chunk, window, streams, part)
        return (
            order.Shuffled(size, seed, part) if config.order == "shuffled" else order.Stored(size)
        )

    if len(sources) == 1:
        return sources[0], order_of(len(sources[0]), 0)
    mixed = Mixture(sources)
    weights = [spec.weight for spec in specs]
    if not any(weights) and config.order != "windowed":
        return mixed, order_of(len(mixed), 0)
    if not all(weights) and any(weights):
        raise UserError(
            f"Of data.mixture = {', '.join(config.mixture)}, some have a weight, others have none: "
            "give one to each, or to none, for proportions by their numbers of examples."
        )
    orders = [order_of(len(source), part) for part, source in enumerate(sources)]
    weights = weights if all(weights) else [len(source) for source in sources]
    return mixed, order.Weighted(orders, weights, seed)
