"""Runs `python -m clip_jax evaluate`, whose flags are in cli.py: all tasks, then tables and pages.

Results that exist already are kept, and missing data sets are reported.
"""

import argparse
import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from clip_jax import api, weights
from clip_jax.choices import AVAILABLE
from clip_jax.common import hosts
from clip_jax.common.commands import fraction
from clip_jax.common.formatting import aligned, format_seconds, percent
from clip_jax.configs import default
from clip_jax.embed import inputs
from clip_jax.errors import StorageError, UserError
from clip_jax.evaluate import report, tasks
from clip_jax.evaluate.embedding_source import TEST
from clip_jax.evaluate.on_disk import OnDiskEmbeddings, TrainingImages
from clip_jax.evaluate.results import (
    About,
    Evaluation,
    Folder,
    Result,
    Score,
    fingerprint,
    read_evaluation,
)
from clip_jax.evaluate.sets import finding, registry
from clip_jax.evaluate.sets.dataset import Dataset
from clip_jax.evaluate.tasks import Context, Settings
from clip_jax.export import record
from clip_jax.models import flops as model_flops
from clip_jax.storage import locations
from clip_jax.weights.model import Weights

Say = Callable[[str], None]
_VERSION = 2  # of the tasks; results of another one are computed again


def evaluate(options: argparse.Namespace) -> None:
    """Evaluates the model that the options of the command name."""
    config = default.get_config()
    settings = _settings(options, config.eval)
    names = tasks.parse_names(options.tasks, "--tasks") or list(tasks.NAMES)
    if options.data_dir:
        locations.reachable(options.data_dir)
    process, processes = hosts.join_hosts(options)
    available = options.datasets == AVAILABLE
    datasets = registry.resolve(",".join(registry.names()) if available else options.datasets)
    found = weights.open(options.checkpoint, step=options.step)
    out = _out(options, found)
    about = _model_info(found)  # by all hosts, who open the checkpoint together

    def embed(model: Weights, directory: epath.Path) -> OnDiskEmbeddings:
        return _embeddings(options, model, directory, config.data.views, process, processes)

    embeddings = embed(found, out / "features")

    def say(line: str) -> None:
        if process == 0:
            print(line, flush=True)

    say(f"{embeddings.model}\n")
    training = None
    if options.train_data:
        detector = embeddings
        if options.detector:
            detector_weights = weights.open(options.detector)
            detector = embed(detector_weights, out / "detector")
        fields = dict.fromkeys(inputs.FIELDS, "") | {"data": options.train_data, "split": "train"}
        training = TrainingImages(options.train_data, inputs.open_source(fields), detector)
    context = Context(embeddings, settings, datasets, training)
    context, missing = available_datasets(context)
    if available:  # the user did not ask for them by name
        missing = {}
    for dataset in datasets:
        if dataset.name in missing:
            say(f"{dataset.title}: {missing[dataset.name]}")
    if not context.datasets:
        raise UserError(
            "None of the data sets is there. The embedded one needs no download: --datasets=digits."
        )
    skipped = tasks.skipped_tasks(context, names) if options.tasks else {}
    for sentence in skipped.values():
        say(sentence)
    prepare(context, names)
    if process == 0:
        embeddings.work_alone()
        folder = Folder(out)
        results, failed = run_all(context, names, folder, embeddings.parameters, say)
        evaluation = Evaluation(
            model=about,
            settings=dataclasses.asdict(settings),
            results=tuple(results),
            missing=missing | skipped | failed,
            finished=datetime.datetime.now().isoformat(timespec="seconds"),
        )
        _write(folder, evaluation)
    if options.coordinator:  # hosts that end would take the first one with them
        hosts.barrier("evaluated")


def list_datasets() -> None:
    """Prints the data sets of the registry."""
    rows = [("name", "data set", "metric or kind", "in")]
    for name in registry.names():
        dataset = registry.get(name)
        rows.append(
            (name, dataset.title, dataset.metric or dataset.kind, ", ".join(dataset.collections))
        )
    print(aligned(rows, "<<<<"))


# ---- From the options to a context


def _settings(options: argparse.Namespace, evals: ConfigDict) -> Settings:
    evals.prompts, evals.repeats = options.prompts, options.repeats
    try:
        evals.shots = tuple(sorted({int(n) for n in options.shots.split(",")}))
        pairs = [item.rpartition("=") for item in options.overlap_threshold.split(",")]
        thresholds = {name.strip(): fraction(value) for name, _, value in pairs}
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(
            f"The command line cannot be read ({error}): --shots=1,2,4 are numbers of examples, "
            "--overlap_threshold=0.95,cifar10=0.9 cosines, for all sets or for one."
        ) from None
    evals.overlap_threshold = thresholds.pop("", evals.overlap_threshold)
    return Settings.from_config(evals, seed=0, thresholds=thresholds, testbed=options.testbed)


def _out(options: argparse.Namespace, found: Weights) -> epath.Path:
    """Returns the directory given by --out, or one in the workdir of the checkpoint."""
    if options.out:
        return locations.reachable(options.out)
    workdir = locations.parse(options.checkpoint)
    if workdir.parent.name == "checkpoints":
        workdir = workdir.parent.parent
    if not workdir.is_dir():
        raise UserError(
            f"There is no directory for the evaluation of {options.checkpoint}. Name one: "
            "--out=evaluations/NAME."
        )
    step = found.origin.get("step")
    return workdir / (f"evaluation-{step}" if step else "evaluation")


def _embeddings(
    options: argparse.Namespace,
    found: Weights,
    directory: epath.Path,
    views: ConfigDict,
    process: int,
    processes: int,
) -> OnDiskEmbeddings:
    model = api.Model.from_weights(found)
    if model.tokenizer is None:
        raise UserError(
            "The tokenizer of this model is not known: convert it once more by "
            "python -m clip_jax convert with --tokenizer."
        )
    return OnDiskEmbeddings(
        model,
        directory,
        options.data_dir,
        batch_size=options.batch_size,
        threads=options.threads,
        views=views,
        process=process,
        processes=processes,
    )


def _model_info(found: Weights) -> About:
    trained = record.read_training(found.origin)
    seen = trained.images_seen if trained else 0
    captions = trained.config["data"].get("captions", 1) if trained else 1
    return About(
        name=str(found.size),
        source=str(found.origin["source"]),
        parameters=found.parameters,
        image_flops=model_flops.image_flops(found.size),
        images_seen=seen,
        train_flops=model_flops.step_flops(found.size, 1, captions) * seen,
    )


# ---- All tasks on all data sets


def available_datasets(context: Context) -> tuple[Context, dict[str, str]]:
    """Returns the context with the data sets on disk, and the reason why others are missing."""
    found, missing = [], {}
    for dataset in context.datasets:
        try:
            source = context.embeddings.source(dataset, TEST)
            found.append(finding.with_classes_of(dataset, source))
        except StorageError:
            raise
        except UserError as error:
            missing[dataset.name] = str(error)
    return dataclasses.replace(context, datasets=found), missing


def prepare(context: Context, names: Sequence[str]) -> None:
    """Embeds everything that the tasks need, together with the other hosts."""
    for dataset in context.datasets:
        supported = [name for name in names if tasks.get(name).supports(context, dataset)]
        splits = [split for name in supported for split in tasks.get(name).splits]
        for split in dict.fromkeys(splits):
            try:
                context.embeddings.embedded(dataset, split)
            except StorageError:
                raise
            except UserError:
                continue  # reported by the task that needs it


def run_all(
    context: Context, names: Sequence[str], folder: Folder, parameters: str, say: Say
) -> tuple[list[Result], dict[str, str]]:
    """Runs every task on every data set that it supports.

    Args:
      context: inputs of the tasks, with the data sets on disk.
      names: names of tasks.
      folder: directory of results; results of the same inputs are kept.
      parameters: checksum of the model.
      say: prints a line for the user.

    Returns:
      The results, and the reasons why tasks could not be run, by "DATASET, TASK".
    """
    results, failed = [], {}
    width = max(len(dataset.title) for dataset in context.datasets)
    for dataset in context.datasets:
        for name in names:
            task = tasks.get(name)
            if not task.supports(context, dataset):
                continue
            made_of = fingerprint(_result_inputs(context, name, dataset, parameters))
            result = folder.read(name, dataset.name, made_of)
            try:
                if result is None:
                    result = tasks.run(context, name, dataset, made_of)
                    folder.write(result)
                    say(_line(result, width, format_seconds(result.seconds)))
                else:
                    say(_line(result, width, "done before"))
                results.append(result)
            except StorageError:  # other tasks would fail alike
                raise
            except UserError as error:
                failed[f"{dataset.name}, {name}"] = str(error)
                say(f"{dataset.title}, {task.title.lower()}: {error}")
        context.embeddings.release(dataset)
    return results, failed


def _result_inputs(
    context: Context, name: str, dataset: Dataset, parameters: str
) -> Mapping[str, Any]:
    """Returns everything that a result depends on."""
    training = context.training if name == "overlap" else None
    splits = tasks.get(name).splits
    return {
        "task": name,
        "version": _VERSION,
        "samples": [_sample(context, dataset, split) for split in splits],
        "dataset": dataclasses.asdict(dataset),
        "others": [each.name for each in context.datasets if each.base == dataset.name],
        "parameters": parameters,
        "settings": dataclasses.asdict(context.settings),
        "training": (training.name, training.parameters) if training else (),
    }


def _sample(context: Context, dataset: Dataset, split: str) -> str:
    """Returns a checksum of a split; "" where it is not there, which the task then tells."""
    embeddings = context.embeddings
    assert isinstance(embeddings, OnDiskEmbeddings)
    try:
        return embeddings.sample(dataset, split)
    except StorageError:
        raise
    except UserError:
        return ""


def _line(result: Result, width: int, when: str) -> str:
    task = tasks.get(result.task).title.lower()
    return f"{result.title:<{width}}  {task:<30}  {_show(result.headline)}  ({when})"


def _show(score: Score) -> str:
    """ "accuracy 98.6 % (97.5 % to 99.3 %)"."""
    within = ""
    if score.low is not None and score.high is not None:
        within = f" ({percent(score.low)} to {percent(score.high)})"
    name = score.metric.replace("_", " ").replace("/", ", ")
    return f"{name} {percent(score.value)}{within}".replace("\N{NO-BREAK SPACE}", " ")


def _write(folder: Folder, evaluation: Evaluation) -> None:
    if not evaluation.results:
        reasons = " ".join(evaluation.missing.values())
        raise UserError(f"Nothing could be evaluated. {reasons}".strip())
    folder.write_all(evaluation)
    pages = report.write(folder.directory, read_evaluation(folder.directory))
    if evaluation.missing:
        print(f"\n{len(evaluation.missing)} could not be evaluated; the report says why.")
    print(f"\nReport: {pages[0]}")
