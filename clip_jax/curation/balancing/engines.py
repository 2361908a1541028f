"""Work on every shard: in processes of this machine, or on many machines by Apache Beam.

The results are files, so an engine returns nothing.
"""

import importlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa

from clip_jax.common import processes
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
            results = map(work, shards)
        else:
            results = processes.map_in_order(
                work,
                shards,
                self._workers,
                initializer=pa.set_cpu_count,
                initargs=(1,),
                ahead=len(shards),  # results are numbers; a large shard holds up no other
                remark="Run it again with fewer, such as --workers=1. Finished shards are kept.",
            )
        pairs = 0
        with processes.progress(title, len(shards), " shards") as bar:
            for count in results:
                pairs += count
                bar.update()
                elapsed = max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{pairs / elapsed:,.0f} pairs/s", refresh=False)


class Beam:
    """Any runner of Apache Beam; by default its local one."""

    def __init__(self, arguments: str):
        """Imports Beam.

        Args:
          arguments: options of a Beam pipeline, such as "--runner=DataflowRunner ...".

        Raises:
          UserError: Beam is not installed.
        """
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
