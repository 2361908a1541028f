"""Settings of open_clip, an open_clip_config.json, and the sizes that they describe."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models.sizes import SIZES
from clip_jax.weights.convert import preprocessing, timm_towers

_BASE = SIZES["ViT-B/32"]
# Settings that our models take over, and others at the only value that they can have.
_TOWER = {"width", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs"}
_VISION = _TOWER | {"image_size", "patch_size", "head_width", "no_ln_pre", "timm_model_name"}
_VISION |= {"pool_type", "final_ln_after_pool", "pos_embed_type", "ls_init_value", "qk_norm"}
_TEXT = _TOWER | {"context_length", "vocab_size", "heads", "no_causal_mask", "proj_bias"}
_TEXT |= {"pool_type", "eos_id", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}
_TEXT |= {"proj_type", "qk_norm", "pad_id"}  # its towers ignore pad_id without embed_cls
_IMAGE_POOLS = {"tok": "class", "avg": "avg"}
_IMAGE_POSITIONS = {"learnable": "learned", "sin_cos_2d": "sincos"}
_TEXT_POOLS = {"argmax": "end", "eos": "end", "first": "first", "last": "last"}
_PROJECTIONS = {"linear": True, "none": False}
_FIXED = {
    "timm_model_pretrained": (False,),
    "timm_pool": ("map",),
    "timm_proj": ("none",),
    "patch_dropout": (0, 0.0),
    "output_tokens": (False,),
    "embed_cls": (False,),
}


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
        **_activations(settings, source),
        text_qk_norm=text.get("qk_norm", False),
        text_causal=not text.get("no_causal_mask", False),
        text_pool=_one_of(_TEXT_POOLS, text, "text_cfg.pool_type", "argmax", source),
        end_token=_end_token(text),
        text_projection=_one_of(_PROJECTIONS, text, "text_cfg.proj_type", "linear", source),
        text_projection_bias=text.get("proj_bias", False),
        norm_eps=_norm_eps(settings, source),
        logit_bias=settings.get("init_logit_bias") is not None,
        **preprocessing.from_open_clip(config.get("preprocess_cfg") or {}, source),
    )


def _one_of(
    forms: Mapping[str, Any], tower: Mapping[str, Any], setting: str, default: str, source: object
) -> Any:
    """Returns our name of a form; UserError where we do not have it."""
    kind = tower.get(setting.partition(".")[2], default)
    if kind not in forms:
        raise UserError(
            f"{source} has the setting {setting} = {kind!r} of open_clip, which our towers do not "
            f"have: they have {', '.join(forms)}."
        )
    return forms[kind]


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


def _activations(settings: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Returns the activations of the towers; timm's have their own, whatever is set."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    quick = settings.get("quick_gelu", False)
    image, text = (_form(tower, quick, source) for tower in (vision, text))
    resnet = isinstance(vision.get("layers"), (list, tuple))  # it has none
    return {"activation": text if resnet else image, "text_activation": text}


def _form(tower: Mapping[str, Any], quick: bool, source: object) -> str:
    """Returns the activation of a tower; UserError where its settings name another."""
    settings = tower.get("act_kwargs") or {}
    if name := tower.get("timm_model_name"):
        return timm_towers.activation(name, source)
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
        name = tower.get("timm_model_name")
        own = float(kwargs.get("eps", 1e-5))
        found.append(timm_towers.norm_eps(name, source) if name else own)
    if len(set(found)) > 1:
        raise UserError(
            f"{source} has the LayerNorm eps {found[0]} in its text tower and {found[1]} in its "
            "image tower; our models have one for both (norm_kwargs)."
        )
    return found[0]


def _with_image_tower(size: models.Size, vision: Mapping[str, Any], source: object) -> models.Size:
    if "timm_model_name" in vision:
        return timm_towers.with_tower(size, vision, source)
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
        **({} if resnet else _image_forms(vision, source)),
    )


def _image_forms(vision: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Returns the forms of a ViT; all of open_clip's have a class token, read or not."""
    pool = _one_of(_IMAGE_POOLS, vision, "vision_cfg.pool_type", "tok", source)
    place = _one_of(_IMAGE_POSITIONS, vision, "vision_cfg.pos_embed_type", "learnable", source)
    return {
        "image_pool": pool,
        "image_positions": place,
        "image_registers": int(pool == "avg"),
        "norm_after_pool": pool == "avg" and vision.get("final_ln_after_pool", False),
        "image_layer_scale": vision.get("ls_init_value"),
        "image_qk_norm": vision.get("qk_norm", False),
    }


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
        "pool_type": _theirs(_TEXT_POOLS, size.text_pool),
        "proj_type": _theirs(_PROJECTIONS, size.text_projection),
        "norm_kwargs": {"eps": size.norm_eps},
        "qk_norm": size.text_qk_norm,
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
    vision = timm_towers.config_of(size) if siglip else _vision_config(size)
    text_activation = size.text_activation or size.activation
    if "quick_gelu" in (size.activation, text_activation):
        settings["quick_gelu"] = True  # of both, but timm's towers
    for tower, form in ((text, text_activation), (vision, size.activation)):
        own = "timm_model_name" not in tower and not (size.is_resnet and tower is vision)
        if form == "gelu_tanh" and own:
            tower["act_kwargs"] = {"approximate": "tanh"}
    settings |= {"vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": settings, "preprocess_cfg": preprocessing.to_open_clip(size)}


def _theirs(forms: Mapping[str, Any], ours: Any) -> str:
    """Returns their name of a form, the first; of one that they lack their default."""
    return next((name for name, form in forms.items() if form == ours), next(iter(forms)))


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
        "pool_type": _theirs(_IMAGE_POOLS, size.image_pool),
        "pos_embed_type": _theirs(_IMAGE_POSITIONS, size.image_positions),
        "final_ln_after_pool": size.norm_after_pool,
        "ls_init_value": size.image_layer_scale,
        "qk_norm": size.image_qk_norm,
        "norm_kwargs": {"eps": size.norm_eps},
    }
