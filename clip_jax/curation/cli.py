"""python -m clip_jax data COMMAND, or --help for the list."""

from clip_jax.common import commands

COMMANDS = {
    "index": ("clip_jax.curation.index", "indexes the samples of shards, in parallel"),
    "check": ("clip_jax.curation.check", "checks every example as training would use it"),
    "stats": ("clip_jax.curation.stats", "counts image sizes, caption lengths, duplicates"),
    "pack": ("clip_jax.curation.pack", "writes any data as tar shards"),
    "dedup": ("clip_jax.curation.dedup", "finds near-duplicate images"),
    "curate": ("clip_jax.curation.balancing", "balances captions by queries, as the paper did"),
}


def main(arguments: list[str]) -> None:
    """Runs a command; user errors end the process with a paragraph and status 2."""
    with commands.plain_errors():
        commands.dispatch(COMMANDS, arguments, "python -m clip_jax data")
