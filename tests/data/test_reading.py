"""clip_jax.data.sources.reading: reads ahead, in order, and chunks that are read once."""

import threading
import time

import pytest

from clip_jax.data.sources import reading
from clip_jax.data.sources.reading import ChunkCache


class Begun:
    """A collection whose example i is -i; records the indices that are begun."""

    def __init__(self):
        self.indices: list[int] = []

    def start(self, indices):
        self.indices += indices
        return [lambda i=i: -i for i in indices]


def test_in_order_begins_the_next_few():
    source = Begun()
    reads = reading.in_order(source, iter(range(1000)))
    assert next(reads)() == 0
    assert 50 < len(source.indices) < 200
    assert [read() for read in reads] == [-i for i in range(1, 1000)]
    assert source.indices == list(range(1000))


@pytest.mark.parametrize("source", [Begun(), range(0, -600, -1)], ids=["with start", "without"])
def test_by_threads_keeps_the_order(source):
    results = reading.by_threads(lambda read: 2 * read(), source, range(600), threads=3)
    assert list(results) == [-2 * i for i in range(600)]


def test_each_chunk_is_read_once_by_many_threads():
    reads = []

    def start(number: int):
        def wait() -> int:
            reads.append(number)
            time.sleep(0.02)
            return number * 10

        return wait

    cache, got = ChunkCache(start, capacity=3), []
    threads = [threading.Thread(target=lambda: got.append(cache.start(7)())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [70] * 8
    assert reads == [7]
    assert [cache.start(number)() for number in (1, 2, 3, 7)] == [10, 20, 30, 70]
    assert reads == [7, 1, 2, 3, 7]  # 7 had been longest unused


def test_a_failed_read_is_tried_again():
    outcomes = iter([OSError("gone"), "back"])

    def wait() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    cache = ChunkCache(lambda _: wait, capacity=2)
    with pytest.raises(OSError, match="gone"):
        cache.start(0)()
    assert cache.start(0)() == "back"
