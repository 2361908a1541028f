"""Work on every shard: in processes of this machine, or on many machines by Apache Beam.

What the work leaves behind are files, so an engine hands back nothing but the numbers of pairs.
"""

import importlib
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import pyarrow as pa
from tqdm import tqdm

from clip_jax.common import worker
from clip_jax.errors import UserError

Work = Callable[[str], int]  # shard -> pairs in it


class Engine(Protocol):
    """Runs work, picklable and safe to repeat, on each of the shards."""

    def __call__(self, work: Work, shards: Sequence[str], title: str) -> None: ...


class Local:
    """Processes of this machine."""

    def __init__(self, workers: int):
        self._workers = workers

    def __call__(self, work: Work, shards: Sequence[str], title: str) -> None:
        """Shows shards done, the time left and pairs/s on the way."""
        if min(self._workers, len(shards)) == 1:
            _follow((work(shard) for shard in shards), len(shards), title)
            return
        pool = ProcessPoolExecutor(
            self._workers, multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        try:
            futures = [pool.submit(work, shard) for shard in shards]
            _follow((future.result() for future in as_completed(futures)), len(shards), title)
        except BrokenProcessPool:
            raise UserError(
                "A worker was killed, most likely for lack of memory. Run the same command with "
                "fewer --workers: what is done stays done."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _follow(done: Iterable[int], total: int, title: str) -> None:
    pairs = 0
    with tqdm(desc=title, total=total, unit="shard") as bar:
        for count in done:
            pairs += count
            bar.update()
            elapsed = max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{pairs / elapsed:,.0f} pairs/s", refresh=False)


def _start_worker() -> None:
    worker.begin()
    pa.set_cpu_count(1)


class Beam:
    """Any runner of Apache Beam; by default its local one."""

    def __init__(self, arguments: str):
        """Args: arguments: as for any Beam pipeline, such as "--runner=DataflowRunner ..."."""
        try:
            self._beam: Any = importlib.import_module("apache_beam")
        except ImportError:
            raise UserError(
                "--engine=beam needs Apache Beam: pip install -r requirements-beam.txt. Without "
                "it, --engine=local uses all cores of this machine."
            ) from None
        self._arguments = shlex.split(arguments)

    def __call__(self, work: Work, shards: Sequence[str], title: str) -> None:
        """Beam's elements are the names of shards, so that captions never pass through it."""
        beam = self._beam
        options = importlib.import_module("apache_beam.options.pipeline_options")
        print(f"{title}: {len(shards):,} shards by Beam", file=sys.stderr, flush=True)
        with beam.Pipeline(options=options.PipelineOptions(self._arguments)) as pipeline:
            _ = pipeline | beam.Create(list(shards)) | beam.Reshuffle() | beam.Map(work)
