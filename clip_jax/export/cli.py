"""Exports a model to run without clip_jax, with its card.

  python -m clip_jax export --model=runs/mine --out=exported --license=apache-2.0
  python -m clip_jax export --model=runs/mine --out=onnx --format=onnx --license=apache-2.0
  python -m clip_jax push --dir=exported --repo=org/name

Writes to --out, which is local, gs:// or s3://:
  encode_image.*   pixels, uint8 [batch, size, size, 3], to embeddings, float32 [batch, dimensions]
  encode_text.*    tokens, int32 [batch, context length], to the same
  preprocess.json  how pictures become pixels and captions tokens; mean and deviation are inside
  README.md        the model card

stablehlo: programs for any batch size on CPU, NVIDIA GPU and TPU, run by clip_jax.export.load with
JAX and NumPy alone; the weights lie beside them, as clip_jax.load reads them too.
onnx: for onnxruntime and others, any batch size; needs requirements-export.txt.
For transformers and open_clip there is python -m clip_jax convert --to=huggingface.
"""

import argparse
import json
from typing import TYPE_CHECKING

from clip_jax.common import commands
from clip_jax.errors import UserError
from clip_jax.export import layout, terms

if TYPE_CHECKING:
    import pathlib

    from etils import epath

    from clip_jax.weights.base import Weights


def main(arguments: list[str]) -> None:
    """Runs the command; mistakes of the user end it with a paragraph and status 2."""
    args = _parser().parse_args(arguments)
    with commands.plain_errors():
        _export(args)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("export", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="whatever clip_jax.load takes")
    add("--out", required=True, metavar="DIR", help="to make")
    add("--format", choices=("stablehlo", "onnx"), default="stablehlo", help="default: stablehlo")
    add("--step", type=int, help="which checkpoint of a workdir (default: the last)")
    terms.add_to(parser)
    return parser


def _export(args: argparse.Namespace) -> None:
    given = terms.parse(args)  # a mistake is answered before anything slow
    from clip_jax.export import card_text, record
    from clip_jax.storage import locations, writing
    from clip_jax.weights import convert

    out = locations.parse(args.out)
    if convert.files.exists(out):
        raise UserError(f"{out} is there already: name another --out, or delete it first.")
    found = convert.read(args.model, step=args.step)
    about = record.read(found)
    with writing.replacing_folder(out) as local:
        _write(found, local, args.format)
        (local / layout.CARD).write_text(card_text.render(about, given, local), "utf-8")
    _list(out)


def _write(found: "Weights", folder: "pathlib.Path", form: str) -> None:
    from clip_jax.export import onnx, preprocess, stablehlo
    from clip_jax.storage import ranges

    described = preprocess.describe(found)
    (stablehlo if form == "stablehlo" else onnx).write(found, folder)
    (folder / layout.PREPROCESS).write_text(json.dumps(described, indent=2) + "\n")
    file = found.tokenizer.path
    if file is not None and not (folder / file.name).exists():
        (folder / file.name).write_bytes(ranges.read(file))


def _list(folder: "epath.Path") -> None:
    from clip_jax.storage import locations

    print(f"{folder}:")
    for name, stat in sorted(locations.listing(folder).items()):
        print(f"  {name:<24} {stat.size / 2**20:10.2f} MiB")
