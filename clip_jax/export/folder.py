"""The folder of an export: programs, weights, model card, and preprocess.json.

preprocess.json says how images and captions are prepared for the towers, and how similarities of
their embeddings become probabilities.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

from etils import epath

from clip_jax.errors import UserError
from clip_jax.export import card_text, programs, record
from clip_jax.export.runtime import PREPROCESS
from clip_jax.export.terms import CARD, Terms
from clip_jax.models import Size
from clip_jax.storage import writing
from clip_jax.weights.convert import files
from clip_jax.weights.model import Tensors, TokenizerFile, Weights

_CROPS = {
    "center": "the shorter side is resized to size, then the middle square is cut out",
    "none": "the whole picture is squashed to size x size",
}
_OPENAI = (
    "byte-level BPE of OpenAI's CLIP; its merges are bpe_simple_vocab_16e6.txt.gz, which the PyPI "
    "package openai-clip holds"
)


def check_is_free(out: epath.Path) -> None:
    """Raises UserError if the folder exists."""
    if files.exists(out):
        raise UserError(f"{out} is there already: name another --out, or delete it first.")


def write(weights: Weights, out: epath.Path, form: str, terms: Terms) -> None:
    """Writes an export; nothing incomplete ever has the folder's name.

    Args:
      weights: model to export.
      out: folder that does not exist yet, local or in a bucket.
      form: "stablehlo" or "onnx".
      terms: licence and other entries of its card that no run can know.

    Raises:
      UserError: the model has no text tower, or its tokenizer is not known.
    """
    facts = record.read(weights)
    with writing.replacing_folder(out) as local:
        _write_files(weights, local, form)
        (local / CARD).write_text(card_text.render(facts, terms, local), "utf-8")


def _write_files(weights: Weights, folder: pathlib.Path, form: str) -> None:
    preprocessing = describe_preprocessing(weights)
    write = programs.write_stablehlo if form == "stablehlo" else programs.write_onnx
    write(weights, folder)
    (folder / PREPROCESS).write_text(json.dumps(preprocessing, indent=2) + "\n")
    for name, content in weights.tokenizer.files().items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)


# ---- preprocess.json ---------------------------------------------------------------------------


def describe_preprocessing(weights: Weights) -> dict[str, Any]:
    """Returns the content of preprocess.json, as plain numbers that any language can read."""
    return {
        "image": _image(weights.size),
        "text": _text(weights.size, weights.tokenizer),
        "embed_dim": weights.size.embed_dim,
        "similarity": _similarity(weights.size, weights.tensors),
    }


def _image(size: Size) -> dict[str, Any]:
    return {
        "size": size.image_size,
        "crop": size.image_crop,
        "crop_means": _CROPS[size.image_crop],
        "resample": f"{size.image_filter}, antialiased (Pillow's)",
        "input": "uint8 [batch, size, size, 3], RGB",
        "mean": size.image_mean,
        "std": size.image_std,
        "normalised_by": "the model: (pixels / 255 - mean) / std happens inside",
    }


def _text(size: Size, tokenizer: TokenizerFile) -> dict[str, Any]:
    if not tokenizer.identity:
        raise UserError(
            "It is not known how this model's texts become tokens: convert the weights once more "
            "with --tokenizer, and export what comes of it."
        )
    kind, _, checksum = tokenizer.identity.partition(":")
    file = next(iter(tokenizer.files()), None)
    text: dict[str, Any] = {
        "tokenizer": kind,
        "sha256": checksum,
        "vocabulary": _OPENAI if kind == "openai-bpe" else f"{file}, beside this file",
        "vocab_size": size.vocab_size,
        "context_length": size.context_length,
        "input": "int32 [batch, context_length]",
    }
    if kind == "huggingface":
        text["rules"] = dataclasses.asdict(tokenizer.published().rules)
    if kind in ("openai-bpe", "sentencepiece"):  # rows as data.tokenizer makes them
        text |= {
            "start_token": size.vocab_size - 2,
            "end_token": size.vocab_size - 1,
            "padding": 0,
            "cleaning": "ftfy, HTML entities twice, white space to single blanks, lower case",
        }
    return text


def _similarity(size: Size, tensors: Tensors) -> dict[str, Any]:
    bias = float(tensors.read("params/logit_bias")) if size.logit_bias else 0.0
    return {
        "scale": math.exp(float(tensors.read("params/logit_scale"))),
        "bias": bias,
        "logits": "scale * image @ text.T + bias",
        "probabilities": "sigmoid" if size.logit_bias else "softmax over the texts",
    }
