"""Embeds a whole data set with a trained model, as a job that can be interrupted and shared.

    python -m clip_jax embed --model=runs/quickstart pictures --out=embeddings
    python -m clip_jax embed --model=runs/vit_b32 "shards/*.tar" --out=embeddings --of=both
    python -m clip_jax embed --model=runs/vit_b32 captions.csv --out=captions_embedded
    python -m clip_jax embed --model=gs://BUCKET/run "gs://BUCKET/{00000..00099}.tar" \\
        --out=gs://BUCKET/embeddings --coordinator=auto         # on every host of a pod

Each host writes its own part files; its devices split each batch. Run the same command again to
resume: parts that exist are not made again.

Writes to --out:
    part-*.parquet   index, key, captions, labels and groups of each example, and image_embed,
                     text_embed: unit vectors; with --format=npy these lie in
                     part-*.image_embed.npy, ...
    skipped.jsonl    index, key, reason and detail of every unusable example
    embeddings.json  the data, the model and the format
"""

import argparse
import time
from collections import Counter
from typing import TYPE_CHECKING

from clip_jax.common import commands, hosts
from clip_jax.common.commands import at_least
from clip_jax.embed import inputs
from clip_jax.errors import UserError
from clip_jax.storage import locations

if TYPE_CHECKING:
    from clip_jax.embed.store import Store

_POLL = 5.0  # seconds between looks at the parts of other hosts
_COLUMNS: dict[str, tuple[str, ...]] = {
    "images": ("image_embed",),
    "features": ("image_embed", "image_features"),
    "texts": ("text_embed",),
    "both": ("image_embed", "text_embed"),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    with commands.plain_errors():
        _run(_options(arguments))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = commands.parser("embed", __doc__)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="a model that clip_jax.load takes: a workdir, a checkpoint, ...",
    )
    inputs.add_data(parser)
    add("--out", required=True, metavar="DIR", help="local, gs:// or s3://")
    add(
        "--of",
        choices=_COLUMNS,
        help="what to embed; features: images, with their features before the projection too; "
        "texts: the first caption of each example, cut to the context. "
        "Default: images, or texts where there are no others",
    )
    add("--format", choices=("parquet", "npy"), default="parquet", help="file format")
    add(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="precision of the embeddings",
    )
    add("--rows", type=at_least(1), default=65_536, metavar="N", help="examples in a part")
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
    options = parser.parse_args(arguments)
    has_texts_alone = inputs.is_caption_file(options.data, options.image_key)
    if options.of is None:
        options.of = "texts" if has_texts_alone else "images"
    elif options.of != "texts" and has_texts_alone:
        parser.error(f"{options.data} holds texts alone: --of=texts")
    return options


def _run(options: argparse.Namespace) -> None:
    process, processes = hosts.join_hosts(options)
    from clip_jax import api
    from clip_jax.embed import embedder

    out = locations.reachable(options.out)
    fields = {name: getattr(options, name) for name in inputs.FIELDS}
    source = inputs.open_source(fields)
    model = api.load(options.model)
    if model.tokenizer is None and "text_embed" in _COLUMNS[options.of]:
        raise UserError(
            f"The tokenizer of {options.model} is not known: convert it once more by "
            "python -m clip_jax convert with --tokenizer, or embed images alone, by --of=images."
        )
    if "text_embed" in _COLUMNS[options.of] and not hasattr(model.net, "encode_text"):
        raise UserError(
            f"{options.model} was trained for {model.net.size.objective} and embeds no texts: "
            "embed images alone, by --of=images."
        )
    store = embedder.begin_store(
        out,
        fields,
        len(source),
        model,
        _COLUMNS[options.of],
        dtype=options.dtype,
        format=options.format,
        rows=options.rows,
    )
    embed = embedder.Embedder(model, options.batch_size, options.threads)
    made = embed.embed_missing(store, source, process, processes)
    while options.coordinator and store.missing():  # hosts that end take the others with them
        time.sleep(_POLL)
    _report(store, made)


def _report(store: "Store", made: int) -> None:
    """Prints a summary, and lists the skipped examples once all hosts are done."""
    parts = store.manifest.parts
    if missing := store.missing():
        print(f"{made} parts made here; {len(missing)} of {parts} are still missing: other hosts'.")
        return
    skipped = store.finish()
    rows = sum(store.counts())
    if not rows:
        reasons = Counter(bad["reason"] for bad in skipped)
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise UserError(
            f"Nothing was embedded: no example of {store.manifest.data['data']} can be used "
            f"({listed}), see {store.directory / 'skipped.jsonl'}. Once that is solved, embed into "
            "another --out."
        )
    print(f"{rows:,} examples in {parts} part(s) in {store.directory}", end="")
    print(f"; {len(skipped):,} skipped, see skipped.jsonl." if skipped else ".")
