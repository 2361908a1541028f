"""Folders and files of open_clip; its SigLIP models have an image tower of timm's."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models.sizes import SIZES
from clip_jax.weights.convert import files, openai, preprocessing, tokens
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
from clip_jax.weights.folder import save_safetensors
from clip_jax.weights.model import Weights

CONFIG = "open_clip_config.json"
_BASE, _SIGLIP = SIZES["ViT-B/32"], SIZES["SigLIP-B/16"]
# timm's names of SigLIP towers: width, layers, heads, hidden units.
_TIMM = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
}
# Those whose activation is the tanh form of GELU; the others have the exact one.
_TIMM_TANH = {("base", 32, 256), ("large", 16, 512)}
_TIMM_TANH |= {("so400m", 16, 256), ("so400m", 16, 384), ("so400m", 16, 512)}
_TIMM_EPS = 1e-6
_TIMM_NAME = re.compile(rf"vit_({'|'.join(_TIMM)})_patch(\d+)_siglip_(\d+)$")
# (patch, pixels) that timm has them for.
_TIMM_INPUTS = {
    "base": {(32, 256), (16, 224), (16, 256), (16, 384), (16, 512)},
    "large": {(16, 256), (16, 384), (16, 512)},
    "so400m": {(14, 224), (14, 378), (14, 384), (16, 256), (16, 384), (16, 512)},
}
# Settings that our models take over, and others at the only value that they can have.
_TOWER = {"width", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs"}
_VISION = _TOWER | {"image_size", "patch_size", "head_width", "no_ln_pre", "timm_model_name"}
_TEXT = _TOWER | {"context_length", "vocab_size", "heads", "no_causal_mask", "proj_bias"}
_TEXT |= {"pool_type", "eos_id", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}
_POOLS = {"argmax": "end", "eos": "end", "last": "last"}
_FIXED = {
    "timm_model_pretrained": (False,),
    "timm_pool": ("map",),
    "timm_proj": ("none",),
    "proj_type": ("linear",),
    "pos_embed_type": ("learnable",),
    "patch_dropout": (0, 0.0),
    "output_tokens": (False,),
    "embed_cls": (False,),
    "pad_id": (0, 1),
}


def is_folder(folder: epath.Path) -> bool:
    """Returns whether a folder has weights and settings of open_clip."""
    return all(files.find(folder, names) for names in ((CONFIG,), files.OPEN_CLIP))


def read(folder: epath.Path, tokenizer: str = "") -> files.ForeignWeights:
    """Opens a folder; `tokenizer` names another tokenizer than the one in it.

    Raises:
      UserError: a file is damaged, or a setting is not one of ours.
    """
    path = files.find(folder, files.OPEN_CLIP)
    assert path is not None
    config = files.read_json(folder / CONFIG)
    size = size_of(config, folder)
    return files.ForeignWeights(
        size=size,
        tensors=files.without(files.open_tensors(path), openai.NO_WEIGHTS),
        table=table(size, config["model_cfg"].get("custom_text", False)),
        tokenizer=tokens.named(tokenizer, size) if tokenizer else tokens.find(folder, size),
        format="open_clip",
    )


def write(weights: Weights, folder: pathlib.Path) -> None:
    """Writes a folder that open_clip.create_model_and_transforms("local-dir:FOLDER") loads.

    Raises:
      UserError: open_clip has no such model.
    """
    config = config_of(weights.size)
    files.check_expressible("open_clip", size_of(config, folder), weights.size)
    folder.mkdir(parents=True)
    text = config["model_cfg"]["text_cfg"]
    text |= tokens.write_open_clip(weights.tokenizer, weights.size, folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    theirs = files.export(table(weights.size, weights.size.image_pool == "map"), weights)
    save_safetensors(theirs, folder / files.OPEN_CLIP[0], {"format": "pt"})


# ---- Settings ----------------------------------------------------------------------------------


def size_of(config: Mapping[str, Any], source: object) -> models.Size:
    """Returns the size that an open_clip_config.json describes.

    Raises:
      UserError: a setting that our models do not have.
    """
    settings = config["model_cfg"]
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    _check_settings(vision, _VISION, "vision_cfg", source)
    _check_settings(text, _TEXT, "text_cfg", source)
    width = text.get("width", 512)
    return dataclasses.replace(
        _with_image_tower(_BASE, vision, source),
        embed_dim=settings["embed_dim"],
        text_width=width,
        text_heads=text.get("heads", 8),
        text_layers=text.get("layers", 12),
        text_mlp=int(width * text.get("mlp_ratio", 4.0)),
        context_length=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49_408),
        activation=_activation(settings, source),
        text_causal=not text.get("no_causal_mask", False),
        text_pool=_text_pool(text, source),
        end_token=_end_token(text),
        text_projection_bias=text.get("proj_bias", False),
        norm_eps=_norm_eps(settings, source),
        logit_bias=settings.get("init_logit_bias") is not None,
        **preprocessing.from_open_clip(config.get("preprocess_cfg") or {}, source),
    )


def _text_pool(text: Mapping[str, Any], source: object) -> str:
    kind = text.get("pool_type", "argmax")
    if kind not in _POOLS:
        raise UserError(
            f"{source} has the setting text_cfg.pool_type = {kind!r} of open_clip, which our text "
            f"towers do not have: they have {', '.join(_POOLS)}."
        )
    return _POOLS[kind]


def _end_token(text: Mapping[str, Any]) -> int | None:
    """Returns the id at which captions are read; None: the largest of a row, or the last place."""
    if text.get("pool_type", "argmax") != "eos":
        return None
    end = text.get("eos_id", 2)  # open_clip's default
    return None if end == text.get("vocab_size", 49_408) - 1 else end


def _check_settings(
    settings: Mapping[str, Any], known: set[str], part: str, source: object
) -> None:
    for name, value in settings.items():
        fixed = name in _FIXED and value in _FIXED[name]
        if name not in known and not fixed and value not in (None, False):
            raise UserError(
                f"{source} has the setting {part}.{name} = {value!r} of open_clip, which our "
                "models do not have. What can be converted are variations of the shapes of "
                f"{', '.join(models.available_models())}."
            )


def _activation(settings: Mapping[str, Any], source: object) -> str:
    """Returns the activation of both towers; timm's have their own, whatever is set."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    quick = settings.get("quick_gelu", False)
    forms = [_form(tower, quick, source) for tower in (vision, text)]
    if "layers" in vision and isinstance(vision["layers"], (list, tuple)):
        return forms[1]  # a ResNet has none
    if forms[0] != forms[1]:
        raise UserError(
            f"{source} has the activation {forms[1]} in its text tower and {forms[0]} in its image "
            "tower; our models have one for both."
        )
    return forms[1]


def _form(tower: Mapping[str, Any], quick: bool, source: object) -> str:
    """Returns the activation of a tower; UserError where its settings name another."""
    settings = tower.get("act_kwargs") or {}
    if name := tower.get("timm_model_name"):
        match = _TIMM_NAME.match(name)
        model = match and (match[1], int(match[2]), int(match[3]))
        return "gelu_tanh" if model in _TIMM_TANH else "gelu"
    if settings == {"approximate": "tanh"} and not quick:
        return "gelu_tanh"
    if settings not in ({}, {"approximate": "none"}) or (quick and settings):
        raise UserError(
            f"{source} has act_kwargs {settings!r}{' with quick_gelu' if quick else ''}; our "
            "models have the activations quick_gelu, gelu and gelu_tanh (approximate: tanh)."
        )
    return "quick_gelu" if quick else "gelu"


def _norm_eps(settings: Mapping[str, Any], source: object) -> float:
    """Returns LayerNorm's epsilon; UserError unless both towers have the same and nothing else."""
    vision, text = (settings[f"{tower}_cfg"] for tower in ("vision", "text"))
    towers = [text]
    if not isinstance(vision.get("layers"), (list, tuple)):  # a ResNet has no LayerNorm
        towers.append(vision)
    found = []
    for tower in towers:
        kwargs = tower.get("norm_kwargs") or {}
        timm = "timm_model_name" in tower
        if set(kwargs) - {"eps"} or (timm and kwargs):
            raise UserError(
                f"{source} has norm_kwargs {kwargs!r}; our models know eps alone, and timm's "
                "towers have their own."
            )
        found.append(_TIMM_EPS if timm else float(kwargs.get("eps", 1e-5)))
    if len(set(found)) > 1:
        raise UserError(
            f"{source} has the LayerNorm eps {found[0]} in its text tower and {found[1]} in its "
            "image tower; our models have one for both (norm_kwargs)."
        )
    return found[0]


def _with_image_tower(size: models.Size, vision: Mapping[str, Any], source: object) -> models.Size:
    if "timm_model_name" in vision:
        return _with_timm_tower(size, vision, source)
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    resnet = isinstance(layers, (list, tuple))
    final = width * 32 if resnet else width
    return dataclasses.replace(
        size,
        image_size=vision.get("image_size", 224),
        image_layers=tuple(layers) if resnet else (layers,),
        image_width=width,
        image_heads=final // vision.get("head_width", 64),
        patch_size=None if resnet else vision.get("patch_size", 16),
        image_mlp=0 if resnet else int(width * vision.get("mlp_ratio", 4.0)),
        pre_norm=resnet or not vision.get("no_ln_pre", False),
    )


def _with_timm_tower(size: models.Size, vision: Mapping[str, Any], source: object) -> models.Size:
    name = vision["timm_model_name"]
    match = _TIMM_NAME.match(name)
    if not match:
        raise UserError(
            f"{source} has the image tower {name} of timm. Of those, "
            "vit_base, vit_large and vit_so400m with SigLIP's head can be converted."
        )
    kind, patch, pixels = match.groups()
    if vision.get("image_size", int(pixels)) != int(pixels):
        raise UserError(
            f"{source} has the image_size {vision['image_size']} for the image tower {name}, which "
            f"takes {pixels}: correct the one that is wrong."
        )
    width, layers, heads, hidden = _TIMM[kind]
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
    """Returns the nearest open_clip_config.json; `size_of` tells whether it is exact."""
    siglip = size.image_pool == "map"
    text: dict[str, Any] = {
        "context_length": size.context_length,
        "vocab_size": size.vocab_size,
        "width": size.text_width,
        "heads": size.text_heads,
        "layers": size.text_layers,
        "mlp_ratio": _ratio(size.text_width, size.text_mlp),
        "no_causal_mask": not size.text_causal,
        "proj_bias": size.text_projection_bias,
        "pool_type": {"end": "argmax", "last": "last"}[size.text_pool],
        "norm_kwargs": {"eps": size.norm_eps},
    }
    if size.end_token is not None:
        text |= {"pool_type": "eos", "eos_id": size.end_token}
    settings: dict[str, Any] = {"embed_dim": size.embed_dim}
    if siglip:
        settings["custom_text"] = True
        if size.vocab_size == 32_000:
            text["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP"
            text["tokenizer_kwargs"] = {"clean": "canonicalize"}
    if size.logit_bias:
        settings["init_logit_bias"] = -10
    vision = _timm_config(size) if siglip else _vision_config(size)
    if size.activation == "quick_gelu":
        settings["quick_gelu"] = True
    elif size.activation == "gelu_tanh" and (
        not siglip or _form(vision, False, "") == "gelu_tanh"
    ):  # timm's other towers would not follow
        text["act_kwargs"] = {"approximate": "tanh"}
        if not size.is_resnet and not siglip:
            vision["act_kwargs"] = {"approximate": "tanh"}
    settings |= {"vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": settings, "preprocess_cfg": preprocessing.to_open_clip(size)}


def _ratio(width: int, hidden: int) -> float:
    """Returns a number that, times the width and rounded down, gives the hidden units."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def _vision_config(size: models.Size) -> dict[str, Any]:
    final = size.image_width * (32 if size.is_resnet else 1)
    shared = {
        "image_size": size.image_size,
        "width": size.image_width,
        "head_width": final // size.image_heads,
        "patch_size": size.patch_size,
    }
    if size.is_resnet:
        return shared | {"layers": list(size.image_layers)}
    return shared | {
        "layers": size.image_layers[0],
        "mlp_ratio": _ratio(size.image_width, size.image_mlp),
        "no_ln_pre": not size.pre_norm,
        "norm_kwargs": {"eps": size.norm_eps},
    }


def _timm_config(size: models.Size) -> dict[str, Any]:
    shape = (size.image_width, size.image_layers[0], size.image_heads, size.image_mlp)
    kind = next((name for name, known in _TIMM.items() if known == shape), None)
    if kind is None or (size.patch_size, size.image_size) not in _TIMM_INPUTS[kind]:
        raise UserError(
            f"open_clip has no image tower like that of {size} at {size.image_size} pixels: timm "
            f"has {', '.join(_TIMM)} at some resolutions only. Use --to=huggingface."
        )
    return {
        "image_size": size.image_size,
        "timm_model_name": f"vit_{kind}_patch{size.patch_size}_siglip_{size.image_size}",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }


# ---- Names -------------------------------------------------------------------------------------

_TIMM_BLOCK = BlockNames(
    ln_1="norm1",
    attn_out="attn.proj",
    ln_2="norm2",
    mlp_in="mlp.fc1",
    mlp_out="mlp.fc2",
    qkv=(("attn.qkv.weight", "attn.qkv.bias"),),
)


def table(size: models.Size, custom_text: bool) -> list[Entry]:
    """Returns the places of open_clip's tensors in ours.

    Args:
      size: shapes and forms of the model.
      custom_text: the names of the text tower have a prefix.
    """
    if not custom_text:
        return openai.table(size)
    if size.image_pool == "map":
        image = list(_timm(size))
        scalars = [entry(name, f"params/{name}") for name in ("logit_scale", "logit_bias")]
        scalars = scalars if size.logit_bias else scalars[:1]
        return [*image, *openai.text(size, "text."), *scalars]
    text = {row.name for row in openai.text(size, "")}
    return [
        Entry(f"text.{row.name}", row.pieces, row.form) if row.name in text else row
        for row in openai.table(size)
    ]


def _timm(size: models.Size) -> Iterator[Entry]:
    theirs, ours = "visual.trunk", "params/image"
    yield entry(f"{theirs}.patch_embed.proj.weight", f"{ours}/patch_embed/kernel", CONV)
    yield entry(f"{theirs}.patch_embed.proj.bias", f"{ours}/patch_embed/bias")
    yield entry(f"{theirs}.pos_embed", f"{ours}/positions", Form("same", 1))
    yield from blocks(f"{theirs}.blocks", ours, size.image_layers[0], _TIMM_BLOCK)
    yield from norm(f"{theirs}.norm", f"{ours}/ln_post")
    theirs, ours = f"{theirs}.attn_pool", f"{ours}/map_head"
    yield entry(f"{theirs}.latent", f"{ours}/probe", Form("same", 2))
    yield from linear(f"{theirs}.q", f"{ours}/query")
    yield from joined(f"{theirs}.kv.weight", f"{theirs}.kv.bias", [f"{ours}/key", f"{ours}/value"])
    yield from linear(f"{theirs}.proj", f"{ours}/attn_out", inputs=2)
    yield from norm(f"{theirs}.norm", f"{ours}/ln")
    yield from linear(f"{theirs}.mlp.fc1", f"{ours}/mlp_in")
    yield from linear(f"{theirs}.mlp.fc2", f"{ours}/mlp_out")
