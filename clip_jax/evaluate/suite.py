"""The paper's protocols on a schedule while a model learns, by all hosts together."""

from collections import defaultdict

import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax.data.tokenizer import Tokenizer
from clip_jax.embed.encoder import Encoder, Variables
from clip_jax.errors import UserError
from clip_jax.evaluate.embedding_source import TEST
from clip_jax.evaluate.in_memory import Live
from clip_jax.evaluate.sets import finding, registry
from clip_jax.evaluate.settings import Settings
from clip_jax.evaluate.tasks import TASKS, Context


class Suite:
    """Tasks on data sets, as config.eval.suite names them."""

    def __init__(
        self,
        config: ConfigDict,
        net: nn.Module,
        mesh: Mesh,
        tokenizer: Tokenizer,
        fallback_dir: epath.Path | None,
    ):
        """Opens the test splits, so that what is missing is known before training.

        Args:
          config: the whole config.
          net: one of `clip_jax.models.MODULES`.
          mesh: devices to evaluate on.
          tokenizer: of prompts and captions.
          fallback_dir: directory for indices of shards whose own cannot be written to.

        Raises:
          UserError: no such task or data set; or a data set that is not on disk.
        """
        spec = config.eval.suite
        encoder = Encoder(net, mesh, config.eval.batch_size, config.data.threads)
        self._material = Live(encoder, tokenizer, spec.data_dir, config.data.threads, fallback_dir)
        datasets = [
            finding.with_classes_of(dataset, self._material.source(dataset, TEST))
            for dataset in registry.resolve(spec.datasets)
        ]
        self._context = Context(self._material, Settings.of(spec, config.seed), datasets)
        self._tasks = [name.strip() for name in spec.tasks.split(",")]
        if unknown := [name for name in self._tasks if name not in TASKS]:
            raise UserError(
                f"eval.suite.tasks names {unknown[0]!r}: it takes {', '.join(TASKS)}, "
                "comma-separated."
            )

    def run(self, variables: Variables) -> dict[str, float]:
        """The score to quote of each task on each data set, "TASK/DATASET/METRIC"; and of each task
        the mean over the data sets that are no shifts, "suite/TASK"."""
        self._material.bind(variables)
        self._context.probes.clear()
        found, means = {}, defaultdict(list)
        for dataset in self._context.datasets:
            for name in self._tasks:
                if TASKS[name].applies(self._context, dataset):
                    score = TASKS[name].run(self._context, dataset).scores[0]
                    found[f"{name}/{dataset.name}/{score.metric}"] = score.value
                    if not dataset.base:
                        means[f"suite/{name}"].append(score.value)
            self._material.release(dataset)
        return found | {name: float(np.mean(values)) for name, values in means.items()}
