"""big_vision's two-tower checkpoints (.npz), in which SigLIP was published."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping

from etils import epath

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.models.sizes import SIZES
from clip_jax.weights.convert import files, tokens
from clip_jax.weights.convert.mapping import SAME, Entry, Form, Piece, entry
from clip_jax.weights.model import Shape, Tensors, Weights

_ONE = Form("same", 1)
_SIGLIP = SIZES["SigLIP-B/16"]
_QKV = ("query", "key", "value")


def read(path: epath.Path, tokenizer: str = "") -> files.ForeignWeights:
    """Opens a checkpoint; `tokenizer`: the file of its vocabulary, "": not known.

    Raises:
      UserError: it is damaged, or of another model than SigLIP.
    """
    theirs = _plain_names(files.open_npz(path))
    size = size_of(theirs.shapes, path)
    stacked = "img/Transformer/encoderblock/LayerNorm_0/scale" in theirs.shapes
    return files.ForeignWeights(
        size=size,
        tensors=theirs,
        table=table(size, stacked),
        tokenizer=tokens.named(tokenizer, size) if tokenizer else tokens.UNKNOWN,
        format="big_vision",
    )


def write(weights: Weights, path: pathlib.Path) -> None:
    """Writes a checkpoint with numbered layers, as those that were published.

    Raises:
      UserError: big_vision has no such model.
    """
    if weights.size.image_pool != "map":
        raise UserError(
            f"big_vision's two towers are SigLIP's, and {weights.size} has others: use "
            "--to=huggingface or --to=open_clip."
        )
    theirs = files.export(table(weights.size, stacked=False), weights)
    files.check_expressible("big_vision", size_of(theirs.shapes, path), weights.size)
    renamed = Tensors(
        {f"params/{name}": shape for name, shape in theirs.shapes.items()},
        lambda name: theirs.read(name.removeprefix("params/")),
    )
    files.save_npz(renamed, path)


def _plain_names(tensors: Tensors) -> Tensors:
    """Returns only the parameters, where a training state has more, without their prefix."""
    if not any(name.startswith("params/") for name in tensors.shapes):
        return tensors
    shapes = {
        name.removeprefix("params/"): shape
        for name, shape in tensors.shapes.items()
        if name.startswith("params/")
    }
    return Tensors(shapes, lambda name: tensors.read(f"params/{name}"))


def size_of(shapes: Mapping[str, Shape], source: object) -> models.Size:
    """Returns the size, which the shapes tell completely; forms and normalisation are SigLIP's.

    Raises:
      UserError: another model.
    """
    try:
        side, _, _, width = shapes["img/embedding/kernel"]
        context_length, text_width = shapes["txt/pos_embedding"][-2:]
        image, text = _blocks(shapes, "img/Transformer"), _blocks(shapes, "txt/Encoder_0")
        return dataclasses.replace(
            _SIGLIP,
            embed_dim=shapes["txt/head/kernel"][1],
            image_size=_image_size(side, shapes["img/pos_embedding"][-2], str(source)),
            image_layers=(image[0],),
            image_width=width,
            image_heads=image[1],
            image_mlp=image[2],
            patch_size=side,
            text_layers=text[0],
            text_width=text_width,
            text_heads=text[1],
            text_mlp=text[2],
            context_length=context_length,
            vocab_size=shapes["txt/Embed_0/embedding"][0],
            logit_bias="b" in shapes,
        )
    except (KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{source} is no checkpoint of SigLIP from big_vision: it lacks {error}, which its "
            "two towers have."
        ) from error


def _image_size(patch: int, positions: int, source: str) -> int:
    """Returns the pixels along a side.

    Where patches do not divide the picture, the shapes do not tell: 27 x 27 patches of 14 pixels
    are those of 378 to 391. The name of the file does, as in webli_en_so400m_384_58765454.npz.
    """
    grid = round(positions**0.5)
    numbers = map(int, re.findall(r"\d+", source.rpartition("/")[2]))
    return next((number for number in numbers if number // patch == grid), patch * grid)


def _blocks(shapes: Mapping[str, Shape], stem: str) -> tuple[int, int, int]:
    """Returns the layers, heads and hidden units of a tower."""
    if f"{stem}/encoderblock/LayerNorm_0/scale" in shapes:
        layers = shapes[f"{stem}/encoderblock/LayerNorm_0/scale"][0]
        first = f"{stem}/encoderblock"
    else:
        prefix, first = f"{stem}/encoderblock_", f"{stem}/encoderblock_0"
        numbers = {n[len(prefix) :].split("/")[0] for n in shapes if n.startswith(prefix)}
        layers = len(numbers)
    heads = shapes[f"{first}/MultiHeadDotProductAttention_0/query/kernel"][-2]
    return layers, heads, shapes[f"{first}/MlpBlock_0/Dense_0/kernel"][-1]


def table(size: models.Size, stacked: bool) -> list[Entry]:
    """Returns the places of big_vision's tensors in ours; `stacked`: its layers are, as ours."""
    rows = [*_image(size, stacked), *_text(size, stacked), entry("t", "params/logit_scale", _ONE)]
    return [*rows, *([entry("b", "params/logit_bias", _ONE)] if size.logit_bias else [])]


def _image(size: models.Size, stacked: bool) -> Iterator[Entry]:
    theirs, ours = "img", "params/image"
    yield from _dense(f"{theirs}/embedding", f"{ours}/patch_embed")
    yield entry(f"{theirs}/pos_embedding", f"{ours}/positions", _ONE)
    yield from _stack(f"{theirs}/Transformer", ours, size.image_layers[0], stacked)
    yield from _norm(f"{theirs}/Transformer/encoder_norm", f"{ours}/ln_post")
    head, map_head = f"{theirs}/MAPHead_0", f"{ours}/map_head"
    yield entry(f"{head}/probe", f"{map_head}/probe", Form("same", 2))
    for part, own in (*zip(_QKV, _QKV), ("out", "attn_out")):
        yield from _dense(f"{head}/MultiHeadDotProductAttention_0/{part}", f"{map_head}/{own}")
    yield from _norm(f"{head}/LayerNorm_0", f"{map_head}/ln")
    yield from _dense(f"{head}/MlpBlock_0/Dense_0", f"{map_head}/mlp_in")
    yield from _dense(f"{head}/MlpBlock_0/Dense_1", f"{map_head}/mlp_out")


def _text(size: models.Size, stacked: bool) -> Iterator[Entry]:
    theirs, ours = "txt", "params/text"
    yield entry(f"{theirs}/Embed_0/embedding", f"{ours}/token_embed/embedding")
    yield entry(f"{theirs}/pos_embedding", f"{ours}/positions", _ONE)
    yield from _stack(f"{theirs}/Encoder_0", ours, size.text_layers, stacked)
    yield from _norm(f"{theirs}/Encoder_0/encoder_norm", f"{ours}/ln_final")
    yield from _dense(f"{theirs}/head", f"{ours}/projection")


def _stack(theirs: str, ours: str, layers: int, stacked: bool) -> Iterator[Entry]:
    if stacked:
        yield from _block(f"{theirs}/encoderblock", f"{ours}/transformer/blocks", slice(None))
        return
    for i in range(layers):
        yield from _block(f"{theirs}/encoderblock_{i}", f"{ours}/transformer/blocks", i)


def _block(theirs: str, ours: str, layer: int | slice) -> Iterator[Entry]:
    at, attention = (layer,), f"{theirs}/MultiHeadDotProductAttention_0"
    yield from _norm(f"{theirs}/LayerNorm_0", f"{ours}/ln_1", at)
    for number, part in enumerate(_QKV):
        kernel = Piece(f"{ours}/qkv/kernel", (layer, slice(None), number))
        yield Entry(f"{attention}/{part}/kernel", (kernel,), SAME)
        yield entry(f"{attention}/{part}/bias", f"{ours}/qkv/bias", at=(layer, number))
    yield from _dense(f"{attention}/out", f"{ours}/attn_out", at)
    yield from _norm(f"{theirs}/LayerNorm_1", f"{ours}/ln_2", at)
    yield from _dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}/mlp_in", at)
    yield from _dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}/mlp_out", at)


def _dense(theirs: str, ours: str, at: tuple = ()) -> list[Entry]:
    names = ("kernel", "bias")
    return [entry(f"{theirs}/{name}", f"{ours}/{name}", at=at) for name in names]


def _norm(theirs: str, ours: str, at: tuple = ()) -> list[Entry]:
    return [entry(f"{theirs}/{name}", f"{ours}/{name}", at=at) for name in ("scale", "bias")]
