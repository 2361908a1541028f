"""python -m clip_jax data COMMAND, or --help for the list."""

import sys

from clip_jax import commands
from clip_jax.errors import UserError

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
    try:
        commands.dispatch(COMMANDS, arguments, "python -m clip_jax data")
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
