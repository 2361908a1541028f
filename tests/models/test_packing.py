"""Packed captions: where they lie, and that embeddings and gradients are those of unpacked ones."""

import functools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import models, sharding
from clip_jax.errors import UserError
from clip_jax.models import packing

CONTEXT, VOCAB, LENGTH = 9, 50, 11
SIZE = {
    "text_width": 16,
    "text_heads": 2,
    "text_layers": 2,
    "context_length": CONTEXT,
    "vocab_size": VOCAB,
    "embed_dim": 12,
    "image_size": 8,
    "image_layers": (1,),
    "image_width": 8,
    "image_heads": 2,
    "patch_size": 8,
}
# Relative, by norm; seen: 5e-7. Only the order of sums differs.
TOLERANCE = 2e-6


def make_tokens(lengths, context: int = CONTEXT, vocab: int = VOCAB) -> np.ndarray:
    """Captions of these lengths, end token included, padded with zeros."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(lengths), context), np.int32)
    for row, length in zip(tokens, lengths):
        row[:length] = rng.integers(1, vocab - 2, length)
        row[0], row[length - 1] = vocab - 2, vocab - 1
    return tokens


# ---- Where captions lie ------------------------------------------------------------------------


def first_fit(lengths, length: int) -> list[list[int]]:
    """Numbers of the captions in each row, the longest first, written as one would on paper."""
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[number] <= length:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


def packed_rows(tokens: np.ndarray, length: int) -> packing.Rows:
    """All rows there can be."""
    places = packing.place(jnp.asarray(tokens), length)
    count = packing.rows_needed(*tokens.shape, length)
    rows = packing.fill(jnp.asarray(tokens), places, 0, count, length)
    return jax.tree.map(np.asarray, rows)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.slow
def test_every_caption_lies_in_one_place(seed: int):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(CONTEXT, 4 * CONTEXT))
    lengths = rng.integers(2, rng.integers(3, CONTEXT + 1) + 1, rng.integers(1, 40)).tolist()
    tokens = make_tokens(lengths)
    rows, wanted = packed_rows(tokens, length), first_fit(lengths, length)
    assert len(wanted) <= len(rows.ids)
    for row in range(len(rows.ids)):
        numbers = wanted[row] if row < len(wanted) else []
        ids = [i for number in numbers for i in tokens[number, : lengths[number]]]
        captions = [1 + number for number in numbers for _ in range(lengths[number])]
        positions = [i for number in numbers for i in range(lengths[number])]
        for found, expected in zip(rows, (ids, positions, captions)):
            np.testing.assert_array_equal(found[row], expected + [0] * (length - len(expected)))


@pytest.mark.parametrize(("length", "rows"), [(9, 10), (17, 10), (18, 5), (26, 5), (27, 4)])
def test_the_longest_captions_fit(length: int, rows: int):
    tokens = make_tokens([CONTEXT] * 10)
    assert packing.rows_needed(10, CONTEXT, length) == rows
    places = packing.place(jnp.asarray(tokens), length)
    assert int(places.row.max()) == rows - 1
    assert np.all(places.offset + places.length <= length)


def test_rows_from_the_middle():
    """A round fills its rows as if all rows were filled."""
    tokens = make_tokens([5, 9, 3, 7, 2, 4, 9])
    whole, places = packed_rows(tokens, LENGTH), packing.place(jnp.asarray(tokens), LENGTH)
    part = packing.fill(jnp.asarray(tokens), places, 2, 2, LENGTH)
    for found, expected in zip(part, whole):
        np.testing.assert_array_equal(found, expected[2:4])


def test_mask_is_causal_within_a_caption():
    captions = np.array([[1, 1, 2, 2, 2, 0, 0]])
    mask = np.asarray(packing.attention_mask(jnp.asarray(captions)))
    assert mask.shape == (1, 1, 7, 7)
    for query in range(7):
        seen = [key for key in range(query + 1) if captions[0, key] == captions[0, query]]
        np.testing.assert_array_equal(np.flatnonzero(mask[0, 0, query]), seen)


# ---- Same result -------------------------------------------------------------------------------

CAPTIONS = {
    "short": [3] * 16,
    "full": [CONTEXT] * 16,
    "mixed": [3, 9, 4, 4, 7, 2, 5, 3, 3, 9, 2, 6, 3, 4, 8, 2],
    "long first": [9, 9, 8, 9, 9, 7, 9, 9] + [2] * 8,
}
TOKENS = make_tokens(CAPTIONS["mixed"])


@functools.cache
def make_params() -> dict:
    """Random ones; biases too."""
    net, image = models.create("ViT-B/32", size=SIZE), np.zeros((1, 8, 8, 3), np.uint8)
    shapes = jax.eval_shape(net.init, jax.random.key(0), image, make_tokens([3]))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)


@functools.cache
def make_step(pack: tuple | None, **options):
    """(params, tokens, weights) -> gradients of weighted text embeddings, and these."""
    pack = pack and dict(zip(("length", "rows"), pack))
    net = models.create("ViT-B/32", size=SIZE, packing=pack, **options)

    def loss_fn(params, tokens, weights):
        embeds = net.apply({"params": params}, tokens, train=True, method="encode_text")
        return jnp.sum(embeds * weights), embeds

    return jax.jit(jax.grad(loss_fn, has_aux=True))


def embeds_and_grads(lengths, pack: tuple | None, mesh=None, **options):
    """Text embeddings and the gradients of the text tower, from the same parameters.

    `pack` is (length, rows).
    """
    params, step = make_params(), make_step(pack, **options)
    weights = np.random.default_rng(2).normal(size=(len(lengths), 12)).astype(np.float32)
    batch = make_tokens(lengths), weights
    if mesh is None:
        grads, embeds = step(params, *batch)
    else:
        with jax.set_mesh(mesh):
            params = jax.device_put(params, sharding.tree_shardings(params, mesh))
            grads, embeds = step(params, *jax.device_put(batch, sharding.batch_sharding(mesh)))
    return jax.device_get((embeds, grads["text"]))


def assert_equal(actual, expected):
    """Each array by the norm of the difference."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, got), want in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        difference = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert difference < TOLERANCE, f"{sharding.path_name(path)}: {difference:.1e}"


@pytest.fixture(scope="module")
def unpacked():
    return {name: embeds_and_grads(lengths, None) for name, lengths in CAPTIONS.items()}


def rounds(lengths, rows: float) -> int:
    return math.ceil(len(first_fit(lengths, LENGTH)) / math.ceil(rows * len(lengths)))


@pytest.mark.parametrize(
    ("name", "rows", "taken"),
    [("short", 0.4, 1), ("short", 0.2, 2), ("mixed", 0.6, 1), ("mixed", 0.1, 4), ("full", 1.0, 1),
     ("full", 0.3, 4), ("long first", 0.4, 2), ("long first", 0.01, 8)],
)  # fmt: skip
def test_equals_unpacked(unpacked, name: str, rows: float, taken: int):
    assert rounds(CAPTIONS[name], rows) == taken
    pack = (LENGTH, rows)
    assert_equal(embeds_and_grads(CAPTIONS[name], pack), unpacked[name])


@pytest.mark.parametrize(("scan", "remat"), [(False, "none"), (True, "full"), (False, "full")])
@pytest.mark.slow
def test_equals_unpacked_unrolled_and_rematerialised(unpacked, scan: bool, remat: str):
    pack = (LENGTH, 0.3)
    actual = embeds_and_grads(CAPTIONS["mixed"], pack, scan_layers=scan, remat=remat)
    assert_equal(actual, unpacked["mixed"])


@pytest.mark.parametrize("name", CAPTIONS)
def test_equals_unpacked_on_devices(unpacked, mesh8, name: str):
    """Two captions a device, in one row each time: those with more take further rounds."""
    pack = (LENGTH, 0.5)
    assert_equal(embeds_and_grads(CAPTIONS[name], pack, mesh8), unpacked[name])


def test_equals_unpacked_on_a_tensor_mesh(unpacked):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    pack = (LENGTH, 0.3)
    assert_equal(embeds_and_grads(CAPTIONS["mixed"], pack, mesh), unpacked["mixed"])


def test_a_single_caption():
    pack = (LENGTH, 0.3)
    assert_equal(embeds_and_grads([5], pack), embeds_and_grads([5], None))


def test_not_packed_in_evaluation():
    """Compiles to the program without packing: embeddings do not depend on the setting."""
    text = []
    for pack in (None, {"length": LENGTH, "rows": 0.3}):
        net = models.create("ViT-B/32", size=SIZE, packing=pack)
        variables = jax.eval_shape(net.init, jax.random.key(0), np.zeros((16, 8, 8, 3)), TOKENS)
        lowered = jax.jit(partial(net.apply, method="encode_text")).lower(variables, TOKENS)
        text.append(lowered.as_text())
    assert text[0] == text[1]


# ---- Cost --------------------------------------------------------------------------------------


def compiled(pack: dict | None, lengths, mesh=None, **size):
    """The gradient of the text tower."""
    net = models.create("ViT-B/32", size=SIZE | size, packing=pack)
    tokens = make_tokens(lengths, net.size.context_length)
    image = np.zeros((1, 8, 8, 3), np.uint8)
    params = jax.eval_shape(net.init, jax.random.key(0), image, tokens[:1])["params"]

    def loss_fn(params, tokens):
        return net.apply({"params": params}, tokens, train=True, method="encode_text").sum()

    if mesh is None:
        return jax.jit(jax.grad(loss_fn)).lower(params, tokens).compile()
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss_fn), in_shardings=(whole, split), out_shardings=whole)
        return step.lower(params, tokens).compile()


def test_nothing_but_gradients_crosses_devices():
    mesh = sharding.make_mesh(data=8)
    program = compiled({"length": LENGTH, "rows": 0.5}, [4] * 32, mesh).as_text()
    kinds = set(
        re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)(?:-start)?\(", program)
    )
    assert kinds == {"all-reduce"}


@pytest.mark.slow
def test_memory_is_that_of_the_rows_of_one_round():
    """Rounds that are not taken keep nothing, although the program contains them."""
    size = {"context_length": 32, "text_width": 32, "text_layers": 6}
    plain, packed = (
        compiled(pack, [8] * 256, **size).memory_analysis().temp_size_in_bytes
        for pack in (None, {"length": 32, "rows": 0.25})
    )
    assert packed < 0.35 * plain


# ---- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "pack", "message"),
    [
        ({}, {"length": 8, "rows": 0.3}, r"model.packing.length is 8.*model.packing.length=9"),
        ({}, {"length": 11, "rows": 0.0}, r"model.packing.rows is 0.0.*up to 1"),
        ({}, {"length": 11, "rows": 1.5}, r"model.packing.rows is 1.5.*up to 1"),
        ({"text_causal": False}, {"length": 11, "rows": 0.3}, r"causal.*model.packing.length=0"),
        ({"text_pool": "last"}, {"length": 11, "rows": 0.3}, r"end token.*model.packing.length=0"),
    ],
)
def test_what_cannot_be_packed(size: dict, pack: dict, message: str):
    with pytest.raises(UserError, match=message):
        models.create("ViT-B/32", size=SIZE | size, packing=pack)


def test_length_zero_packs_nothing():
    net = models.create("ViT-B/32", size=SIZE | {"text_causal": False}, packing={"length": 0})
    assert net.packing is None


def test_a_batch_that_cannot_be_split(mesh8):
    step, weights = make_step((LENGTH, 0.5)), np.zeros((12, 12), np.float32)
    with (
        jax.set_mesh(mesh8),
        pytest.raises(ValueError, match="12 captions cannot be split over 8"),
    ):
        jax.eval_shape(step, make_params(), TOKENS[:12], weights)
