"""Evaluates a model by the paper's protocols, and writes tables and figures.

    python -m clip_jax evaluate --checkpoint=runs/quickstart --datasets=digits
    python -m clip_jax evaluate --checkpoint=runs/vit_b32 --datasets=paper27 --data_dir=sets
    python -m clip_jax evaluate --checkpoint=ViT-B-32.pt --datasets=imagenet,shifts,mine.json \\
        --data_dir=sets --tasks=zeroshot,linear_probe,robustness
    python -m clip_jax evaluate --checkpoint=runs/vit_b32 --datasets=cifar10 --data_dir=sets \\
        --tasks=overlap --train_data="shards/*.tar" --detector=runs/overlap_detector

A data set that is not on disk is named with the command that fetches it, and the others go on.
Run the same command again to go on: nothing that is there is computed again.

Tasks: zeroshot (with the set's prompts, one prompt, and bare names), retrieval, linear_probe
(L-BFGS on the features before the projection, strength swept), few_shot (1 to 16 examples per
class), robustness (of sets with shifts among the data sets), overlap (with --train_data), bias (of
sets with group labels).

Data sets: names and collections of the registry (--list shows them), and paths of your own: a
directory of class-named folders, or a JSON file. Comparison of several: python -m clip_jax compare.

Writes to --out:
    report.html             tables, curves, confusions, mistakes
    results.json, .csv      every score with its interval
    overlap-*.html          pairs by which to set the threshold of an overlap
    features/, results/     embeddings, and what each task found
"""

import argparse
import dataclasses
import datetime
import math
from typing import TYPE_CHECKING

from etils import epath

from clip_jax.common import commands, hosts
from clip_jax.data.arguments import at_least, share
from clip_jax.errors import UserError
from clip_jax.storage import locations

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from clip_jax.evaluate.folder import About, Evaluation, Folder
    from clip_jax.evaluate.on_disk import Stored
    from clip_jax.evaluate.overlapping import Training
    from clip_jax.evaluate.settings import Settings
    from clip_jax.weights.base import Weights

AVAILABLE = "available"


def main(arguments: list[str]) -> None:
    """Runs the command; ends the process where it must."""
    from configs import default

    suite = default.get_config().eval.suite
    options = _parser(suite).parse_args(arguments)
    with commands.plain_errors():
        if options.list:
            _list()
        elif options.checkpoint:
            _run(options, suite)
        else:
            raise UserError(
                "No model is named: --checkpoint=runs/quickstart, for example, or other weights."
            )


def _parser(suite: "ConfigDict") -> argparse.ArgumentParser:
    parser = commands.parser("evaluate", __doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="MODEL", help="what clip_jax.load takes: a workdir, a file, a name")
    add("--step", type=int, help="which checkpoint of a workdir; default: the last")
    add("--tasks", default="", help="comma-separated; default: all that the data allow")
    add(
        "--datasets",
        default=AVAILABLE,
        help="names, collections, paths, comma-separated; default: all of the registry on disk",
    )
    add("--data_dir", default=suite.data_dir, metavar="DIR", help="where data sets lie")
    add("--out", default="", metavar="DIR", help="default: evaluation-STEP in the workdir")
    add("--list", action="store_true", help="list the data sets, and end")
    add("--prompts", default=suite.prompts, help=f"set of prompts; default: {suite.prompts}")
    add("--shots", default=",".join(map(str, suite.shots)), help="examples per class, few_shot")
    add("--repeats", type=at_least(1), default=suite.repeats, help="draws of them")
    add("--testbed", default="", metavar="FILE", help="robustness: .csv of other models")
    add("--train_data", default="", metavar="DATA", help="overlap: as for clip_jax data")
    add("--detector", default="", metavar="MODEL", help="overlap: default: the model itself")
    add(
        "--overlap_threshold",
        default=str(suite.overlap_threshold),
        metavar="X",
        help="overlap: cosine of near-duplicates; by set as well, as in 0.95,cifar10=0.9",
    )
    add("--batch_size", type=at_least(1), default=256, metavar="N", help="over a host's devices")
    add("--threads", type=at_least(0), default=0, metavar="N", help="that decode; 0: one per core")
    hosts.add_hosts(parser)
    return parser


def _run(options: argparse.Namespace, suite: "ConfigDict") -> None:
    settings, names = _settings(options, suite), _tasks(options.tasks)
    if options.data_dir:
        locations.reachable(options.data_dir)
    process, _ = hosts.join_hosts(options)
    from clip_jax.evaluate import running
    from clip_jax.evaluate.folder import Evaluation, Folder
    from clip_jax.evaluate.sets import registry
    from clip_jax.evaluate.tasks import Context
    from clip_jax.weights import convert

    available = options.datasets == AVAILABLE
    datasets = registry.resolve(",".join(registry.names()) if available else options.datasets)
    found = convert.read(options.checkpoint, step=options.step)
    out = _out(options, found)
    material = _material(options, found, out / "features")

    def say(line: str) -> None:
        if process == 0:
            print(line, flush=True)

    say(f"{material.model}\n")
    training = _training(options, material, out)
    context = Context(material, settings, datasets, training)
    context, missing = running.complete(context, say if not available else lambda line: None)
    if not context.datasets:
        raise UserError(
            "None of the data sets is there. The embedded one needs no download: --datasets=digits."
        )
    idle = running.idle(context, names, say) if options.tasks else {}
    running.prepare(context, names)
    if process == 0:
        material.alone()
        folder = Folder(out)
        results, failed = running.run_all(context, names, folder, material.parameters, say)
        evaluation = Evaluation(
            model=_about(found),
            settings=dataclasses.asdict(settings),
            results=tuple(results),
            missing=({} if available else missing) | idle | failed,
            finished=datetime.datetime.now().isoformat(timespec="seconds"),
        )
        _write(folder, evaluation)
    _wait(options)


def _settings(options: argparse.Namespace, suite: "ConfigDict") -> "Settings":
    from clip_jax.evaluate.settings import Settings

    suite.prompts, suite.repeats = options.prompts, options.repeats
    try:
        suite.shots = tuple(sorted({int(n) for n in options.shots.split(",")}))
        pairs = [item.rpartition("=") for item in options.overlap_threshold.split(",")]
        thresholds = {name.strip(): share(value) for name, _, value in pairs}
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(
            f"The command line cannot be read ({error}): --shots=1,2,4 are numbers of examples, "
            "--overlap_threshold=0.95,cifar10=0.9 cosines, for all sets or for one."
        ) from None
    suite.overlap_threshold = thresholds.pop("", suite.overlap_threshold)
    return Settings.of(suite, seed=0, thresholds=thresholds, testbed=options.testbed)


def _tasks(wanted: str) -> list[str]:
    from clip_jax.evaluate.tasks import TASKS

    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TASKS]:
        raise UserError(
            f"There is no task {unknown[0]!r}: choose among {', '.join(TASKS)}, comma-separated."
        )
    return names or list(TASKS)


def _out(options: argparse.Namespace, found: "Weights") -> epath.Path:
    """Where it is written: the directory named, or one beside the checkpoint it belongs to."""
    if options.out:
        return locations.reachable(options.out)
    workdir = locations.parse(options.checkpoint)
    if workdir.parent.name == "checkpoints":
        workdir = workdir.parent.parent
    if not workdir.is_dir():
        raise UserError(
            f"Where is the evaluation of {options.checkpoint} to be kept? Name a directory: "
            "--out=evaluations/NAME."
        )
    step = found.origin.get("step")
    return workdir / (f"evaluation-{step}" if step else "evaluation")


def _material(options: argparse.Namespace, found: "Weights", directory: epath.Path) -> "Stored":
    from clip_jax import api
    from clip_jax.evaluate.on_disk import Stored

    model = api.from_weights(found)
    if model.tokenizer is None:
        raise UserError(
            "It is not known how the texts of this model become ids: convert it once more by "
            "python -m clip_jax convert with --tokenizer."
        )
    return Stored(
        model,
        directory,
        options.data_dir,
        batch_size=options.batch_size,
        threads=options.threads,
        process=options.process,
        processes=options.processes,
    )


def _training(
    options: argparse.Namespace, material: "Stored", out: epath.Path
) -> "Training | None":
    """The training data, embedded; None: no analysis of overlap is asked for."""
    if not options.train_data:
        return None
    from clip_jax.embed import inputs
    from clip_jax.evaluate.overlapping import Training
    from clip_jax.weights import convert

    detector = material
    if options.detector:
        detector = _material(options, convert.read(options.detector), out / "detector")
    fields = dict.fromkeys(inputs.FIELDS, "") | {"data": options.train_data, "split": "train"}
    return Training(options.train_data, inputs.open_source(fields), detector)


def _about(found: "Weights") -> "About":
    from clip_jax.evaluate.folder import About
    from clip_jax.export import record
    from clip_jax.models import flops as model_flops
    from clip_jax.weights.base import variable_shapes

    trained = record.read_training(found.origin)
    seen = trained.images_seen if trained else 0
    shapes = variable_shapes(found.size)
    return About(
        name=str(found.size),
        source=str(found.origin["source"]),
        parameters=sum(math.prod(s) for name, s in shapes.items() if name.startswith("params/")),
        image_flops=model_flops.image_flops(found.size),
        images_seen=seen,
        train_flops=model_flops.step_flops(found.size, 1) * seen,
    )


def _write(folder: "Folder", evaluation: "Evaluation") -> None:
    from clip_jax.evaluate import report
    from clip_jax.evaluate.folder import read_evaluation

    if not evaluation.results:
        reasons = " ".join(evaluation.missing.values())
        raise UserError(f"Nothing could be evaluated. {reasons}".strip())
    folder.write_all(evaluation)
    pages = report.write(folder.directory, read_evaluation(folder.directory))
    if evaluation.missing:
        print(f"\n{len(evaluation.missing)} could not be evaluated; the report says why.")
    print(f"\nReport: {pages[0]}")


def _wait(options: argparse.Namespace) -> None:
    """For the first host, since hosts that end take the others with them."""
    if options.coordinator:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("evaluated")


def _list() -> None:
    from clip_jax.common.formatting import aligned
    from clip_jax.evaluate.sets import registry

    rows = [("name", "data set", "metric or kind", "in")]
    for name in registry.names():
        dataset = registry.get(name)
        rows.append(
            (name, dataset.title, dataset.metric or dataset.kind, ", ".join(dataset.collections))
        )
    print(aligned(rows, "<<<<"))
