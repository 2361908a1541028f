"""Converts weights: other projects' into clip_jax's, and back.

  python -m clip_jax convert ViT-B-32.pt converted/vit_b32                    # OpenAI's archive
  python -m clip_jax convert openai/clip-vit-large-patch14 converted/vit_l14  # from the hub
  python -m clip_jax convert webli_en_b16_224.npz converted/siglip --tokenizer=sentencepiece.model
  python -m clip_jax convert runs/quickstart exported --to=huggingface        # for transformers

Both SRC and DST are local, gs:// or s3://.

SRC: a workdir or checkpoint; a folder that was converted before; a folder of transformers (CLIP,
SigLIP) or open_clip; OpenAI's archive or a state dict (.pt, .bin, .safetensors); a checkpoint of
big_vision (.npz); or a name on the Hugging Face hub. Nothing in these files is executed, and
PyTorch is not needed.

DST, by --to:
  clip_jax     folder: model.safetensors and clip_jax.json; for clip_jax.load and init_from
  huggingface  folder for transformers: weights, config, preprocessor, tokenizer
  open_clip    folder for open_clip.create_model_and_transforms("local-dir:DST")
  openai       .pt file, a state dict that OpenAI's clip.load reads
  big_vision   .npz file (SigLIP)

Weights are float32 and equal bit for bit after a trip there and back. Activation, normalisation,
resolution, pooling, tokenizer and temperature travel along; what a format cannot say is an error.
"""

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING

from tqdm import tqdm

from clip_jax import weights
from clip_jax.common import commands

if TYPE_CHECKING:
    import numpy as np

    from clip_jax.weights.model import Weights


def main(arguments: list[str]) -> None:
    """Runs the command; user errors end it with a paragraph and status 2."""
    args = _parser().parse_args(arguments)
    with commands.plain_errors():
        _convert(args)


def _parser() -> argparse.ArgumentParser:
    parser = commands.parser("convert", __doc__)
    add = parser.add_argument
    add("source", metavar="SRC", help="weights to convert")
    add("target", metavar="DST", help="file or folder to make")
    add("--to", metavar="FORMAT", default="clip_jax", help="format of DST (default: clip_jax)")
    add("--model", default="", help="expected model, such as ViT-B/32; needed for a state dict")
    add("--activation", default="", help="activation of DST, such as gelu (default: that of SRC)")
    add("--tokenizer", default="", help='"openai", or a SigLIP vocabulary; default: SRC\'s')
    add("--image_size", type=int, metavar="PIXELS", help="resize the image positions, bicubic")
    add("--context_length", type=int, metavar="TOKENS", help="resize the text positions, linear")
    add("--step", type=int, help="step of a checkpoint in a workdir (default: the last)")
    return parser


def _convert(args: argparse.Namespace) -> None:
    opened = weights.open(
        args.source,
        step=args.step,
        model=args.model,
        activation=args.activation,
        tokenizer=args.tokenizer,
    )
    if args.image_size or args.context_length:
        opened = opened.resized(args.image_size, args.context_length)
    weights.save(_with_progress(opened), args.target, args.to)
    print(f"{args.target}: {opened.describe()}")


def _with_progress(opened: "Weights") -> "Weights":
    """Returns the same weights; a progress bar follows their reading."""
    sizes = {name: math.prod(shape) for name, shape in opened.tensors.shapes.items()}
    bar = tqdm(total=sum(sizes.values()), unit=" values", unit_scale=True, leave=False)

    def read(name: str) -> "np.ndarray":
        value = opened.tensors.read(name)
        bar.update(sizes.pop(name, 0))
        if not sizes:
            bar.close()
        return value

    return dataclasses.replace(opened, tensors=dataclasses.replace(opened.tensors, read=read))
