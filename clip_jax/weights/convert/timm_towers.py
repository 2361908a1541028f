"""Image towers of timm that open_clip uses: those of SigLIP and of the Perception Encoder, PE."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from clip_jax import models
from clip_jax.errors import UserError
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

# timm's names: width, layers, heads, hidden units. SigLIP's towers, then those of PE-Core.
_SHAPES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
    "pe_core_tiny": (192, 12, 3, 768),
    "pe_core_small": (384, 12, 6, 1536),
    "pe_core_base": (768, 12, 12, 3072),
    "pe_core_large": (1024, 24, 16, 4096),
    "pe_core_gigantic": (1536, 50, 16, 8960),
}
# (patch, pixels) that timm has them for.
_INPUTS = {
    "base": {(32, 256), (16, 224), (16, 256), (16, 384), (16, 512)},
    "large": {(16, 256), (16, 384), (16, 512)},
    "so400m": {(14, 224), (14, 378), (14, 384), (16, 256), (16, 384), (16, 512)},
    "giantopt": {(16, 256), (16, 384)},
    "pe_core_tiny": {(16, 384)},
    "pe_core_small": {(16, 384)},
    "pe_core_base": {(16, 224)},
    "pe_core_large": {(14, 336)},
    "pe_core_gigantic": {(14, 448)},
}
# Those whose activation is the tanh form of GELU; the others have the exact one.
_TANH = {("base", 32, 256), ("large", 16, 512), ("giantopt", 16, 256), ("giantopt", 16, 384)}
_TANH |= {("so400m", 16, 256), ("so400m", 16, 384), ("so400m", 16, 512)}
_NAME = re.compile(r"vit_(\w+)_patch(\d+)(_siglip)?_(\d+)$")


class Tower(NamedTuple):
    """The parts of a tower's name.

    Attributes:
      kind: a key of `_SHAPES`.
      patch: side of a patch in pixels.
      pixels: side of the input.
    """

    kind: str
    patch: int
    pixels: int

    @property
    def is_pe(self) -> bool:
        """True for PE, False for SigLIP."""
        return self.kind.startswith("pe_core")

    @property
    def name(self) -> str:
        """The name in timm."""
        suffix = "" if self.is_pe else "_siglip"
        return f"vit_{self.kind}_patch{self.patch}{suffix}_{self.pixels}"


def _parse(name: str, source: object) -> Tower:
    match = _NAME.match(name)
    tower = Tower(match[1], int(match[2]), int(match[4])) if match else None
    if tower is None or tower.kind not in _SHAPES or tower.name != name:
        raise UserError(
            f"{source} has the image tower {name} of timm. Of those, "
            f"{', '.join(f'vit_{kind}' for kind in _SHAPES)} can be converted, the first four with "
            "SigLIP's head."
        )
    return tower


def activation(name: str, source: object) -> str:
    """Returns the activation of the tower of this name."""
    return "gelu_tanh" if _parse(name, source) in _TANH else "gelu"


def norm_eps(name: str, source: object) -> float:
    """Returns LayerNorm's epsilon of the tower of this name."""
    return 1e-5 if _parse(name, source).is_pe else 1e-6


def with_tower(size: models.Size, vision: Mapping[str, Any], source: object) -> models.Size:
    """Returns a size with the image tower that vision_cfg names.

    Raises:
      UserError: our models have no such tower, or its settings contradict each other.
    """
    tower = _parse(vision["timm_model_name"], source)
    if vision.get("image_size", tower.pixels) != tower.pixels:
        raise UserError(
            f"{source} has the image_size {vision['image_size']} for the image tower {tower.name}, "
            f"which takes {tower.pixels}: correct the one that is wrong."
        )
    width, layers, heads, hidden = _SHAPES[tower.kind]
    size = dataclasses.replace(
        size,
        image_size=tower.pixels,
        image_layers=(layers,),
        image_width=width,
        image_heads=heads,
        image_mlp=hidden,
        patch_size=tower.patch,
        image_pool="map",
        pre_norm=tower.is_pe,
        patch_bias=not tower.is_pe,
        # Without a projection of open_clip's own, timm's classifier is one.
        map_projection=vision.get("timm_proj") is None,
        image_projection_bias=vision.get("timm_proj") is None,
    )
    if not tower.is_pe:
        return size
    return dataclasses.replace(
        size,
        image_rope=True,
        image_registers=int(tower.kind != "pe_core_gigantic"),  # a class token
        map_heads=8,
        map_mlp=4 * width,
    )


def config_of(size: models.Size) -> dict[str, Any]:
    """Returns the vision_cfg of the tower of a size; UserError where timm has none."""
    shape = (size.image_width, size.image_layers[0], size.image_heads, size.image_mlp)
    assert size.patch_size is not None
    alike = (Tower(kind, size.patch_size, size.image_size) for kind in _SHAPES)
    towers = [
        tower
        for tower in alike
        if _SHAPES[tower.kind] == shape
        and tower[1:] in _INPUTS[tower.kind]
        and tower.is_pe == size.image_rope
    ]
    if not towers:
        raise UserError(
            f"open_clip has no image tower like that of {size} at {size.image_size} pixels: timm "
            f"has {', '.join(_SHAPES)} at some resolutions only. Use "
            f"--to={'clip_jax' if size.image_rope else 'huggingface'}."
        )
    return {
        "image_size": size.image_size,
        "timm_model_name": towers[0].name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": None if size.image_projection else "none",
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
    if size.patch_bias:
        yield entry(f"{theirs}.patch_embed.proj.bias", f"{ours}/patch_embed/bias")
    if size.image_registers:
        yield entry(f"{theirs}.cls_token", f"{ours}/register_embedding", Form("same", 2), (0,))
    yield entry(f"{theirs}.pos_embed", f"{ours}/positions", Form("same", 1))
    if size.pre_norm:
        yield from norm(f"{theirs}.norm_pre", f"{ours}/ln_pre")
    yield from blocks(f"{theirs}.blocks", ours, size.image_layers[0], _BLOCK)
    yield from norm(f"{theirs}.norm", f"{ours}/ln_post")
    if size.image_projection:
        parts = linear(f"{theirs}.head", f"{ours}/projection")
        yield from parts[: 1 + size.image_projection_bias]
    theirs, ours = f"{theirs}.attn_pool", f"{ours}/map_head"
    yield entry(f"{theirs}.latent", f"{ours}/probe", Form("same", 2))
    yield from linear(f"{theirs}.q", f"{ours}/query")
    yield from joined(f"{theirs}.kv.weight", f"{theirs}.kv.bias", [f"{ours}/key", f"{ours}/value"])
    yield from linear(f"{theirs}.proj", f"{ours}/attn_out", inputs=2)
    yield from norm(f"{theirs}.norm", f"{ours}/ln")
    yield from linear(f"{theirs}.mlp.fc1", f"{ours}/mlp_in")
    yield from linear(f"{theirs}.mlp.fc2", f"{ours}/mlp_out")
