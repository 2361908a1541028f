"""Checks of the fields of a model's size, each on its own and together."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip_jax import choices
from clip_jax.errors import UserError

Size = Any  # `sizes.Size`, whose file imports this one

# Values of the fields that name one of several forms.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "objective": choices.OBJECTIVES,
    "activation": choices.ACTIVATIONS,
    "text_activation": choices.ACTIVATIONS,
    "norm": choices.NORMS,
    "image_pool": choices.IMAGE_POOLS,
    "image_positions": choices.IMAGE_POSITIONS,
    "text_pool": choices.TEXT_POOLS,
    "image_crop": choices.IMAGE_CROPS,
    "image_filter": choices.IMAGE_FILTERS,
    "resnet_activation": choices.RESNET_ACTIVATIONS,
    "resnet_norm": choices.RESNET_NORMS,
}
# Start and end token; 0: the default, none, or a bag of words.
_LEAST = {"context_length": 2, "image_mlp": 0, "text_mlp": 0, "text_layers": 0}
_LEAST |= {"image_registers": 0, "text_decoder_layers": 0, "views_mlp": 0, "views_embed": 0}
# Forms that only a ViT has, with their defaults.
_OF_VITS: dict[str, Any] = {
    "image_pool": "class",
    "image_positions": "learned",
    "image_registers": 0,
}
_OF_VITS |= dict.fromkeys(
    ("norm_after_pool", "image_rope", "map_projection", "image_projection_bias", "image_qk_norm"),
    False,
)
_OF_VITS["image_layer_scale"] = None


def check_field(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError unless the value is of the field's kind."""
    if field.name in CHOICES:
        valid = value in CHOICES[field.name] or (value is None and field.default is None)
        takes = f"one of {', '.join(CHOICES[field.name])}"
    elif field.type is bool:
        valid, takes = isinstance(value, bool), "True or False"
    elif field.name in ("image_mean", "image_std"):
        valid, takes = _is_colour(value), "three numbers, those of image_std above 0"
        valid = valid and (field.name == "image_mean" or min(value) > 0)
    elif field.type in (float, float | None):
        valid = isinstance(value, float) and value > 0
        valid = valid or (value is None and field.default is None)
        takes = "a positive number, as in 1e-5"
    else:
        least = _LEAST.get(field.name, 1)
        numbers = value if isinstance(value, tuple) else (value,)
        valid = all(n is None or (isinstance(n, int) and n >= least) for n in numbers)
        takes = f"whole numbers, {least} or more"
    if not valid:
        raise UserError(f"Size {field.name} is {value!r}: it takes {takes}.")


def _is_colour(value: Any) -> bool:
    return len(value) == 3 and all(isinstance(part, (int, float)) for part in value)


def check_shapes(size: Size) -> None:
    """Raises UserError for shapes that no model can have."""
    stages = 4 if size.is_resnet else 1
    if len(size.image_layers) != stages:
        raise UserError(
            f"Size image_layers is {size.image_layers}: it takes {stages} number(s), the "
            "blocks of each of the 4 stages of a ResNet, or the layers of a ViT, as in (12,)."
        )
    width = size.image_width * (32 if size.is_resnet else 1)
    if (size.patch_size or 0) > size.image_size:
        raise UserError(
            f"The image_size ({size.image_size}) must be at least the patch_size "
            f"({size.patch_size})."
        )
    # A ResNet halves its input five times; a ViT leaves out the edge that fills no patch.
    stride = 32 if size.is_resnet else 1
    for name, value, unit, divisor in (
        ("image_size", size.image_size, "the stride", stride),
        ("width of the image tower", width, "image_heads", size.image_heads),
        ("text_width", size.text_width, "text_heads", size.text_heads),
    ):
        if value % divisor:
            raise UserError(f"The {name} ({value}) must be a multiple of {unit} ({divisor}).")
    if bool(size.views_mlp) != bool(size.views_embed):
        raise UserError(
            f"Size views_mlp is {size.views_mlp}, and views_embed {size.views_embed}: the head of "
            "loss.views has both, and otherwise both are 0."
        )
    _check_image_forms(size)
    _check_text_forms(size)


def _check_image_forms(size: Size) -> None:
    if size.is_resnet:
        forms = {name: getattr(size, name) for name in _OF_VITS}
        if changed := [name for name, form in forms.items() if form != _OF_VITS[name]]:
            raise UserError(
                f"Size {changed[0]} is {forms[changed[0]]!r}: it is a field of a ViT, and a ResNet "
                f"(patch_size None) keeps {_OF_VITS[changed[0]]!r}."
            )
        return
    if size.norm_after_pool and size.image_pool != "avg":
        raise UserError(
            f"Size norm_after_pool is True: it goes with image_pool='avg', not "
            f"{size.image_pool!r}, which has one place for its LayerNorm."
        )
    if size.image_pool != "map" and (size.map_heads or size.map_mlp or size.map_projection):
        raise UserError(
            f"Size map_heads is {size.map_heads}, map_mlp {size.map_mlp} and map_projection "
            f"{size.map_projection}: they go with image_pool='map', not {size.image_pool!r}."
        )
    if size.image_width % (size.map_heads or 1):
        raise UserError(
            f"The image_width ({size.image_width}) must be a multiple of map_heads "
            f"({size.map_heads})."
        )
    if size.image_projection_bias and not size.image_projection:
        raise UserError(
            "Size image_projection_bias is True, and image_pool='map' has no projection where "
            f"embed_dim is image_width ({size.image_width}): set map_projection=True as well."
        )
    if size.image_rope and (size.image_width // size.image_heads) % 4:
        raise UserError(
            f"Size image_heads is {size.image_heads}, of {size.image_width // size.image_heads} "
            "channels each: image_rope=True takes a multiple of 4, two pairs for column and row."
        )
    if size.image_positions == "sincos" and size.image_width % 4:
        raise UserError(
            f"Size image_width is {size.image_width}: image_positions='sincos' takes a multiple of "
            "4, a sine and a cosine of each coordinate."
        )
    most = 2 * size.patches_per_side  # so that the table of positions tells how many there are
    if size.image_registers + size.has_class_token > most:
        raise UserError(
            f"Size image_registers is {size.image_registers}: with the class token there are "
            f"{most} at most, twice the patches along a side."
        )


def _check_text_forms(size: Size) -> None:
    end = size.end_token
    read = size.text_pool == "end" or size.text_decoder_layers > 0
    if end is not None and (not read or end >= size.vocab_size):
        raise UserError(
            f"Size end_token is {size.end_token}: it takes an id below vocab_size "
            f"({size.vocab_size}), and text_pool='end' (here {size.text_pool!r})."
        )
    bag = size.text_pool == "bag"
    if (size.text_layers == 0) != bag or (bag and size.objective == "captioning"):
        raise UserError(
            f"Size text_layers is {size.text_layers} and text_pool {size.text_pool!r}, for the "
            f"objective {size.objective}: a bag of words has no layers, anything else has "
            "some, and only they write captions. Take text_pool='bag' with text_layers=0, or "
            "neither."
        )
    if size.text_pool == "first" and size.text_causal:
        raise UserError(
            "Size text_pool is 'first', but the first token of a causal tower sees no other: set "
            "text_causal=False."
        )
    _check_decoder(size)
    if not size.text_projection and (
        size.text_width != size.embed_dim or size.text_projection_bias
    ):
        raise UserError(
            f"Size text_projection is False: embeddings then have the text_width "
            f"({size.text_width}), which must be embed_dim ({size.embed_dim}), and there is no "
            "text_projection_bias."
        )


def _check_decoder(size: Size) -> None:
    layers, shared = size.text_decoder_layers, size.text_decoder_shared
    if not layers:
        if shared:
            raise UserError(
                "Size text_decoder_shared is True, and text_decoder_layers 0: no layer attends to "
                "the image."
            )
        return
    problem = ""
    if size.objective != "contrastive":
        problem = f"goes with the contrastive objective, not {size.objective}"
    elif size.is_resnet:
        problem = "attends to the tokens of a ViT, and the image tower is a ResNet"
    elif not size.text_layers:
        problem = "continues a text tower with layers, and a bag of words has none"
    elif shared and size.text_layers % layers:
        problem = f"takes a divisor of text_layers ({size.text_layers}) with text_decoder_shared"
    elif not shared and not size.text_causal:
        problem = (
            "follows a causal text tower, else a token would be predicted from itself: set "
            "text_causal=True, or text_decoder_shared=True, whose second pass is causal"
        )
    if problem:
        raise UserError(f"Size text_decoder_layers is {layers}: the decoder {problem}.")
