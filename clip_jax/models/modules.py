"""Models by name and objective."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from clip_jax.errors import UserError
from clip_jax.models.bag_of_words import BagOfWords
from clip_jax.models.captioner import Captioner
from clip_jax.models.clip import CLIP
from clip_jax.models.image_model import ImageModel
from clip_jax.models.layers import Dtype
from clip_jax.models.near_duplicates import NearDuplicates
from clip_jax.models.packing import Packing
from clip_jax.models.sizes import Size, get_size

# By `Size.objective`, one of `choices.OBJECTIVES`. Each computes what the loss of its objective
# takes (see `objectives.OBJECTIVES`) by `outputs`, and embeds images by `encode_image`. A model
# that embeds texts has `encode_text`, one that can score prompts `score`.
MODULES: Mapping[str, type[ImageModel]] = {
    "contrastive": CLIP,
    "captioning": Captioner,
    "bag_of_words": BagOfWords,
    "near_duplicates": NearDuplicates,
}


def create(
    name: str,
    *,
    dtype: Dtype = jnp.float32,
    scan_layers: bool = True,
    remat: str = "none",
    patch_dropout: float = 0.0,
    text_remat: str = "",
    attention: str = "xla",
    packing: Mapping[str, Any] | None = None,
    size: Mapping[str, Any] | None = None,
) -> ImageModel:
    """Makes a model by name: a `CLIP`, unless `size` names another objective.

    Args:
      name: one of `available_models()`.
      dtype: compute dtype; parameters are float32.
      scan_layers: run transformer layers in a `lax.scan`, or unroll them.
      remat: recomputation in the backward pass; see `layers.remat_layer`.
      patch_dropout: fraction of the patches that a ViT leaves out in training.
      text_remat: `remat` of the text tower; "": the same.
      attention: the form of attention in both transformers; see `attention.FORMS`.
      packing: {"length": tokens in a row, "rows": rows per caption} of `packing.Packing`; None or
        length 0: each caption has a row of its own. Only a `CLIP` packs.
      size: overrides of the named shapes; see `Size`.

    Raises:
      UserError: unknown name, or settings that do not go together.
    """
    shapes = get_size(name, size)
    if not 0 <= patch_dropout < 1 or (patch_dropout and shapes.is_resnet):
        raise UserError(
            f"model.patch_dropout is {patch_dropout}: it takes a fraction of the patches, 0 or "
            "more and less than 1, of a ViT; a ResNet has none."
        )
    settings = (shapes, dtype, scan_layers, remat, patch_dropout, text_remat, attention)
    if shapes.objective == "contrastive":
        made = _make_packing(packing, shapes)
        return CLIP(*settings, packing=made)
    return MODULES[shapes.objective](*settings)


def of_size(size: Size) -> ImageModel:
    """Makes the model of these shapes and this objective, in float32, as inference needs it."""
    return MODULES[size.objective](size)


def _make_packing(packing: Mapping[str, Any] | None, size: Size) -> Packing | None:
    """Returns the settings of packing; UserError where the captions of `size` cannot be packed."""
    if packing is None or packing["length"] == 0:
        return None
    if size.text_decoder_layers:
        raise UserError(
            "loss.captioning needs the states of all tokens of a caption, each in a row of its "
            f"own, and model.packing.length is {packing['length']}: set "
            "--config.model.packing.length=0."
        )
    if not size.text_causal or size.text_pool != "end":
        raise UserError(
            "model.packing needs a causal text tower that reads the end token, so that what "
            f"follows it changes nothing; that of {size} is not: leave "
            "--config.model.packing.length=0."
        )
    if packing["length"] < size.context_length:
        raise UserError(
            f"model.packing.length is {packing['length']}, and a caption may have "
            f"{size.context_length} tokens: take at least "
            f"--config.model.packing.length={size.context_length}, or 0."
        )
    if not 0 < packing["rows"] <= 1:
        raise UserError(
            f"model.packing.rows is {packing['rows']}: it takes a number above 0, up to 1."
        )
    return Packing(int(packing["length"]), float(packing["rows"]))
