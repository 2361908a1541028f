"""Image towers of timm that open_clip uses, those of SigLIP."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models.sizes import SIZES
from clip_jax.weights.convert.mapping import (
    CONV,
    BlockNames,
    Entry,
    Form,
    blocks,
    entry,
    joined,
    linear,
    norm,
)

_SIGLIP = SIZES["SigLIP-B/16"]
# timm's names of SigLIP towers: width, layers, heads, hidden units.
_SHAPES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# Those whose activation is the tanh form of GELU; the others have the exact one.
_TANH = {("base", 32, 256), ("large", 16, 512)}
_TANH |= {("so400m", 16, 256), ("so400m", 16, 384), ("so400m", 16, 512)}
_TANH |= {("giantopt", 16, 256), ("giantopt", 16, 384)}
NORM_EPS = 1e-6
_NAME = re.compile(rf"vit_({'|'.join(_SHAPES)})_patch(\d+)_siglip_(\d+)$")
# (patch, pixels) that timm has them for.
_INPUTS = {
    "base": {(32, 256), (16, 224), (16, 256), (16, 384), (16, 512)},
    "large": {(16, 256), (16, 384), (16, 512)},
    "so400m": {(14, 224), (14, 378), (14, 384), (16, 256), (16, 384), (16, 512)},
    "giantopt": {(16, 256), (16, 384)},
}


def activation(name: str) -> str:
    """Returns the activation of the tower of this name."""
    match = _NAME.match(name)
    model = match and (match[1], int(match[2]), int(match[3]))
    return "gelu_tanh" if model in _TANH else "gelu"


def with_tower(size: models.Size, vision: Mapping[str, Any], source: object) -> models.Size:
    """Returns a size with the image tower that vision_cfg names.

    Raises:
      UserError: our models have no such tower, or its settings contradict each other.
    """
    name = vision["timm_model_name"]
    match = _NAME.match(name)
    if not match:
        raise UserError(
            f"{source} has the image tower {name} of timm. Of those, "
            "vit_base, vit_large, vit_so400m and vit_giantopt with SigLIP's head can be converted."
        )
    kind, patch, pixels = match.groups()
    if vision.get("image_size", int(pixels)) != int(pixels):
        raise UserError(
            f"{source} has the image_size {vision['image_size']} for the image tower {name}, which "
            f"takes {pixels}: correct the one that is wrong."
        )
    width, layers, heads, hidden = _SHAPES[kind]
    return dataclasses.replace(
        size,
        image_size=int(pixels),
        image_layers=(layers,),
        image_width=width,
        image_heads=heads,
        image_mlp=hidden,
        patch_size=int(patch),
        image_pool=_SIGLIP.image_pool,
        pre_norm=_SIGLIP.pre_norm,
        patch_bias=_SIGLIP.patch_bias,
    )


def config_of(size: models.Size) -> dict[str, Any]:
    """Returns the vision_cfg of the tower of a size; UserError where timm has none."""
    shape = (size.image_width, size.image_layers[0], size.image_heads, size.image_mlp)
    kind = next((name for name, known in _SHAPES.items() if known == shape), None)
    if kind is None or (size.patch_size, size.image_size) not in _INPUTS[kind]:
        raise UserError(
            f"open_clip has no image tower like that of {size} at {size.image_size} pixels: timm "
            f"has {', '.join(_SHAPES)} at some resolutions only. Use --to=huggingface."
        )
    return {
        "image_size": size.image_size,
        "timm_model_name": f"vit_{kind}_patch{size.patch_size}_siglip_{size.image_size}",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }


_BLOCK = BlockNames(
    ln_1="norm1",
    attn_out="attn.proj",
    ln_2="norm2",
    mlp_in="mlp.fc1",
    mlp_out="mlp.fc2",
    qkv=(("attn.qkv.weight", "attn.qkv.bias"),),
)


def table(size: models.Size) -> Iterator[Entry]:
    """The places of the tower's tensors in ours."""
    theirs, ours = "visual.trunk", "params/image"
    yield entry(f"{theirs}.patch_embed.proj.weight", f"{ours}/patch_embed/kernel", CONV)
    yield entry(f"{theirs}.patch_embed.proj.bias", f"{ours}/patch_embed/bias")
    yield entry(f"{theirs}.pos_embed", f"{ours}/positions", Form("same", 1))
    yield from blocks(f"{theirs}.blocks", ours, size.image_layers[0], _BLOCK)
    yield from norm(f"{theirs}.norm", f"{ours}/ln_post")
    theirs, ours = f"{theirs}.attn_pool", f"{ours}/map_head"
    yield entry(f"{theirs}.latent", f"{ours}/probe", Form("same", 2))
    yield from linear(f"{theirs}.q", f"{ours}/query")
    yield from joined(f"{theirs}.kv.weight", f"{theirs}.kv.bias", [f"{ours}/key", f"{ours}/value"])
    yield from linear(f"{theirs}.proj", f"{ours}/attn_out", inputs=2)
    yield from norm(f"{theirs}.norm", f"{ours}/ln")
    yield from linear(f"{theirs}.mlp.fc1", f"{ours}/mlp_in")
    yield from linear(f"{theirs}.mlp.fc2", f"{ours}/mlp_out")
