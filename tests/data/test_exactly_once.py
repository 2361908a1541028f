"""Every example exactly once per epoch, through real shards, whatever becomes of the hosts."""

import collections
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from shards import sample, write_tar

from clip_jax.configs import default
from clip_jax.data import mixture, pipeline, rows, tokenizer

SHARDS, EACH, BATCH = 5, 13, 12
TOTAL = SHARDS * EACH
ORDERS = ("shuffled", "windowed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        numbers = range(shard * EACH, (shard + 1) * EACH)
        write_tar(path / f"{shard}.tar", [m for n in numbers for m in sample(f"{n:03}", f"{n}")])
    return path


def settings(path, order: str, captions: int = 1) -> ConfigDict:
    config = default.get_config().data
    config.source = default.source(type="tar", path=str(path))
    config.update(order=order, captions=captions, chunk=4, shuffle_window=24, threads=2)
    if captions > 1:
        config.source.text_key = "txt,alt"
    return config


def open_pipeline(
    path, order: str, part: int, parts: int, start: int, captions: int = 1
) -> pipeline.TrainPipeline:
    config = settings(path, order, captions)
    source, order_ = mixture.create(config, 8, 0, batch_size=BATCH, parts=parts)
    spec = rows.Spec(config, "openai", 8, image_size=8, seed=0, batch_size=BATCH, parts=parts)
    tokens = tokenizer.create("openai", 8)
    return pipeline.TrainPipeline(source, order_, tokens, spec, start=start, part=part)


def numbers(batch) -> list[int]:
    """The captions, which are the numbers of the examples."""
    texts = map(tokenizer.create("openai", 8).decode, batch["tokens"])
    return [int(text.replace(" ", "")) for text in texts]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_on_any_number_of_hosts(shards, order, hosts):
    steps = TOTAL  # so that epochs end where the run does
    parts = [iter(open_pipeline(shards, order, part, hosts, 0)) for part in range(hosts)]
    drawn = [n for _ in range(steps) for part in parts for n in numbers(next(part))]
    assert collections.Counter(drawn) == dict.fromkeys(range(TOTAL), BATCH)


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_the_batches_are_the_same_on_any_number_of_hosts(shards, order, captions):
    whole = iter(open_pipeline(shards, order, 0, 1, 36, captions))
    parts = [iter(open_pipeline(shards, order, part, 4, 36, captions)) for part in range(4)]
    for _ in range(8):
        batch, pieces = next(whole), [next(part) for part in parts]
        assert batch["tokens"].shape == (BATCH, *[2] * (captions > 1), 8)
        for name in batch:
            joined = np.concatenate([piece[name] for piece in pieces])
            np.testing.assert_array_equal(batch[name], joined)


def test_a_host_reads_its_own_streams(shards):
    """Else every host would read every chunk."""
    config = settings(shards, "windowed")
    _, order_ = mixture.create(config, 8, 0, batch_size=BATCH, parts=2)
    assert order_.streams == 4
    streams = []
    for part in range(2):
        host = open_pipeline(shards, "windowed", part, 2, 0)
        positions = [host._positions[count] for count in range(40)]
        streams.append({position % order_.streams for position in positions})
    assert [len(own) for own in streams] == [2, 2]
    assert not streams[0] & streams[1]


def work(path: str, part: int, parts: int, step: int, limit: int) -> None:
    """A host: appends what it is given, step by step, to a file of its own."""
    hosts = {order: iter(open_pipeline(path, order, part, parts, step * BATCH)) for order in ORDERS}
    with open(f"{path}/drawn-{parts}-{part}", "a") as file:
        while step < limit:
            for order, batches in hosts.items():
                print(order, step, *numbers(next(batches)), file=file, flush=True)
            step += 1
            time.sleep(0.01)


def start_hosts(path, parts: int, step: int, limit: int) -> list[subprocess.Popen]:
    command = "import sys, test_exactly_once as t; t.work(sys.argv[1], *map(int, sys.argv[2:]))"
    here, root = os.path.dirname(__file__), os.environ["PYTHONPATH"]
    env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{root}", "JAX_PLATFORMS": "cpu"}
    arguments = [[str(n) for n in (path, part, parts, step, limit)] for part in range(parts)]
    return [subprocess.Popen([sys.executable, "-c", command, *each], env=env) for each in arguments]


def read(path, parts: int) -> dict[tuple[str, int], list[list[int]]]:
    """Reads the examples drawn, by order and step; skips a last line cut short by the kill."""
    found = collections.defaultdict(list)
    for part in range(parts):
        file = path / f"drawn-{parts}-{part}"
        for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
            order, step, *drawn = line.split()
            if line.endswith("\n"):
                found[order, int(step)].append([int(n) for n in drawn])
    return found


def test_killed_and_resumed_on_another_number_of_hosts(shards):
    hosts = start_hosts(shards, 3, 0, 10**6)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = [key for key, pieces in read(shards, 3).items() if len(pieces) == 3]
        if len(done) > 2 * 20:
            break
        time.sleep(0.1)
    for host in hosts:
        host.send_signal(signal.SIGKILL)
        host.wait()
    first = read(shards, 3)
    # The last step that every host of both orders has done stands for the last checkpoint.
    saved = 1 + min(
        max(step for (name, step), pieces in first.items() if name == order and len(pieces) == 3)
        for order in ORDERS
    )
    assert saved >= 20
    limit = (saved // TOTAL + 1) * TOTAL
    resumed = start_hosts(shards, 2, saved, limit)
    assert [host.wait(timeout=120) for host in resumed] == [0, 0]
    second = read(shards, 2)
    for order in ORDERS:
        drawn = [n for step in range(saved) for piece in first[order, step] for n in piece]
        drawn += [n for step in range(saved, limit) for piece in second[order, step] for n in piece]
        assert collections.Counter(drawn) == dict.fromkeys(range(TOTAL), limit * BATCH // TOTAL)
