"""Ranks in tiles against a loop over all pairs in float64."""

import jax
import numpy as np
import pytest

from clip_jax.evaluate.measures import ranks

TILE = (128, 128)  # the smallest: a few hundred rows make several


def small_integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Embeddings whose products are exact in float32, and often equal."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def some_pairs(rng: np.random.Generator, images: int, texts: int, count: int) -> np.ndarray:
    pairs = np.stack([rng.integers(0, images, count), rng.integers(0, texts, count)], axis=1)
    return rng.permutation(np.unique(pairs, axis=0))


def captioned(images: int, captions: int) -> np.ndarray:
    """The pairs of images that have so many captions each, in order."""
    texts = np.arange(images * captions)
    return np.stack([texts // captions, texts], axis=1)


def reference(images: np.ndarray, texts: np.ndarray, pairs: np.ndarray) -> list[list[int]]:
    """Ranks of the images, then of the texts; one query, then one candidate at a time."""
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    found = []
    for table, links in ((scores, pairs), (scores.T, pairs[:, ::-1])):
        right: list[set[int]] = [set() for _ in table]
        for query, candidate in links.tolist():
            right[query].add(candidate)
        ranked = []
        for row, own in zip(table, right):
            best = max((row[c] for c in own), default=-np.inf)
            ranked.append(sum(row[c] >= best for c in range(len(row)) if c not in own))
        found.append(ranked)
    return found


@pytest.mark.parametrize(
    ("images", "texts", "count"),
    [(37, 50, 60), (300, 1100, 3000), (129, 257, 1), (1, 1, 1), (256, 128, 900)],
)
def test_ranks_equal_the_loop(images, texts, count, mesh):
    """Several right ones each way or none, many ties, ragged ends, pairs in any order."""
    rng = np.random.default_rng(0)
    arrays = small_integers(rng, images, 3), small_integers(rng, texts, 3)
    pairs = some_pairs(rng, images, texts, count)
    found = ranks.match_ranks(*arrays, pairs, mesh, tile=TILE)
    for actual, wanted in zip(found, reference(*arrays, pairs), strict=True):
        assert actual.dtype == np.int32
        np.testing.assert_array_equal(actual, wanted)
    if images > 1:
        scores = arrays[0] @ arrays[1].T
        assert len(np.unique(scores)) < scores.size / 10  # there were ties


def test_five_captions_each_as_half_numbers_in_a_file(mesh, tmp_path):
    rng = np.random.default_rng(1)
    mapped = []
    for name, count in (("images", 260), ("texts", 1300)):
        np.save(tmp_path / f"{name}.npy", small_integers(rng, count, 3).astype(np.float16))
        mapped.append(np.load(tmp_path / f"{name}.npy", "r"))
    pairs = captioned(260, 5)
    found = ranks.match_ranks(*mapped, pairs, mesh, tile=TILE)
    for actual, wanted in zip(found, reference(*mapped, pairs), strict=True):
        np.testing.assert_array_equal(actual, wanted)
    whole = ranks.match_ranks(*mapped, pairs, mesh)  # in one tile
    for one, another in zip(found, whole):
        np.testing.assert_array_equal(one, another)


def test_equal_embeddings_tie_wherever_they_stand(mesh):
    """A few vectors of real width, each many times, in all places of several tiles."""
    rng = np.random.default_rng(2)
    kinds = rng.normal(size=(2, 7, 96)).astype(np.float32)
    image_kind, text_kind = rng.integers(0, 7, 300), rng.integers(0, 7, 700)
    pairs = some_pairs(rng, 300, 700, 800)
    arrays = kinds[0][image_kind], kinds[1][text_kind]
    found = ranks.match_ranks(*arrays, pairs, mesh, tile=TILE)
    # Whole numbers in the order of the products say the same without rounding.
    products = kinds[0].astype(np.float64) @ kinds[1].astype(np.float64).T
    places = products.reshape(-1).argsort().argsort().reshape(7, 7)
    exact = places[image_kind].astype(np.float64), np.eye(7)[text_kind]
    for actual, wanted in zip(found, reference(*exact, pairs), strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_a_collapsed_or_broken_model_is_the_worst(mesh):
    pairs = captioned(200, 2)
    for value in (0.1, np.nan):
        same = [np.full((count, 96), value, np.float32) for count in (200, 400)]
        to_text, to_image = ranks.match_ranks(*same, pairs, mesh, tile=TILE)
        assert set(to_text.tolist()) == {398}
        assert set(to_image.tolist()) == {199}


def test_one_embedding_that_is_not_a_number(mesh1):
    eye = np.eye(8, dtype=np.float32)
    broken = eye.copy()
    broken[3] = np.nan
    pairs = np.stack([np.arange(8)] * 2, axis=1)
    to_text, to_image = ranks.match_ranks(broken, eye, pairs, mesh1, tile=TILE)
    assert to_text.tolist() == [0, 0, 0, 7, 0, 0, 0, 0]
    # It comes before each right image, and text 3 has no other.
    assert to_image.tolist() == [1, 1, 1, 7, 1, 1, 1, 1]


def test_nothing_is_larger_than_a_tile(mesh, monkeypatch):
    """Arguments, results and temporaries of all programs are at most a tile."""
    rng, seen, tile = np.random.default_rng(4), {}, (512, 128)
    programs = ranks._programs(mesh)

    def watch(name, program):
        def run(*arguments):
            found = program(*arguments)
            shapes = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(found)]
            seen.setdefault(name, (program, arguments, shapes))
            return found

        return run

    watched = [watch(name, program) for name, program in programs._asdict().items()]
    monkeypatch.setattr(ranks, "_programs", lambda _: ranks._Programs(*watched))
    arrays = small_integers(rng, 1000, 3), small_integers(rng, 3000, 3)
    pairs = captioned(1000, 3)
    ranks.match_ranks(*arrays, pairs, mesh, tile=tile)
    assert set(seen) == {"product", "pick", "count", "gather"}
    assert seen["product"][2] == [tile]
    for name, (program, arguments, shapes) in seen.items():
        assert max(np.prod(shape) for shape in shapes) <= np.prod(tile), name
        assert max(np.size(x) for x in arguments) <= np.prod(tile) * mesh.size, name
        needed = program.lower(*arguments).compile().memory_analysis()
        assert needed.temp_size_in_bytes <= 4 * np.prod(tile), name


def test_progress_reaches_its_total(mesh1):
    rng, calls = np.random.default_rng(5), []
    arrays = small_integers(rng, 300, 3), small_integers(rng, 520, 3)
    pairs = np.array([[0, 0], [1, 1], [299, 519]])  # in two of the 3 x 5 tiles
    ranks.match_ranks(*arrays, pairs, mesh1, tile=TILE, progress=lambda *call: calls.append(call))
    assert calls == [(done, 17) for done in range(1, 18)]
