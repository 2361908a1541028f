"""clip_jax.data.loading: order, read-ahead, errors, and threads that end."""

import contextlib
import functools
import gc
import threading
import time

import numpy as np
import pytest

from clip_jax.data import loading

LIKE = {"number": np.zeros((), np.int64), "pair": np.zeros((2, 3), np.uint8)}


def row(number: int) -> loading.Row:
    return {"number": np.int64(number), "pair": np.full((2, 3), number % 256, np.uint8)}


def batches(load=row, **options):
    """The arrays of the batches."""
    with contextlib.closing(complete(lambda number: (load(number), None), **options)) as made:
        for batch in made:
            yield batch.arrays


def complete(load, **options):
    options = {"count": None, "batch_size": 4, "threads": 3, "prefetch": 2, **options}

    def start(numbers):
        return [functools.partial(load, number) for number in numbers]

    return loading.batches(start, LIKE, **options)


def loading_threads() -> int:
    return sum(thread.name.startswith("loading") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert loading_threads() == 0
    yield
    gc.collect()  # a failed test keeps its generator alive otherwise
    assert loading_threads() == 0


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_rows_come_in_order_however_long_they_take(threads, prefetch):
    def load(number):
        time.sleep(0.002 * (number * 7 % 5 == 0))
        return row(number)

    found = list(batches(load, count=43, threads=threads, prefetch=prefetch))
    assert len(found) == 10  # the last three rows make no batch
    numbers = np.concatenate([batch["number"] for batch in found])
    np.testing.assert_array_equal(numbers, np.arange(40))
    pairs = np.concatenate([batch["pair"] for batch in found])
    np.testing.assert_array_equal(pairs, np.broadcast_to(np.arange(40)[:, None, None], (40, 2, 3)))
    assert pairs.dtype == np.uint8


def test_fewer_rows_than_a_batch():
    assert list(batches(count=3)) == []
    assert list(batches(count=0)) == []


def test_stats_come_in_the_order_of_their_rows():
    def load(number):
        time.sleep(0.002 * (number % 4 == 0))
        return (None if number == 5 else row(number)), f"stats {number}"

    made = list(complete(load, count=8))
    assert [batch.stats for batch in made] == [
        [f"stats {number}" for number in range(first, first + 4)] for first in (0, 4)
    ]
    assert made[1].arrays["number"][[0, 2, 3]].tolist() == [4, 6, 7]  # the row that is None is not


def test_batches_do_not_share_memory():
    stream = batches()
    first, second = next(stream), next(stream)
    first["number"][:] = -1
    np.testing.assert_array_equal(second["number"], [4, 5, 6, 7])
    np.testing.assert_array_equal(next(stream)["number"], [8, 9, 10, 11])
    stream.close()


def test_threads_load_at_the_same_time():
    together = threading.Barrier(3, timeout=10)  # breaks unless three calls meet

    def load(number):
        if number < 3:
            together.wait()
        return row(number)

    assert len(list(batches(load, count=8, threads=3))) == 2


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_reads_no_further_ahead_than_told(prefetch):
    begun = []

    def load(number):
        begun.append(number)
        return row(number)

    stream = batches(load, prefetch=prefetch)
    assert not begun  # nothing before the first is asked for
    for taken in range(1, 4):
        next(stream)
        deadline = time.monotonic() + 5
        while len(begun) < 4 * (taken + prefetch) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(begun) == list(range(4 * (taken + prefetch)))
    stream.close()


def test_error_comes_in_place_of_its_batch():
    def load(number):
        if number == 9:
            raise ZeroDivisionError("of row 9")
        return row(number)

    stream = batches(load)
    assert [next(stream)["number"][0] for _ in range(2)] == [0, 4]
    with pytest.raises(ZeroDivisionError, match="of row 9"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_error_does_not_wait_for_the_rest_of_its_batch():
    late = threading.Event()

    def load(number):
        if number == 1:
            raise ZeroDivisionError
        late.wait(10)
        return row(number)

    stream = batches(load, threads=2)
    threading.Timer(0.5, late.set).start()
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert late.is_set()  # the thread that was busy has been waited for
    assert time.monotonic() - began < 5


def test_row_of_the_wrong_shape():
    with pytest.raises(ValueError, match="broadcast"):
        next(batches(lambda number: {**row(number), "pair": np.zeros((5, 3), np.uint8)}))
    with pytest.raises(KeyError, match="pair"):
        next(batches(lambda number: {"number": np.int64(0)}))


def test_closing_drops_what_is_not_begun():
    begun = []

    def load(number):
        begun.append(number)
        time.sleep(0.01)
        return row(number)

    stream = batches(load, prefetch=50)
    next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 1
    assert len(begun) < 20
    assert loading_threads() == 0


def test_a_call_that_hangs_does_not_hang_the_close(monkeypatch):
    monkeypatch.setattr(loading, "JOIN_TIMEOUT", 0.1)
    hang = threading.Event()

    def load(number):
        if number == 4:
            hang.wait()
        return row(number)

    stream = batches(load)
    next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 2
    assert loading_threads() == 1
    hang.set()
    while loading_threads():
        time.sleep(0.001)
