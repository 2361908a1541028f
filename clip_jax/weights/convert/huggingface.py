"""Folders of CLIP, MetaCLIP 2 and SigLIP of transformers, as on the Hugging Face hub."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from clip_jax import models
from clip_jax.data.published_tokenizer import PublishedTokenizer
from clip_jax.errors import UserError
from clip_jax.models.sizes import SIZES
from clip_jax.storage import ranges
from clip_jax.weights.convert import files, preprocessing, tokens
from clip_jax.weights.convert.mapping import (
    CONV,
    LINEAR,
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

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# Defaults that a config.json may leave out, by model_type.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "projection_dim": 512,
        "text": {
            "vocab_size": 49_408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49_407,
        },
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    },
    "siglip": {
        "text": {
            "vocab_size": 32_000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 64,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
    },
}
_DEFAULTS["metaclip_2"] = _DEFAULTS["clip"]
# A model of each kind, whose forms are those that no config.json can change.
_MODELS = dict.fromkeys(("clip", "metaclip_2"), SIZES["ViT-B/32"])
_MODELS |= {"siglip": SIZES["SigLIP-B/16"]}
_ARCHITECTURES = {"clip": "CLIPModel", "metaclip_2": "MetaClip2Model", "siglip": "SiglipModel"}
# eos_token_id of early files of CLIP: the end token is the largest id of a row. In MetaCLIP 2 it is
# the id of XLM-V's end token.
_LEGACY_END = 2
_NO_WEIGHTS = r"\.position_ids$"


def is_folder(folder: epath.Path) -> bool:
    """Returns whether a folder holds a model of transformers of a kind in `_MODELS`."""
    if not all(files.find(folder, names) for names in ((CONFIG,), files.HUGGINGFACE)):
        return False
    config = ranges.read(folder / CONFIG)
    try:
        return json.loads(config).get("model_type") in _MODELS
    except (ValueError, AttributeError):
        return False


def check_kind(folder: epath.Path) -> None:
    """Raises UserError where a folder holds another model of transformers."""
    path = files.find(folder, (CONFIG,))
    kind = None if path is None else files.read_json(path).get("model_type")
    if kind is not None and kind not in _MODELS:
        raise UserError(
            f"{folder} holds a model of the kind {kind!r} of transformers (model_type in "
            f"{CONFIG}), whose towers clip_jax does not have: it has those of "
            f"{', '.join(_MODELS)}."
        )


def read(folder: epath.Path, tokenizer: str = "") -> files.ForeignWeights:
    """Opens a folder; `tokenizer` names another tokenizer than the one in it.

    Raises:
      UserError: a file is damaged, or its settings do not go together.
    """
    config, processor = files.read_json(folder / CONFIG), _processor(folder)
    size = size_of(config, processor, folder)
    if not processor:
        logging.warning(
            "%s has no %s: pictures are prepared as the published models of its kind are, %s.",
            folder,
            PROCESSOR,
            size.preprocessing,
        )
    path = files.find(folder, files.HUGGINGFACE)
    assert path is not None
    return files.ForeignWeights(
        size=size,
        tensors=files.without(files.open_tensors(path), _NO_WEIGHTS),
        table=table(size),
        tokenizer=tokens.named(tokenizer, size) if tokenizer else tokens.find(folder, size),
        format="huggingface",
    )


def write(weights: Weights, folder: pathlib.Path) -> None:
    """Writes a folder that transformers loads.

    Raises:
      UserError: transformers has no such model.
    """
    config, processor = config_of(weights.size), preprocessing.to_transformers(weights.size)
    _name_tokens(config, weights)
    files.check_expressible("transformers", size_of(config, processor, folder), weights.size)
    folder.mkdir(parents=True)
    if not weights.tokenizer.name:  # AutoProcessor would look for one: so it makes images only
        processor["processor_class"] = processor["image_processor_type"]
        logging.warning(
            "The tokenizer of this model is not known, so %s has none: in transformers its "
            "AutoProcessor prepares images only. Name it with --tokenizer to write it as well.",
            folder.name,
        )
    tokens.write_huggingface(weights.tokenizer, weights.size, folder)
    for name, content in ((CONFIG, config), (PROCESSOR, processor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    theirs = files.export(table(weights.size), weights)
    save_safetensors(theirs, folder / "model.safetensors", {"format": "pt"})
    if weights.size.image_crop == "center":
        logging.warning(
            "transformers rounds the edge of the middle square down where the margin is odd; this "
            "model rounds it to even, as OpenAI's code does. Such pictures are cut one pixel off "
            "there in half of the cases, and no setting changes it (docs/weights.md)."
        )


def _name_tokens(config: dict[str, Any], weights: Weights) -> None:
    """Writes the ids of the tokenizer's own special tokens into config.json."""
    tokenizer = weights.tokenizer.create(weights.size.context_length)
    if isinstance(tokenizer, PublishedTokenizer):
        rules, text = tokenizer.rules, config["text_config"]
        text["pad_token_id"] = rules.pad
        if rules.start:
            text["bos_token_id"] = rules.start[0]
        legacy = weights.size.text_pool == "end" and weights.size.end_token is None
        if tokenizer.end is not None:
            largest = tokenizer.end == tokenizer.vocab_size - 1
            text["eos_token_id"] = _LEGACY_END if legacy and not largest else tokenizer.end


# ---- Settings ----------------------------------------------------------------------------------


def size_of(config: Mapping[str, Any], processor: Mapping[str, Any], source: object) -> models.Size:
    """Returns the size that config.json and preprocessor_config.json describe.

    Raises:
      UserError: a setting that our models do not have, or two that contradict each other.
    """
    kind = config["model_type"]
    text, vision = (_tower(config, part) for part in ("text", "vision"))
    name = "layer_norm_eps"
    if text[name] != vision[name]:
        raise UserError(
            f"{source} has {name} {text[name]!r} in its text tower and {vision[name]!r} in its "
            "image tower; our models have one for both."
        )
    for tower in (text, vision):
        if tower["hidden_act"] not in _ACTIVATIONS:
            raise UserError(
                f"{source} has the activation hidden_act={tower['hidden_act']!r}; our models have "
                f"{', '.join(_ACTIVATIONS)}."
            )
    if kind == "siglip":
        embed_dim = text.get("projection_size") or text["hidden_size"]
    else:
        embed_dim = {**_DEFAULTS[kind], **config}["projection_dim"]
    return dataclasses.replace(
        _MODELS[kind],
        embed_dim=embed_dim,
        image_size=vision["image_size"],
        image_layers=(vision["num_hidden_layers"],),
        image_width=vision["hidden_size"],
        image_heads=vision["num_attention_heads"],
        image_mlp=vision["intermediate_size"],
        patch_size=vision["patch_size"],
        text_layers=text["num_hidden_layers"],
        text_width=text["hidden_size"],
        text_heads=text["num_attention_heads"],
        text_mlp=text["intermediate_size"],
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        end_token=None if kind == "siglip" else _end_token(text, kind, source),
        activation=_ACTIVATIONS[vision["hidden_act"]],
        text_activation=_ACTIVATIONS[text["hidden_act"]],
        norm_eps=float(text["layer_norm_eps"]),
        **preprocessing.from_transformers(
            processor, "siglip" if kind == "siglip" else "clip", vision["image_size"], source
        ),
    )


def _end_token(text: Mapping[str, Any], kind: str, source: object) -> int | None:
    """Returns the id at which captions are read; None: the largest of a row."""
    end, count = text["eos_token_id"], text["vocab_size"]
    if end == count - 1 or (end == _LEGACY_END and kind == "clip"):
        return None
    if not isinstance(end, int) or not 0 <= end < count:
        raise UserError(
            f"{source} names the end token {end!r} (eos_token_id of text_config in {CONFIG}), but "
            f"its vocabulary has {count:,} entries: no caption could be read at it. Write the id "
            "of the tokenizer's end token there."
        )
    return end


def _tower(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns a tower's settings; early files have a second dictionary that takes precedence."""
    first, second = config.get(f"{part}_config"), config.get(f"{part}_config_dict")
    return {**_DEFAULTS[config["model_type"]][part], **(first or {}), **(second or {})}


def _processor(folder: epath.Path) -> Mapping[str, Any]:
    """Reads the settings of the preprocessing; {}: the folder has none."""
    path = files.find(folder, (PROCESSOR, "processor_config.json"))  # the latter: transformers 5
    if path is None:
        return {}
    content = files.read_json(path)
    return content if path.name == PROCESSOR else content.get("image_processor", {})


def config_of(size: models.Size) -> dict[str, Any]:
    """Returns the nearest config.json; `size_of` tells whether it is exact."""
    kind = "metaclip_2" if size.end_token == _LEGACY_END else "clip"
    kind = "siglip" if size.image_pool == "map" else kind
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    shared: dict[str, Any] = {"layer_norm_eps": size.norm_eps}
    if kind != "siglip":
        shared["projection_dim"] = size.embed_dim
    text = {
        "model_type": f"{kind}_text_model",
        "hidden_act": names[size.text_activation or size.activation],
        "hidden_size": size.text_width,
        "intermediate_size": size.text_mlp,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_heads,
        "max_position_embeddings": size.context_length,
        "vocab_size": size.vocab_size,
        **_special_tokens(kind, size),
        **shared,
    }
    vision = {
        "model_type": f"{kind}_vision_model",
        "hidden_act": names[size.activation],
        "hidden_size": size.image_width,
        "intermediate_size": size.image_mlp,
        "num_hidden_layers": size.image_layers[0],
        "num_attention_heads": size.image_heads,
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        **shared,
    }
    config = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "text_config": text,
        "vision_config": vision,
    }
    if kind == "siglip":
        text["projection_size"] = size.embed_dim
        return config
    return config | {"projection_dim": size.embed_dim}


def _special_tokens(kind: str, size: models.Size) -> dict[str, int]:
    """The ids of the special tokens.

    SigLIP's end token is also its padding; CLIP's model looks for the end token by its id.
    """
    if kind == "siglip":
        return {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "metaclip_2":
        return {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    end = size.vocab_size - 1 if size.end_token is None else size.end_token
    return {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}


# ---- Names -------------------------------------------------------------------------------------

_BLOCK = BlockNames(
    ln_1="layer_norm1",
    attn_out="self_attn.out_proj",
    ln_2="layer_norm2",
    mlp_in="mlp.fc1",
    mlp_out="mlp.fc2",
    qkv=tuple((f"self_attn.{p}_proj.weight", f"self_attn.{p}_proj.bias") for p in "qkv"),
)


def table(size: models.Size) -> list[Entry]:
    """Returns the place of each tensor of transformers in ours."""
    siglip = size.image_pool == "map"
    scalar = Form("same", 1) if siglip else Form("same")
    ends = _siglip_ends(size) if siglip else _clip_ends()
    return [*_towers(size), *ends, entry("logit_scale", "params/logit_scale", scalar)]


def _towers(size: models.Size) -> Iterator[Entry]:
    """The tensors that both kinds have."""
    text, image = "text_model", "vision_model"
    embeddings = f"{text}.embeddings"
    yield entry(f"{embeddings}.token_embedding.weight", "params/text/token_embed/embedding")
    yield entry(f"{embeddings}.position_embedding.weight", "params/text/positions")
    yield from blocks(f"{text}.encoder.layers", "params/text", size.text_layers, _BLOCK)
    yield from norm(f"{text}.final_layer_norm", "params/text/ln_final")
    embeddings = f"{image}.embeddings"
    yield entry(f"{embeddings}.patch_embedding.weight", "params/image/patch_embed/kernel", CONV)
    yield entry(f"{embeddings}.position_embedding.weight", "params/image/positions")
    yield from blocks(f"{image}.encoder.layers", "params/image", size.image_layers[0], _BLOCK)
    yield from norm(f"{image}.post_layernorm", "params/image/ln_post")


def _clip_ends() -> Iterator[Entry]:
    yield entry("vision_model.embeddings.class_embedding", "params/image/class_token")
    yield from norm("vision_model.pre_layrnorm", "params/image/ln_pre")  # their spelling
    yield entry("visual_projection.weight", "params/image/projection/kernel", LINEAR)
    yield entry("text_projection.weight", "params/text/projection/kernel", LINEAR)


def _siglip_ends(size: models.Size) -> Iterator[Entry]:
    theirs, ours = "vision_model.head", "params/image/map_head"
    yield entry("vision_model.embeddings.patch_embedding.bias", "params/image/patch_embed/bias")
    yield entry(f"{theirs}.probe", f"{ours}/probe", Form("same", 2))
    attention = f"{theirs}.attention"
    parts = [f"{ours}/{part}" for part in ("query", "key", "value")]
    yield from joined(f"{attention}.in_proj_weight", f"{attention}.in_proj_bias", parts)
    yield from linear(f"{attention}.out_proj", f"{ours}/attn_out", inputs=2)
    yield from norm(f"{theirs}.layernorm", f"{ours}/ln")
    yield from linear(f"{theirs}.mlp.fc1", f"{ours}/mlp_in")
    yield from linear(f"{theirs}.mlp.fc2", f"{ours}/mlp_out")
    yield from linear("text_model.head", "params/text/projection")
    if size.logit_bias:
        yield entry("logit_bias", "params/logit_bias", Form("same", 1))
