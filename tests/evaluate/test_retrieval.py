"""Retrieval against Python's sort and exact chances."""

import math
from fractions import Fraction

import numpy as np
import pytest
from lookup import Cards, Words, encoder, stub

from clip_jax.errors import UserError
from clip_jax.evaluate import retrieval
from clip_jax.evaluate.retrieval import Retrieval


def reference_ranks(queries, query_group, candidates, candidate_group) -> list[int]:
    """Place of the first right candidate when each query sorts all of them, by Python's sort."""
    ranks = []
    for query, group in zip(queries.astype(np.float64), query_group):
        scores = candidates.astype(np.float64) @ query
        right = candidate_group == group
        # Of equal scores the wrong ones come first.
        ordered = sorted(range(len(scores)), key=lambda c: (-scores[c], right[c]))
        ranks.append(next(place for place, c in enumerate(ordered) if right[c]))
    return ranks


def small_integers(rng, *shape: int) -> np.ndarray:
    """Embeddings whose products are exact in float32, and often equal."""
    return rng.integers(-2, 3, shape).astype(np.float32)


CAPTIONS = ["red", "green", "blue", "black", "white", "pink", "grey"]


@pytest.fixture(scope="module")
def captioned() -> tuple[Cards, np.ndarray, np.ndarray]:
    """41 images with 7 captions and 19 of their own; one has none, one is unreadable."""
    rng = np.random.default_rng(3)
    texts = [CAPTIONS[i] for i in rng.integers(0, 7, 22)] + [f"number {i}" for i in range(19)]
    rng.shuffle(texts)
    texts = [str(text) for text in texts]
    texts[5], texts[11] = None, "  "
    return Cards(texts), small_integers(rng, 41, 4), small_integers(rng, 64, 4)


def retrieve(source: Cards, images, texts, mesh, limit=None):
    words = Words(filter(None, source.texts))
    found = Retrieval(encoder(mesh), source, words, limit).run(stub(images, texts))
    return found, words


def test_retrieval_with_several_captions_equals_the_definition(mesh):
    """Five each, as COCO and Flickr30k have; some shared, some repeated, some empty."""
    rng = np.random.default_rng(4)
    texts: list = [tuple(f"caption {5 * i + k}" for k in range(5)) for i in range(31)]
    texts[3] = ("caption 3", "caption 3", " ", "caption 40")
    texts[7], texts[9], texts[11] = None, (), ("caption 44", " ")
    images, table = small_integers(rng, 31, 4), small_integers(rng, 155, 4)
    words = Words(f"caption {i}" for i in range(155))
    found = Retrieval(encoder(mesh), Cards(texts), words, None).run(stub(images, table))
    used = [i for i in range(31) if i not in (7, 9)]
    owned = {i: {text for text in texts[i] if text.strip()} for i in used}
    captions = sorted(set.union(*owned.values()), key=words.texts.index)
    assert len(captions) == 27 * 5  # 7 and 9 have none, 3 and 11 those of others
    embeds = table[[words.texts.index(caption) for caption in captions]]
    ranks: dict[str, list[int]] = {"image_to_text": [], "text_to_image": []}
    for i in used:
        own = np.array([caption in owned[i] for caption in captions])
        scores = embeds @ images[i]
        ranks["image_to_text"].append(int(np.sum(~own & (scores >= scores[own].max()))))
    for caption, embed in zip(captions, embeds):
        own = np.array([caption in owned[i] for i in used])
        scores = images[used] @ embed
        ranks["text_to_image"].append(int(np.sum(~own & (scores >= scores[own].max()))))
    sizes = {
        "image_to_text": (len(captions), [len(owned[i]) for i in used]),
        "text_to_image": (len(used), [sum(c in owned[i] for i in used) for c in captions]),
    }
    for way, places in ranks.items():
        candidates, matches = sizes[way]
        for k in (1, 5, 10):
            share = sum(place < k for place in places) / len(places)
            assert found.metrics[f"{way}/recall@{k}"] == pytest.approx(share, abs=1e-9)
            wanted = np.mean([float(exact_chance(candidates, m, k)) for m in matches])
            assert found.chance[f"{way}/recall@{k}"] == pytest.approx(wanted)
    assert 0 < found.metrics["text_to_image/recall@1"] < found.metrics["image_to_text/recall@10"]
    for row in found.gallery:
        shown = [int(image[0, 0, 0]) * 256 + int(image[0, 0, 1]) for image in row.images]
        assert row.hits == [row.query in owned[i] for i in shown]


@pytest.mark.parametrize("limit", [None, 30, 1000])
def test_retrieval_equals_the_definition(captioned, mesh, limit):
    source, images, table = captioned
    found, words = retrieve(source, images, table, mesh, limit)
    used = [i for i in range(min(limit or 41, 41)) if i not in (5, 11)]
    captions = sorted({source.texts[i] for i in used}, key=words.texts.index)
    assert len(captions) < len(used)
    group = np.array([captions.index(source.texts[i]) for i in used])
    texts = table[[words.texts.index(caption) for caption in captions]]
    numbers = np.arange(len(captions))
    ranks = {
        "image_to_text": reference_ranks(images[used], group, texts, numbers),
        "text_to_image": reference_ranks(texts, numbers, images[used], group),
    }
    assert set(found.metrics) == {f"{way}/recall@{k}" for way in ranks for k in (1, 5, 10)}
    assert set(found.chance) == set(found.metrics)
    for way, places in ranks.items():
        for k in (1, 5, 10):
            share = sum(place < k for place in places) / len(places)
            assert found.metrics[f"{way}/recall@{k}"] == pytest.approx(share, abs=1e-9)
    assert 0 < found.metrics["text_to_image/recall@1"] < found.metrics["text_to_image/recall@10"]
    # What chance reaches, too, counts every caption once.
    sizes = np.bincount(group)
    wanted = np.mean([float(exact_chance(len(used), int(m), 5)) for m in sizes])
    assert found.chance["text_to_image/recall@5"] == pytest.approx(wanted)
    wanted = float(exact_chance(len(captions), 1, 5))
    assert found.chance["image_to_text/recall@5"] == pytest.approx(wanted)


def test_gallery_shows_the_nearest_images(captioned, mesh):
    source, images, table = captioned
    found, words = retrieve(source, images, table, mesh)
    used = [i for i in range(41) if i not in (5, 11)]
    assert len(found.gallery) == 12
    assert len({row.query for row in found.gallery}) == 12
    for row in found.gallery:
        text = table[words.texts.index(row.query)]
        # Which of several images of one score comes first is open; the scores are not.
        scores = sorted((images[i] @ text for i in used), reverse=True)[:5]
        shown = [int(image[0, 0, 0]) * 256 + int(image[0, 0, 1]) for image in row.images]
        assert [float(images[i] @ text) for i in shown] == [float(score) for score in scores]
        assert row.hits == [source.texts[i] == row.query for i in shown]


def test_perfect_retrieval(mesh):
    eye = np.eye(24, dtype=np.float32)
    found, _ = retrieve(Cards([f"text {i}" for i in range(24)]), eye, eye, mesh)
    assert set(found.metrics.values()) == {1.0}
    assert all(row.hits[0] and not any(row.hits[1:]) for row in found.gallery)


def test_retrieval_without_a_usable_example(mesh1):
    eye = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match="no usable image"):
        retrieve(Cards([None, "", " "]), eye, eye, mesh1)


def exact_chance(candidates: int, matches: int, k: int) -> Fraction:
    """That k of the candidates, drawn without replacement, have a match among them."""
    drawn = min(k, candidates)
    missed = Fraction(math.comb(candidates - matches, drawn), math.comb(candidates, drawn))
    return 1 - missed


@pytest.mark.parametrize(
    ("candidates", "matches"),
    [(50, [1]), (50, [3, 1, 7]), (12, [12, 3, 5]), (4, [1, 2]), (10, [1]), (1, [1])],
)
def test_chance_equals_the_hypergeometric_formula(candidates, matches):
    actual = retrieval.chance("x", np.array(matches), candidates)
    assert list(actual) == ["x/recall@1", "x/recall@5", "x/recall@10"]
    for k in (1, 5, 10):
        wanted = [float(exact_chance(candidates, m, k)) for m in matches]
        assert actual[f"x/recall@{k}"] == pytest.approx(np.mean(wanted), abs=1e-12)
