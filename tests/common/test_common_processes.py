"""clip_jax.common.processes: results in order, the state of workers, and a killed one."""

import os
import signal
import time

import pytest

from clip_jax.common import processes
from clip_jax.errors import UserError

_offset = 0


def set_offset(value: int) -> None:
    global _offset
    _offset = value


def work(number: int) -> tuple[int, int]:
    time.sleep(0.05 * (number == 0))  # the others of its process must wait, and stay behind it
    return number + _offset, os.getpid()


def test_results_are_in_order_and_of_initialised_workers():
    mapped = processes.map_in_order(work, range(40), 2, initializer=set_offset, initargs=(100,))
    results = list(mapped)
    assert [value for value, _ in results] == list(range(100, 140))
    workers = {pid for _, pid in results}
    assert 1 <= len(workers) <= 2
    assert os.getpid() not in workers


def test_no_parts():
    assert list(processes.map_in_order(work, [], 2)) == []


def fail(number: int) -> int:
    if number == 3:
        raise KeyError(number)
    return number


def test_an_error_comes_in_its_place():
    mapped = processes.map_in_order(fail, range(6), 2)
    assert [next(mapped) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(mapped)


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_explained():
    with pytest.raises(UserError, match=r"2 processes was killed.*memory\..*--workers=1\."):
        list(processes.map_in_order(die, range(4), 2))
    with pytest.raises(UserError, match=r"2 processes was killed.*memory\. Buy some\."):
        list(processes.map_in_order(die, range(4), 2, remark="Buy some."))
