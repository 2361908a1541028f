"""python -m clip_jax COMMAND, or --help for the list."""

import sys

from clip_jax.common import commands

COMMANDS = {
    "train": ("clip_jax.training.cli", "trains a model; in a clone also python main.py"),
    "card": ("clip_jax.export.card", "writes a model card from what a run recorded"),
    "check-curve": (
        "clip_jax.status.check_curve",
        "tells whether a reference run learned as it should",
    ),
    "convert": ("clip_jax.weights.convert.cli", "converts weights of other projects, both ways"),
    "data": ("clip_jax.curation.cli", "prepares data: index, check, stats, pack, dedup, curate"),
    "compare": ("clip_jax.evaluate.compare", "compares evaluated models, runs and the paper"),
    "embed": ("clip_jax.embed.cli", "embeds the images or texts of a whole data set"),
    "evaluate": ("clip_jax.evaluate.cli", "evaluates by the paper's protocols; writes a report"),
    "export": ("clip_jax.export.cli", "writes programs that run without clip_jax: StableHLO, ONNX"),
    "plan": ("clip_jax.plan.cli", "predicts memory and speed on a TPU pod, without a TPU"),
    "push": ("clip_jax.export.push", "uploads a folder with its card to the Hugging Face hub"),
    "search": (
        "clip_jax.search.cli",
        "searches embedded images by text or picture, here or on a web page",
    ),
    "status": ("clip_jax.status.cli", "tells how runs are doing: state, time spent, curves"),
    "sweep": ("clip_jax.sweep.cli", "trains a grid of settings; loss and error against compute"),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs `arguments`; None: those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands.dispatch(COMMANDS, arguments, "python -m clip_jax")


if __name__ == "__main__":
    main()
