"""python -m clip_jax COMMAND, or --help for the list."""

import sys

from clip_jax.common import commands

COMMANDS = {
    "train": ("clip_jax.training.cli", "trains a model; in a clone also python main.py"),
    "card": ("clip_jax.export.card", "a model card from what a run recorded"),
    "convert": ("clip_jax.weights.convert.cli", "weights of other projects in and out"),
    "data": ("clip_jax.curation.cli", "index, check, describe, pack, de-duplicate, curate data"),
    "compare": ("clip_jax.evaluate.compare", "evaluated models, runs and the paper side by side"),
    "embed": ("clip_jax.embed.cli", "embeddings of a whole data set"),
    "evaluate": ("clip_jax.evaluate.cli", "the paper's protocols; a report with tables and plots"),
    "export": ("clip_jax.export.cli", "programs that run without clip_jax: StableHLO, ONNX"),
    "plan": ("clip_jax.plan.cli", "memory and speed of a config on a TPU pod, without a TPU"),
    "push": ("clip_jax.export.push", "upload a folder with its card to the Hugging Face hub"),
    "search": (
        "clip_jax.search.cli",
        "search them by text or picture, here or on a web page",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs `arguments`; None: those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands.dispatch(COMMANDS, arguments, "python -m clip_jax")


if __name__ == "__main__":
    main()
