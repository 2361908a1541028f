"""What must be done to pictures and texts before the towers, and to similarities after them."""

import math
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models import Size
from clip_jax.weights.base import Tensors, TokenizerFile, Weights

_CROPS = {
    "center": "the shorter side is resized to size, then the middle square is cut out",
    "none": "the whole picture is squashed to size x size",
}
_OPENAI = (
    "byte-level BPE of OpenAI's CLIP; its merges are bpe_simple_vocab_16e6.txt.gz, which the PyPI "
    "package openai-clip holds"
)


def describe(weights: Weights) -> dict[str, Any]:
    """The content of preprocess.json; numbers are plain, so that any language can read them."""
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
        "resample": "bicubic, antialiased (Pillow's)",
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
    file = tokenizer.path.name if tokenizer.path is not None else None
    text: dict[str, Any] = {
        "tokenizer": kind,
        "sha256": checksum,
        "vocabulary": _OPENAI if kind == "openai-bpe" else f"{file}, beside this file",
        "vocab_size": size.vocab_size,
        "context_length": size.context_length,
        "input": "int32 [batch, context_length]",
    }
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
