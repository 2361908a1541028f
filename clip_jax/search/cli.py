"""Finds embedded pictures by text or by picture.

    python -m clip_jax embed --model=runs/quickstart pictures --out=embeddings
    python -m clip_jax search --model=runs/quickstart --embeddings=embeddings "a red square"
    python -m clip_jax search --model=runs/quickstart --embeddings=embeddings --image=photo.jpg
    python -m clip_jax search --model=runs/quickstart --embeddings=embeddings --serve

Every query is compared with every embedding, on the accelerator where there is one. With --index
an approximate index (usearch) is built beside the embeddings, once, and searched instead; it pays
for many millions of them. Captions are found as well: --column=text_embed, or embeddings of texts
alone.

--serve shows a page with a search box, thumbnails, a place to drop a picture, and its labels by
zero-shot classification; it needs pip install -r requirements-page.txt.
"""

import argparse
import json
from typing import TYPE_CHECKING

from clip_jax.common import commands
from clip_jax.common.commands import at_least
from clip_jax.common.formatting import aligned

if TYPE_CHECKING:
    from clip_jax.search.searcher import Hit, Searcher

_WIDTH = 60  # characters of a caption


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = _options(arguments)
    with commands.plain_errors():
        searcher = _open(options)
        if options.serve:
            from clip_jax.search import web

            web.serve(searcher, options.host, options.port)
        else:
            _print(searcher, options)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = commands.parser("search", __doc__)
    add = parser.add_argument
    add("queries", nargs="*", metavar="TEXT", help="texts to search for, one after the other")
    add(
        "--model",
        required=True,
        help="model of the embeddings, in any form that clip_jax.load takes",
    )
    add("--embeddings", required=True, metavar="DIR", help="output of python -m clip_jax embed")
    add("--image", action="append", default=[], metavar="FILE", help="a picture to look for")
    add("--top", type=at_least(1), default=10, metavar="K", help="results of each query")
    add("--column", default="", help="image_embed or text_embed; default: images where there are")
    add("--index", action="store_true", help="search approximately, by an index that is kept")
    add("--json", action="store_true", help="a line of JSON for each result, instead of tables")
    add("--serve", action="store_true", help="a web page instead")
    add(
        "--host",
        default="127.0.0.1",
        help="address of the page; 0.0.0.0: reachable from other machines",
    )
    add("--port", type=int, default=7860, help="port of the page")
    options = parser.parse_args(arguments)
    if options.serve == bool(options.queries or options.image):
        parser.error("give texts or --image=FILE to look for, or --serve")
    return options


def _open(options: argparse.Namespace) -> "Searcher":
    from clip_jax import api
    from clip_jax.embed.store import open_store
    from clip_jax.search.searcher import Searcher

    store = open_store(options.embeddings)  # first, since it costs little
    return Searcher(api.load(options.model), store, options.column, options.index)


def _print(searcher: "Searcher", options: argparse.Namespace) -> None:
    found = searcher.texts(options.queries, options.top) if options.queries else []
    found += searcher.pictures(options.image, options.top) if options.image else []
    for query, hits in zip(options.queries + options.image, found):
        if options.json:
            print("\n".join(json.dumps(_record(query, hit)) for hit in hits))
        else:
            print(f"\n{query}\n{_table(hits)}")


def _record(query: str, hit: "Hit") -> dict:
    return {"query": query, "score": hit.score, "path": hit.path, **hit.row._asdict()}


def _table(hits: "list[Hit]") -> str:
    rows = [("  score", "key", "path", "caption")]
    for hit in hits:
        caption = " ".join(hit.row.caption.split())
        short = caption if len(caption) <= _WIDTH else f"{caption[: _WIDTH - 1]}…"
        rows.append((f"  {hit.score:.3f}", hit.row.key, hit.path, short))
    kept = [i for i in range(4) if i < 2 or any(row[i] for row in rows[1:])]
    return aligned([[row[i] for i in kept] for row in rows], "<" * len(kept))
