"""Embeds a whole data set with a trained model, as a job that can be interrupted and shared.

    python -m clip_jax embed --model=runs/quickstart pictures --out=embeddings
    python -m clip_jax embed --model=runs/vit_b32 "shards/*.tar" --out=embeddings --of=both
    python -m clip_jax embed --model=runs/vit_b32 captions.csv --out=captions_embedded
    python -m clip_jax embed --model=gs://BUCKET/run "gs://BUCKET/{00000..00099}.tar" \\
        --out=gs://BUCKET/embeddings --coordinator=auto         # on every host of a pod

Every device of a host takes its share of each batch, every host its share of the parts. Run the
same command again to go on: parts that are there are not made again.

Writes to --out:
    part-*.parquet   index, key, caption and label of each example, and image_embed, text_embed:
                     unit vectors; with --format=npy these lie in part-*.image_embed.npy, ...
    skipped.jsonl    index, key, reason and detail of every example that cannot be used
    embeddings.json  what they were made of
"""

import argparse
import hashlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from clip_jax.curation.arguments import at_least
from clip_jax.errors import UserError
from clip_jax.retrieval import running

if TYPE_CHECKING:
    from clip_jax.api import Model
    from clip_jax.data.sources import Source
    from clip_jax.evals.encoder import Encoder
    from clip_jax.retrieval.reader import Reader
    from clip_jax.retrieval.store import Store

_POLL = 5.0  # seconds between looks at what other hosts have made
_COLUMNS: dict[str, tuple[str, ...]] = {
    "images": ("image_embed",),
    "texts": ("text_embed",),
    "both": ("image_embed", "text_embed"),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    with running.plain_errors():
        _run(_options(arguments))


def fingerprint(model: "Model") -> str:
    """A checksum of a model's parameters and tokenizer, hexadecimal."""
    import jax

    from clip_jax.sharding import path_name

    digest = hashlib.sha256(model.tokenizer.identity.encode() if model.tokenizer else b"")
    for path, leaf in jax.tree.leaves_with_path(model.variables):
        digest.update(path_name(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _options(arguments: list[str]) -> argparse.Namespace:
    from clip_jax.retrieval import inputs

    parser = running.parser("embed", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="what clip_jax.load takes: a workdir, a checkpoint, ...")
    inputs.add_data(parser)
    add("--out", required=True, metavar="DIR", help="local or gs://")
    add(
        "--of",
        choices=_COLUMNS,
        help="what to embed; of texts the first caption of each example, cut to the context. "
        "Default: images, or texts where there are no others",
    )
    add("--format", choices=("parquet", "npy"), default="parquet", help="of the embeddings")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the embeddings")
    add("--rows", type=at_least(1), default=65_536, metavar="N", help="examples in a part")
    add("--batch_size", type=at_least(1), default=256, metavar="N", help="over a host's devices")
    add("--threads", type=at_least(0), default=0, metavar="N", help="that decode; 0: one per core")
    running.add_hosts(parser)
    options = parser.parse_args(arguments)
    if options.of is None:
        options.of = "texts" if inputs.is_caption_file(options.data) else "images"
    elif options.of != "texts" and inputs.is_caption_file(options.data):
        parser.error(f"{options.data} holds texts alone: --of=texts")
    return options


def _run(options: argparse.Namespace) -> None:
    process, processes = running.join_hosts(options)
    import jax
    import tqdm

    from clip_jax import api, sharding
    from clip_jax.evals.encoder import Encoder
    from clip_jax.retrieval import inputs

    fields = {name: getattr(options, name) for name in inputs.FIELDS}
    source = inputs.open_source(fields)
    model = api.load(options.model)
    if model.tokenizer is None and options.of != "images":
        raise UserError(
            f"It is not known how the texts of {options.model} become ids: convert it once more by "
            "python -m clip_jax convert with --tokenizer, or embed images alone, by --of=images."
        )
    store = _begin(options, fields, model, len(source))
    mesh = sharding.make_mesh(devices=jax.local_devices())
    model.variables = jax.device_put(model.variables, sharding.replicated(mesh))
    encoder = Encoder(model.net, mesh, options.batch_size, options.threads)
    todo = [part for part in store.missing() if part % processes == process]
    total = sum(stop - first for first, stop in map(store.range, todo))
    with tqdm.tqdm(desc="embedding", total=total, unit=" examples", mininterval=0.5) as bar:
        for part in todo:
            _embed_part(part, store, source, model, encoder, options, bar)
    while options.coordinator and store.missing():  # hosts that end take the others with them
        time.sleep(_POLL)
    _report(store, len(todo))


def _begin(
    options: argparse.Namespace, fields: dict[str, str], model: "Model", examples: int
) -> "Store":
    from clip_jax.retrieval.store import Manifest, Store

    manifest = Manifest(
        data=fields,
        examples=examples,
        columns=_COLUMNS[options.of],
        width=model.net.size.embed_dim,
        dtype=options.dtype,
        format=options.format,
        part_rows=options.rows,
        model=str(model.net.size),
        parameters=fingerprint(model),
    )
    store = Store(epath.Path(options.out), manifest)
    store.begin()
    return store


def _embed_part(
    part: int,
    store: "Store",
    source: "Source",
    model: "Model",
    encoder: "Encoder",
    options: argparse.Namespace,
    bar: Any,
) -> None:
    """Embeds and writes one part, advancing the progress bar."""
    from clip_jax.retrieval.reader import Reader

    columns, size = store.manifest.columns, model.net.size
    reader = Reader(
        source,
        *store.range(part),
        size=size if "image_embed" in columns else None,
        tokenizer=model.tokenizer if "text_embed" in columns else None,
    )
    embeds = {}
    if "image_embed" in columns:
        embeds["image_embed"] = _images(encoder, model, reader, bar)[reader.numbers]
    else:
        for _ in reader.read_all(options.threads):
            bar.update()
    if "text_embed" in columns:
        embeds["text_embed"] = _texts(encoder, model, [row.caption for row in reader.rows])
    store.write(part, reader.rows, embeds, reader.skipped)


def _images(encoder: "Encoder", model: "Model", reader: "Reader", bar: Any) -> np.ndarray:
    """float32 [len(reader), width]; what stands for unusable examples means nothing."""
    embeds = np.zeros((len(reader), model.net.size.embed_dim), np.float32)
    for batch in encoder.images(model.variables, reader):
        embeds[batch["index"]] = batch["embed"]
        bar.update(len(batch["index"]))
    return embeds


def _texts(encoder: "Encoder", model: "Model", captions: list[str]) -> np.ndarray:
    """float32 [n, width]."""
    assert model.tokenizer is not None
    tokens = model.tokenizer(captions, truncate=True)
    return encoder.texts(model.variables, tokens, by_length=True)


def _report(store: "Store", made: int) -> None:
    """Says what has been done, and lists what was skipped once all hosts are through."""
    parts = store.manifest.parts
    if missing := store.missing():
        print(f"{made} parts made here; {len(missing)} of {parts} are still missing: other hosts'.")
        return
    skipped = store.finish()
    rows = sum(store.counts())
    print(f"{rows:,} examples in {parts} part(s) in {store.directory}", end="")
    print(f"; {len(skipped):,} skipped, see skipped.jsonl." if skipped else ".")
