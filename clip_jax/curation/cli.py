"""python -m clip_jax data COMMAND, or --help for the list."""

from clip_jax.common import commands

COMMANDS = {
    "index": ("clip_jax.curation.index", "find every sample of shards once, in parallel"),
    "check": ("clip_jax.curation.check", "try every example as training would, and report"),
    "stats": ("clip_jax.curation.stats", "image sizes, caption lengths, duplicates"),
    "pack": ("clip_jax.curation.pack", "write any data as tar shards"),
    "dedup": ("clip_jax.curation.dedup", "find near-duplicate images"),
    "curate": ("clip_jax.curation.curate", "balance captions by queries, as the paper did"),
}


def main(arguments: list[str]) -> None:
    """Runs a command; mistakes of the user end the process with a paragraph and status 2."""
    with commands.plain_errors():
        commands.dispatch(COMMANDS, arguments, "python -m clip_jax data")
