"""Names of OpenAI's released models, which open_clip uses as well for its own towers."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models.sizes import SIZES
from clip_jax.weights.convert import files, torch_files
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
from clip_jax.weights.model import Shape, Weights

# In files, but no weights: masks, counters, and numbers that the shapes tell as well.
NO_WEIGHTS = (
    r"(^|\.)(attn_mask|position_ids|num_batches_tracked)$"
    r"|^(input_resolution|context_length|vocab_size)$"
)
_BASE = SIZES["ViT-B/32"]  # has the forms of all of OpenAI's models
_BLOCK = BlockNames(
    ln_1="ln_1",
    attn_out="attn.out_proj",
    ln_2="ln_2",
    mlp_in="mlp.c_fc",
    mlp_out="mlp.c_proj",
    qkv=(("attn.in_proj_weight", "attn.in_proj_bias"),),
)


def write(weights: Weights, path: pathlib.Path) -> None:
    """Writes a state dict that OpenAI's clip.load reads.

    Raises:
      UserError: OpenAI's code has no such model.
    """
    files.check_expressible("OpenAI's format", nearest(weights.size), weights.size)
    torch_files.write(files.export(table(weights.size), weights), path)


def table(size: models.Size) -> list[Entry]:
    """Returns the place of each of OpenAI's tensors in ours."""
    image = _resnet(size) if size.is_resnet else _vit(size)
    bias = [entry("logit_bias", "params/logit_bias")] if size.logit_bias else []
    scale = entry("logit_scale", "params/logit_scale")
    return [*image, *text(size, ""), scale, *bias]


def text(size: models.Size, prefix: str) -> Iterator[Entry]:
    """The text tower, its names behind a prefix."""
    ours = "params/text"
    yield entry(f"{prefix}token_embedding.weight", f"{ours}/token_embed/embedding")
    yield entry(f"{prefix}positional_embedding", f"{ours}/positions")
    names = _block(size.text_qk_norm, layer_scale=False)
    yield from blocks(f"{prefix}transformer.resblocks", ours, size.text_layers, names)
    yield from norm(f"{prefix}ln_final", f"{ours}/ln_final")
    if size.text_projection_bias:
        yield from linear(f"{prefix}text_projection", f"{ours}/projection")
    elif size.text_projection:
        yield entry(f"{prefix}text_projection", f"{ours}/projection/kernel")


def _block(qk_norm: bool, layer_scale: bool) -> BlockNames:
    """Returns the names in a block, with those that open_clip has besides."""
    names = _BLOCK
    if qk_norm:
        names = dataclasses.replace(names, ln_q="attn.ln_q", ln_k="attn.ln_k")
    if layer_scale:
        names = dataclasses.replace(names, attn_scale="ls_1.gamma", mlp_scale="ls_2.gamma")
    return names


def _vit(size: models.Size) -> Iterator[Entry]:
    theirs, ours = "visual", "params/image"
    yield entry(f"{theirs}.conv1.weight", f"{ours}/patch_embed/kernel", CONV)
    if size.has_class_token:
        yield entry(f"{theirs}.class_embedding", f"{ours}/class_token")
    elif size.image_registers:  # a class token that is not read
        yield entry(f"{theirs}.class_embedding", f"{ours}/register_embedding", at=(0,))
    if size.image_positions == "learned":
        yield entry(f"{theirs}.positional_embedding", f"{ours}/positions")
    if size.pre_norm:
        yield from norm(f"{theirs}.ln_pre", f"{ours}/ln_pre")
    names = _block(size.image_qk_norm, size.image_layer_scale is not None)
    yield from blocks(f"{theirs}.transformer.resblocks", ours, size.image_layers[0], names)
    yield from norm(f"{theirs}.ln_post", f"{ours}/ln_post")
    yield entry(f"{theirs}.proj", f"{ours}/projection/kernel")
    if size.image_pool == "map":
        yield from _map_head(f"{theirs}.attn_pool", f"{ours}/map_head")


def _map_head(theirs: str, ours: str) -> Iterator[Entry]:
    """The head of the Perception Encoder, whose files have these names otherwise."""
    yield entry(f"{theirs}.probe", f"{ours}/probe", Form("same", 2))
    parts = [f"{ours}/{part}" for part in ("query", "key", "value")]
    yield from joined(f"{theirs}.attn.in_proj_weight", f"{theirs}.attn.in_proj_bias", parts)
    yield from linear(f"{theirs}.attn.out_proj", f"{ours}/attn_out", inputs=2)
    yield from norm(f"{theirs}.layernorm", f"{ours}/ln")
    yield from linear(f"{theirs}.mlp.c_fc", f"{ours}/mlp_in")
    yield from linear(f"{theirs}.mlp.c_proj", f"{ours}/mlp_out")


def _resnet(size: models.Size) -> Iterator[Entry]:
    for kind in ("conv", "bn"):
        for path, name in _resnet_layers(size, kind):
            if kind == "conv":
                yield entry(f"{name}.weight", f"params/image/{path}/kernel", CONV)
            else:
                yield from norm(name, f"params/image/{path}")
                yield entry(f"{name}.running_mean", f"batch_stats/image/{path}/mean")
                yield entry(f"{name}.running_var", f"batch_stats/image/{path}/var")
    theirs, ours = "visual.attnpool", "params/image/attention_pool"
    yield entry(f"{theirs}.positional_embedding", f"{ours}/positions")
    for name, path in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from linear(f"{theirs}.{name}_proj", f"{ours}/{path}")
    yield from linear(f"{theirs}.c_proj", f"{ours}/projection", inputs=2)


def _resnet_layers(size: models.Size, kind: str) -> Iterator[tuple[str, str]]:
    """Yields (our path, their name) for every convolution ("conv") or BatchNorm ("bn")."""
    for i in (1, 2, 3):
        yield f"stem_{kind}{i}", f"visual.{kind}{i}"
    for stage, count in enumerate(size.image_layers, start=1):
        for block in range(count):
            ours, theirs = f"stage{stage}_block{block}", f"visual.layer{stage}.{block}"
            for i in (1, 2, 3):
                yield f"{ours}/{kind}{i}", f"{theirs}.{kind}{i}"
            if block == 0:
                number = {"conv": 0, "bn": 1}[kind]
                yield f"{ours}/shortcut_{kind}", f"{theirs}.downsample.{number}"


def size_of(shapes: Mapping[str, Shape], source: object) -> models.Size:
    """Returns the size that OpenAI's own code would give a model with these tensors.

    Raises:
      UserError: there are others in the file.
    """
    try:
        width = shapes["ln_final.weight"][0]
        size = dataclasses.replace(
            _BASE,
            embed_dim=shapes["text_projection"][1],
            text_width=width,
            text_heads=width // 64,
            text_mlp=0,
            text_layers=_count(shapes, "transformer.resblocks."),
            context_length=shapes["positional_embedding"][0],
            vocab_size=shapes["token_embedding.weight"][0],
        )
        return _with_image_tower(size, shapes)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{source} is no model in OpenAI's format: it lacks the tensor {error}. Give a file "
            "of OpenAI's CLIP or open_clip, or a folder of transformers."
        ) from error


def nearest(size: models.Size) -> models.Size:
    """Returns the size that OpenAI's code gives a model with the shapes of this one."""
    width = size.image_width * (32 if size.is_resnet else 1)
    return models.Size(
        embed_dim=size.embed_dim,
        image_size=size.image_size,
        image_layers=size.image_layers,
        image_width=size.image_width,
        image_heads=max(width // 64, 1),
        patch_size=size.patch_size,
        text_width=size.text_width,
        text_heads=max(size.text_width // 64, 1),
        text_layers=size.text_layers,
        context_length=size.context_length,
        vocab_size=size.vocab_size,
    )


def _with_image_tower(size: models.Size, shapes: Mapping[str, Shape]) -> models.Size:
    if "visual.proj" in shapes:
        width, _, side, _ = shapes["visual.conv1.weight"]
        grid = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
        return dataclasses.replace(
            size,
            image_size=side * grid,
            image_layers=(_count(shapes, "visual.transformer.resblocks."),),
            image_width=width,
            image_heads=width // 64,
            image_mlp=0,
            patch_size=side,
        )
    width = shapes["visual.layer1.0.conv1.weight"][0]
    grid = round((shapes["visual.attnpool.positional_embedding"][0] - 1) ** 0.5)
    return dataclasses.replace(
        size,
        image_size=32 * grid,
        image_layers=tuple(_count(shapes, f"visual.layer{i}.") for i in (1, 2, 3, 4)),
        image_width=width,
        image_heads=width * 32 // 64,
        image_mlp=0,
        patch_size=None,
    )


def _count(names: Iterable[str], prefix: str) -> int:
    """Counts the different numbers that follow the prefix."""
    numbers = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return len(numbers)
