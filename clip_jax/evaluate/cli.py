"""Evaluates a model by the paper's protocols, and writes tables and figures.

    python -m clip_jax evaluate --checkpoint=runs/quickstart --datasets=digits
    python -m clip_jax evaluate --checkpoint=runs/vit_b32 --datasets=paper27 --data_dir=sets
    python -m clip_jax evaluate --checkpoint=ViT-B-32.pt --datasets=imagenet,shifts,mine.json \\
        --data_dir=sets --tasks=zeroshot,linear_probe,robustness
    python -m clip_jax evaluate --checkpoint=runs/vit_b32 --datasets=cifar10 --data_dir=sets \\
        --tasks=overlap --train_data="shards/*.tar" --detector=runs/overlap_detector

A data set that is not on disk is named with the command that fetches it, and the others are
evaluated. Run the same command again to resume; existing results are not computed again.

Tasks: zeroshot (with the set's prompts, one prompt, and bare names), retrieval, linear_probe
(L-BFGS on pre-projection features, L2 strength swept), few_shot (1 to 16 examples per
class), robustness (for sets with shifts among the data sets), overlap (with --train_data), bias
(for sets with group labels), near_duplicates (for a detector: recall of an image's second view).

Data sets: names and collections of the registry (--list shows them), and paths of your own: a
directory of class-named folders, or a JSON file. To compare models: python -m clip_jax compare.

Writes to --out:
    report.html             tables, curves, confusions, mistakes
    results.json, .csv      every score with its interval
    overlap-*.html          pairs by which to set the threshold of an overlap
    features/, results/     embeddings, and the result of each task
"""

import argparse

from ml_collections import ConfigDict

from clip_jax.choices import AVAILABLE
from clip_jax.common import commands, hosts
from clip_jax.common.commands import at_least
from clip_jax.configs import default
from clip_jax.errors import UserError


def main(arguments: list[str]) -> None:
    """Runs the command; ends the process where it must."""
    options = _parser(default.get_config().eval).parse_args(arguments)
    with commands.plain_errors():
        if not (options.checkpoint or options.list):
            raise UserError(
                "No model is named: --checkpoint=runs/quickstart, for example, or other weights."
            )
        from clip_jax.evaluate import command  # with JAX, which --help does not wait for

        if options.list:
            command.list_datasets()
        else:
            command.evaluate(options)


def _parser(evals: ConfigDict) -> argparse.ArgumentParser:
    parser = commands.parser("evaluate", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="MODEL",
        help="a model that clip_jax.load takes: a workdir, a file, a name",
    )
    add("--step", type=int, help="step of a checkpoint in a workdir; default: the last")
    add("--tasks", default="", help="comma-separated; default: all that the data allow")
    add(
        "--datasets",
        default=AVAILABLE,
        help="names, collections, paths, comma-separated; default: all of the registry on disk",
    )
    add("--data_dir", default=evals.data_dir, metavar="DIR", help="where data sets lie")
    add("--out", default="", metavar="DIR", help="default: evaluation-STEP in the workdir")
    add("--list", action="store_true", help="list the data sets, and end")
    add("--prompts", default=evals.prompts, help=f"set of prompts; default: {evals.prompts}")
    add("--shots", default=",".join(map(str, evals.shots)), help="few_shot: examples per class")
    add(
        "--repeats",
        type=at_least(1),
        default=evals.repeats,
        help="few_shot: random draws of the examples",
    )
    add("--testbed", default="", metavar="FILE", help="robustness: .csv of other models")
    add("--train_data", default="", metavar="DATA", help="overlap: as for clip_jax data")
    add("--detector", default="", metavar="MODEL", help="overlap: default: the model itself")
    add(
        "--overlap_threshold",
        default=str(evals.overlap_threshold),
        metavar="X",
        help="overlap: cosine of near-duplicates; by set as well, as in 0.95,cifar10=0.9",
    )
    add(
        "--batch_size",
        type=at_least(1),
        default=256,
        metavar="N",
        help="examples per step on each host",
    )
    add(
        "--threads",
        type=at_least(0),
        default=0,
        metavar="N",
        help="threads that decode; 0: one per core",
    )
    hosts.add_hosts(parser)
    return parser
