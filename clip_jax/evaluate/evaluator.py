"""The evaluation of a model during training, by all hosts together."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax.choices import TEMPLATES
from clip_jax.data.sources import opening, reading
from clip_jax.data.sources.base import Example, Source
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.embed.encoder import Encoder, Variables
from clip_jax.errors import UserError
from clip_jax.evaluate import tasks
from clip_jax.evaluate.embedding_source import TEST
from clip_jax.evaluate.in_memory import InMemoryEmbeddings
from clip_jax.evaluate.results import Result, Score
from clip_jax.evaluate.sets import classes
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.sets.views import Relabelled
from clip_jax.models.prompts import class_prompts

# Names of the data sets that a config describes by fields of its own. No slash: a data set's name
# with a slash is taken for a path.
LABELLED, CAPTIONED = "eval.zeroshot.source", "eval.retrieval.source"


class Evaluator:
    """Runs the tasks that a config names on its data sets.

    The data sets are the labelled images of `eval.zeroshot`, the captioned ones of
    `eval.retrieval`, and those that `eval.datasets` names. `eval.tasks` are for the latter.

    Attributes:
      results: results of the last evaluation, in the order of the data sets.
      scores: their scores by the names that they are logged under.
      means: mean headline score of each task over `eval.datasets`, by logged name.
      notes: a sentence about each evaluation in the config that this model does not support, or
        that is not about the training data's kind.
    """

    def __init__(
        self,
        config: ConfigDict,
        net: nn.Module,
        mesh: Mesh,
        tokenizer: Tokenizer,
        fallback_dir: epath.Path | None = None,
    ):
        """Opens the test splits, so that a wrong path fails before training, not after.

        Args:
          config: the whole config.
          net: one of `clip_jax.models.MODULES`.
          mesh: devices to evaluate on.
          tokenizer: tokenizer of captions and prompts.
          fallback_dir: directory for indices of shards whose own cannot be written to.

        Raises:
          UserError: a task or data set does not exist, or a data set is not on disk.
        """
        self.results: list[Result] = []
        self.scores: dict[str, Score] = {}
        self.means: dict[str, float] = {}
        self.notes: list[str] = []
        self._config, self._fallback_dir = config, fallback_dir
        self._image_size = net.size.image_size
        evals, threads = config.eval, config.data.threads
        self._described: dict[str, Source] = {}
        self._open_named: Callable[[Dataset, str], Source]
        self._embeddings = InMemoryEmbeddings(
            Encoder(net, mesh, evals.batch_size, threads),
            tokenizer,
            self._open,
            threads=threads,
            views=config.data.views,
            seed=config.seed,
        )
        named = self._named()
        settings = tasks.Settings.from_config(evals, config.seed)
        self._context = tasks.Context(self._embeddings, settings, named, headline_only=True)
        names = tasks.parse_names(evals.tasks, "eval.tasks") if named else []
        self.notes += tasks.skipped_tasks(self._context, names).values()
        # The tasks of a data set use the features of its shifts too.
        featured = any(tasks.get(name).needs_features for name in names)
        self._with_features = {dataset.name for dataset in named} if featured else set()
        self._planned = [*self._labelled(), *self._captioned()]
        if fields := _only_digits(config):
            self.notes.append(
                f"{' and '.join(fields)}: the embedded digits, not your data. Their scores tell "
                "nothing about it; name labelled or captioned images of your own there, or leave "
                'them out by the type "".'
            )
        for dataset in named:
            supported = [n for n in names if tasks.get(n).supports(self._context, dataset)]
            self._planned.append((dataset, supported))

    def run(
        self, variables: Variables, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Evaluates variables.

        Args:
          variables: variables of the model.
          between: called after each batch, at the same places on all hosts; it may raise an error
            to end the evaluation.

        Returns:
          The numbers to log, named by `logged_name`. With several data sets in `eval.datasets`,
          "TASK/mean" is added: the mean of the headlines over the data sets that are not shifts.
        """
        self._embeddings.bind(variables, self._with_features, between)
        self._context.probes.clear()
        self.results, self.scores = [], {}
        by_task: dict[str, list[float]] = defaultdict(list)
        for dataset, names in self._planned:
            for name in names:
                result = tasks.run(self._context, name, dataset)
                between()
                self.results.append(result)
                self.scores |= {logged_name(score): score for score in result.logged_scores}
                if not _is_described(dataset.name) and not dataset.base:
                    by_task[name].append(result.headline.value)
            self._embeddings.release(dataset)
        self.means = {
            f"{name}/mean": float(np.mean(values))
            for name, values in by_task.items()
            if len(values) > 1
        }
        return {name: score.value for name, score in self.scores.items()} | self.means

    def measures(self, name: str) -> bool:
        """Returns whether a planned task logs names like this one, before anything is measured."""
        return any(
            name == f"{task}/mean" or name.startswith(_prefix(task, dataset.name) + "/")
            for dataset, names in self._planned
            for task in names
        )

    def headlines(self) -> dict[str, Score]:
        """Returns the few scores that fit on a line of text, by their logged names."""
        return {
            logged_name(score): score
            for result in self.results
            for score in result.logged_scores
            if _is_described(result.dataset)
            or (not result.base and f"{result.task}/mean" not in self.means)
            if score == result.headline or score.metric.endswith("recall@1")
        }

    def _open(self, dataset: Dataset, split: str) -> Source:
        """Opens a split of a data set, described in the config or named."""
        if dataset.name in self._described:
            return self._described[dataset.name]
        return self._open_named(dataset, split)

    def _named(self) -> list[Dataset]:
        """Returns the data sets of `eval.datasets`, their test splits opened."""
        evals = self._config.eval
        if not evals.datasets:
            return []
        # Imported here, since the registry brings readers of all kinds of data sets.
        from clip_jax.evaluate.sets import finding, registry

        self._open_named = functools.partial(
            finding.open_split,
            data_dir=evals.data_dir,
            image_size=self._image_size,
            fallback_dir=self._fallback_dir,
        )
        return [
            finding.with_classes_of(dataset, self._embeddings.source(dataset, TEST))
            for dataset in registry.resolve(evals.datasets)
        ]

    def _describe(self, name: str, spec: ConfigDict) -> Source:
        """Opens the source that the config describes, as the data set of this name."""
        source = opening.create(
            spec, self._image_size, self._config.seed, fallback_dir=self._fallback_dir
        )
        self._described[name] = source
        return source

    def _labelled(self) -> list[tuple[Dataset, list[str]]]:
        """Returns the labelled images of `eval.zeroshot` and their task, if any."""
        spec = self._config.eval.zeroshot
        if not spec.source.type:
            return []
        if not self._embeddings.can_score_text:
            self.notes.append(
                f"No zero-shot evaluation: a model trained for {self._config.objective} cannot "
                "score text."
            )
            return []
        source = self._describe(LABELLED, spec.source)
        class_names = tuple(spec.class_names) or tuple(map(classes.spoken, source.class_names))
        templates = tuple(spec.templates) or source.templates or TEMPLATES
        if spec.class_names:
            by_name = getattr(getattr(source, "labels", None), "by_name", False)
            names = source.class_names
            places = classes.match_given(class_names, names, by_name, "eval.zeroshot.source")
            source = self._described[LABELLED] = Relabelled(source, places, class_names)
        prompts, _ = class_prompts(class_names, templates)  # raises UserError if they are wrong
        try:
            self._embeddings.tokenizer(prompts)
        except ValueError as error:
            raise UserError(f"A prompt of eval.zeroshot is too long: {error}.") from None
        dataset = Dataset(
            LABELLED,
            _title(spec.source),
            kind="classification",
            metric="accuracy",
            class_names=class_names,
            prompts={"own": templates},
            partial=True,
        )
        return [(dataset, ["zeroshot"])]

    def _captioned(self) -> list[tuple[Dataset, list[str]]]:
        """Returns the captioned images of `eval.retrieval` and their task, if any."""
        spec, embeddings = self._config.eval.retrieval, self._embeddings
        if not spec.source.type:
            return []
        if not (embeddings.embeds_texts or embeddings.detects_duplicates):
            self.notes.append(
                f"No retrieval evaluation: a model trained for {self._config.objective} embeds no "
                "texts."
            )
            return []
        source = self._describe(CAPTIONED, spec.source)
        if spec.max_examples is not None:
            self._described[CAPTIONED] = _First(source, spec.max_examples)
        dataset = Dataset(CAPTIONED, _title(spec.source), kind="retrieval", metric="")
        return [(dataset, ["retrieval" if embeddings.embeds_texts else "near_duplicates"])]


class _First:
    """The first examples of a source."""

    def __init__(self, source: Source, count: int):
        self.class_names, self.templates = source.class_names, source.templates
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return self._source[index]

    def start(self, indices: Sequence[int]) -> list[Callable[[], Example]]:
        """Begins to read examples, as `reading.start` does."""
        return reading.start(self._source, indices)


def logged_name(score: Score) -> str:
    """Returns the name that a score is logged under.

    It is TASK/METRIC for the data that the config describes ("zeroshot/top1",
    "retrieval/text_to_image/recall@1"), and TASK/DATASET/METRIC for a data set that it names
    ("zeroshot/imagenet/top1", "linear_probe/cifar10/accuracy"). Accuracy of zero-shot
    classification is called top1, beside top5.
    """
    top1 = score.task == "zeroshot" and score.metric == "accuracy"
    return f"{_prefix(score.task, score.dataset)}/{'top1' if top1 else score.metric}"


def _prefix(task: str, dataset: str) -> str:
    return task if _is_described(dataset) else f"{task}/{dataset}"


def _is_described(dataset: str) -> bool:
    return dataset in (LABELLED, CAPTIONED)


def _only_digits(config: ConfigDict) -> list[str]:
    """Returns the evaluations of embedded digits in a config that trains on other data."""
    parts = list(config.data.mixture.values()) or [config.data.source]
    if any(part.type in ("digits", "synthetic") for part in parts):
        return []
    evals = config.eval
    described = {LABELLED: evals.zeroshot.source.type, CAPTIONED: evals.retrieval.source.type}
    found = [name for name, type_ in described.items() if type_ == "digits"]
    named = list(filter(None, map(str.strip, evals.datasets.split(","))))
    if named and all(name.startswith("digits") for name in named):
        found.append("eval.datasets")
    return found


def _title(spec: ConfigDict) -> str:
    """Returns the name of a source for people."""
    kind = "embedded digits" if spec.type == "digits" else spec.name or spec.type
    return " ".join(filter(None, (kind, spec.split)))
