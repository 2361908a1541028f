"""Exports a model to run without clip_jax, with its card.

  python -m clip_jax export --model=runs/mine --out=exported --license=apache-2.0
  python -m clip_jax export --model=runs/mine --out=onnx --format=onnx --license=apache-2.0
  python -m clip_jax push --dir=exported --repo=org/name

Writes to --out, which is local, gs:// or s3://:
  encode_image.*   pixels, uint8 [batch, size, size, 3], to embeddings, float32 [batch, dimensions]
  encode_text.*    tokens, int32 [batch, context length], to the same
  preprocess.json  how images become pixels and captions tokens; mean and deviation are inside
  README.md        the model card

stablehlo: programs for any batch size on CPU, NVIDIA GPU and TPU, run by clip_jax.export.load with
JAX and NumPy alone; the weights lie beside them, as clip_jax.load reads them too.
onnx: for onnxruntime and others, any batch size; needs requirements-export.txt.
For transformers and open_clip there is python -m clip_jax convert --to=huggingface.
"""

import argparse

from clip_jax import weights
from clip_jax.common import commands
from clip_jax.export import terms
from clip_jax.storage import locations


def main(arguments: list[str]) -> None:
    """Runs the command; user errors end it with a paragraph and status 2."""
    args = _parser().parse_args(arguments)
    with commands.plain_errors():
        _export(args)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("export", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="whatever clip_jax.load takes")
    add("--out", required=True, metavar="DIR", help="to make")
    add("--format", choices=("stablehlo", "onnx"), default="stablehlo", help="default: stablehlo")
    add("--step", type=int, help="step of a checkpoint in a workdir (default: the last)")
    terms.add_to(parser)
    return parser


def _export(args: argparse.Namespace) -> None:
    parsed = terms.parse(args)  # user errors are answered before anything slow
    out = locations.parse(args.out)
    from clip_jax.export import folder  # late, so that --help is instant

    folder.check_is_free(out)
    folder.write(weights.open(args.model, step=args.step), out, args.format, parsed)
    print(f"{out}:")
    for name, stat in sorted(locations.listing(out).items()):
        print(f"  {name:<24} {stat.size / 2**20:10.2f} MiB")
