"""python -m clip_jax data curate COMMAND, or --help for both.

The construction of the paper's 400 million pairs: captions are searched for 500,000 queries, and
each query keeps at most about 20,000 of the pairs that match it, so that frequent queries do not
dominate. Details as published later by Xu et al., "Demystifying CLIP Data" (arXiv 2309.16671).
"""

from clip_jax.common import commands

COMMANDS = {
    "queries": (
        "clip_jax.curation.balancing.curate_queries",
        "build a list of queries from text, titles and WordNet",
    ),
    "pairs": (
        "clip_jax.curation.balancing.curate_pairs",
        "choose pairs so that no query has too many of them",
    ),
}


def main(arguments: list[str]) -> None:
    """Runs one of the commands."""
    commands.dispatch(COMMANDS, arguments, "python -m clip_jax data curate")
