"""Tables of the places of another format's tensors in ours, read in both directions."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from clip_jax.weights.model import Shape, Tensors, check_shapes, read_finite


@dataclass(frozen=True)
class Piece:
    """A part of one of our tensors.

    Attributes:
      path: name of the tensor.
      index: the part, as NumPy takes it; (): all of it.
    """

    path: str
    index: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Form:
    """The layout of a piece in another format.

    Attributes:
      kind: "same"; "flat", as a vector; "linear", [*inputs, *outputs] to [out, in]; "conv",
        [h, w, in, out] to [out, in, h, w].
      count: "same": axes of length 1 in front; "linear": how many of the axes are inputs.
    """

    kind: str
    count: int = 0

    def theirs(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Returns our piece in the other layout."""
        if self.kind == "flat":
            return x.reshape(-1)
        if self.kind == "linear":
            return x.reshape(math.prod(x.shape[: self.count]), -1).T
        if self.kind == "conv":
            return x.transpose(3, 2, 0, 1)
        return x.reshape((1,) * self.count + x.shape)

    def ours(self, x: Float[np.ndarray, "..."], shape: Shape) -> Float[np.ndarray, "..."]:
        """Returns their piece in our layout, which has this shape."""
        if self.kind == "linear":
            return x.T.reshape(shape)
        if self.kind == "conv":
            return x.transpose(2, 3, 1, 0)
        return x.reshape(shape)


SAME, FLAT, LINEAR, CONV = Form("same"), Form("flat"), Form("linear", 1), Form("conv")


@dataclass(frozen=True)
class Entry:
    """A tensor of another format: pieces of ours in its layout, joined along the first axis."""

    name: str
    pieces: tuple[Piece, ...]
    form: Form = SAME


# ---- Rows of the tables ------------------------------------------------------------------------


def entry(name: str, path: str, form: Form = SAME, at: tuple = ()) -> Entry:
    """An entry that is a whole tensor of ours, or the part `at`."""
    return Entry(name, (Piece(path, at),), form)


def norm(theirs: str, ours: str, at: tuple = ()) -> list[Entry]:
    """A LayerNorm, or the learned part of a BatchNorm, in PyTorch's names."""
    return [
        entry(f"{theirs}.weight", f"{ours}/scale", at=at),
        entry(f"{theirs}.bias", f"{ours}/bias", at=at),
    ]


def linear(theirs: str, ours: str, inputs: int = 1, at: tuple = ()) -> list[Entry]:
    """A linear layer with bias in PyTorch's names; `inputs`: axes of our kernel that are inputs."""
    return [
        entry(f"{theirs}.weight", f"{ours}/kernel", Form("linear", inputs), at),
        entry(f"{theirs}.bias", f"{ours}/bias", FLAT, at),
    ]


def joined(weight: str, bias: str, ours: Iterable[str]) -> list[Entry]:
    """Several linear layers of the same inputs, fused into one."""
    return [
        Entry(weight, tuple(Piece(f"{path}/kernel") for path in ours), LINEAR),
        Entry(bias, tuple(Piece(f"{path}/bias") for path in ours), FLAT),
    ]


@dataclass(frozen=True)
class BlockNames:
    """The names of the parts of a transformer block in PyTorch.

    Attributes:
      ln_1, attn_out, ln_2, mlp_in, mlp_out: their names, by ours.
      ln_q, ln_k: those of the normalisation of queries and keys; "": there is none.
      attn_scale, mlp_scale: those of layer scale; "": there is none.
      qkv: names of one fused projection, or of three; each is a weight and a bias.
    """

    ln_1: str
    attn_out: str
    ln_2: str
    mlp_in: str
    mlp_out: str
    qkv: tuple[tuple[str, str], ...]
    ln_q: str = ""
    ln_k: str = ""
    attn_scale: str = ""
    mlp_scale: str = ""


def blocks(theirs: str, ours: str, layers: int, names: BlockNames) -> Iterator[Entry]:
    """The blocks of a tower; theirs are numbered, ours stacked."""
    each = 3 // len(names.qkv)
    for i in range(layers):
        at, stem, root = (i,), f"{theirs}.{i}", f"{ours}/transformer/blocks"
        yield from norm(f"{stem}.{names.ln_1}", f"{root}/ln_1", at)
        for number, (weight, bias) in enumerate(names.qkv):
            parts = range(number * each, (number + 1) * each)
            kernels = tuple(Piece(f"{root}/qkv/kernel", (i, slice(None), j)) for j in parts)
            yield Entry(f"{stem}.{weight}", kernels, LINEAR)
            yield Entry(
                f"{stem}.{bias}", tuple(Piece(f"{root}/qkv/bias", (i, j)) for j in parts), FLAT
            )
        yield from linear(f"{stem}.{names.attn_out}", f"{root}/attn_out", 2, at)
        yield from norm(f"{stem}.{names.ln_2}", f"{root}/ln_2", at)
        yield from linear(f"{stem}.{names.mlp_in}", f"{root}/mlp_in", 1, at)
        yield from linear(f"{stem}.{names.mlp_out}", f"{root}/mlp_out", 1, at)
        for part in ("ln_q", "ln_k"):
            if name := getattr(names, part):
                yield from norm(f"{stem}.{name}", f"{root}/{part}", at)
        for part in ("attn_scale", "mlp_scale"):
            if name := getattr(names, part):
                yield entry(f"{stem}.{name}", f"{root}/{part}", at=at)


# ---- Reading the tables ------------------------------------------------------------------------


def their_shapes(table: Iterable[Entry], ours: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns the shapes of their tensors, ordered by ours, so that each of ours is read once."""
    order = {path: number for number, path in enumerate(ours)}
    rows = sorted(table, key=lambda row: order[row.pieces[0].path])
    shapes = {}
    for row in rows:
        parts = _part_shapes(row, ours)
        joined = (sum(part[0] for part in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]
        shapes[row.name] = joined
    return shapes


def _part_shapes(row: Entry, ours: Mapping[str, Shape]) -> list[Shape]:
    """Returns the shapes of the pieces in the other layout."""
    # The ellipsis makes an array, not a NumPy scalar, of an array without axes.
    hollow = (np.broadcast_to(np.float32(0), ours[piece.path]) for piece in row.pieces)
    return [row.form.theirs(array[*p.index, ...]).shape for array, p in zip(hollow, row.pieces)]


def export_tensors(table: Iterable[Entry], ours: Tensors) -> Tensors:
    """Returns our tensors in another format."""
    rows = {row.name: row for row in table}
    load = functools.lru_cache(maxsize=1)(lambda path: read_finite(ours, path))

    def read(name: str) -> np.ndarray:
        row = rows[name]
        parts = [row.form.theirs(load(piece.path)[*piece.index, ...]) for piece in row.pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return Tensors(their_shapes(rows.values(), ours.shapes), read)


def import_tensors(
    table: Iterable[Entry], theirs: Tensors, ours: Mapping[str, Shape], source: object
) -> Tensors:
    """Returns the tensors of another format as ours.

    Args:
      table: table of the format for this size of model.
      theirs: tensors of the file.
      ours: our shapes by path.
      source: file, for messages.

    Raises:
      UserError: a tensor is missing, superfluous, or of another shape.
    """
    table = list(table)
    check_shapes(theirs.shapes, their_shapes(table, ours), source)
    places = _places(table, ours)
    load = functools.lru_cache(maxsize=1)(lambda name: read_finite(theirs, name))

    def read(path: str) -> np.ndarray:
        whole = np.empty(ours[path], load(places[path][0][0].name).dtype)
        for row, part, index in places[path]:
            whole[index] = row.form.ours(load(row.name)[part], whole[index].shape)
        return whole

    return Tensors(ours, read)


def _places(table: Iterable[Entry], ours: Mapping[str, Shape]) -> dict[str, list[tuple]]:
    """Returns, by path of ours, its entries, the rows of each, and their index in ours."""
    places: dict[str, list[tuple]] = {}
    for row in table:
        if len(row.pieces) == 1:
            parts: list[Any] = [...]
        else:
            lengths = [shape[0] for shape in _part_shapes(row, ours)]
            ends = list(itertools.accumulate(lengths))
            parts = [slice(end - length, end) for end, length in zip(ends, lengths)]
        for piece, part in zip(row.pieces, parts):
            places.setdefault(piece.path, []).append((row, part, piece.index))
    return places
