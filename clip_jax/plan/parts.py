"""Attributes instructions to parts of the step: "image tower, attention", "loss", "optimiser"."""

import dataclasses
import re

from clip_jax.plan.chips import Chip
from clip_jax.plan.cost import Cost, Op
from clip_jax.plan.hlo import Frames

# (regular expression on the path in the traced function, part); the first match counts.
_OWNERS = (
    (r"encode_image|image_features", "image tower"),
    (r"encode_text|CaptionTransformer|CLIP\._caption|decoder", "text tower"),
    (r"l2_normalize|normalize_images", "embedding"),
)
# The same on file and function of the calls behind an instruction, if its path names no tower.
_FILES = (
    (r"clip_jax/losses", "loss"),
    (r"clip_jax/training/step\.py:(_split|_join|_accumulated)", "micro-batches"),
    (r"clip_jax/models/(vit|resnet)\.py", "image tower"),
    (r"clip_jax/models/(text|captioner|decoder|cross_block)\.py", "text tower"),
    (r"clip_jax/models/bag_of_words\.py", "loss"),
    (r"clip_jax/(training/augment|models/views)\.py", "augmentation"),
    (r"clip_jax/optim\.py|optax/", "optimiser"),
    # The rest of the step: norms, clipping, metrics.
    (r"clip_jax/training/step\.py", "optimiser"),
)
# Inside a tower.
_PIECES = (
    (r"/(mlp_in|mlp_out|probe_mlp)", "MLP"),
    (r"/ln_\w+|LayerNorm", "LayerNorm"),
    (r"/(qkv|attn_out)", "attention projections"),
    (r"attention|->BNTS|->BTNH|BNTS,|bqhd|bhd,|bhqk|bhk,|/Block/vmap|softmax|/exp\b", "attention"),
    (r"gelu|sigmoid|logistic|erf", "MLP"),
    (r"patch_embed", "patch embedding"),
    (r"token_embed", "token embedding"),
    (r"/projection", "projection"),
    (r"/(stem_)?conv\d|/downsample", "convolutions"),
    (r"/(bn|BatchNorm)\w*", "BatchNorm"),
    (r"dynamic_(update_)?(index|slice)", "layers' activations and weights, kept and read"),
)
# Parts with a forward and a backward pass.
_TWO_WAYS = ("image tower", "text tower", "loss")
COMPILER = "copies and layouts of the compiler"


def part_of(op: Op, frames: Frames) -> tuple[str, str, str]:
    """Attributes an executed instruction.

    Returns:
      owner: "image tower", "text tower", "loss", "micro-batches", "optimiser" or `COMPILER`.
      piece: part of a tower ("attention"); "" elsewhere.
      pass: "forward", "backward" or "recomputed".
    """
    name = op.title.op_name
    owner = _first(_OWNERS, name)
    for file, function in () if owner else frames.stack(op.title):
        if owner := _first(_FILES, f"{file}:{function}"):
            break
    if not owner:
        return (COMPILER if not name else "optimiser"), "", "forward"
    piece = (_first(_PIECES, name) or "other") if owner.endswith("tower") else ""
    return owner, piece, _direction(name)


def _direction(name: str) -> str:
    if "rematted_computation" in name:
        return "recomputed"
    return "backward" if "transpose(" in name else "forward"


def _first(rules: tuple[tuple[str, str], ...], text: str) -> str:
    return next((part for rule, part in rules if re.search(rule, text)), "")


def label(op: Op, frames: Frames) -> str:
    """Names the part that an executed instruction belongs to, with the pass where it has two."""
    owner, piece, direction = part_of(op, frames)
    return ", ".join(filter(None, (owner, piece, direction if owner in _TWO_WAYS else "")))


@dataclasses.dataclass
class Part:
    """The computation of a part of the step.

    Attributes:
      name: part, and the pass where it has two.
      seconds: time that it takes.
      flops: operations of its matrix products and convolutions.
      bytes: traffic to HBM.
      matrix_seconds: time that the matrix units need for the operations, at their peak.
      hbm_seconds: time that HBM needs for the traffic, at its nominal bandwidth. Time beyond both
        goes to the vector units or to waiting.
    """

    name: str
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    matrix_seconds: float = 0.0
    hbm_seconds: float = 0.0


def by_part(total: Cost, frames: Frames, chip: Chip) -> list[Part]:
    """Sums the computation of a step by part, the longest first."""
    parts: dict[str, Part] = {}
    for op in total.ops:
        if not op.channel and op.seconds:
            name = label(op, frames)
            part = parts.setdefault(name, Part(name))
            part.seconds += op.seconds
            part.flops += op.flops
            part.bytes += op.bytes
    for part in parts.values():
        part.matrix_seconds = part.flops / chip.flops
        part.hbm_seconds = part.bytes / chip.hbm_bandwidth
    return sorted(parts.values(), key=lambda part: -part.seconds)
