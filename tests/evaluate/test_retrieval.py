"""Retrieval against Python's sort and exact chances."""

import base64
import io
import math
from fractions import Fraction

import numpy as np
import pytest
from lookup import Cards, Words, encoder, evaluate, stub
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.evaluate.results import Result
from clip_jax.evaluate.tasks import retrieval


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


def retrieve(source: Cards, images, texts, mesh) -> tuple[Result, Words]:
    words = Words(filter(None, source.texts))
    return evaluate("retrieval", source, words, stub(images, texts), encoder(mesh)), words


def values(result: Result) -> dict[str, float]:
    return {score.metric: score.value for score in result.scores}


def chances(result: Result) -> dict[str, float | None]:
    return {score.metric: score.chance for score in result.scores}


def numbers_shown(row: dict) -> list[int]:
    """Numbers of the cards in a row of the gallery."""
    shown = []
    for image in row["images"]:
        data = base64.b64decode(image["src"].partition(";base64,")[2])
        red, green, _ = np.asarray(Image.open(io.BytesIO(data)))[0, 0]
        shown.append(int(red) * 256 + int(green))
    return shown


def test_retrieval_with_several_captions_equals_the_definition(mesh):
    """Five each, as COCO and Flickr30k have; some shared, some repeated, some empty."""
    rng = np.random.default_rng(4)
    texts: list = [tuple(f"caption {5 * i + k}" for k in range(5)) for i in range(31)]
    texts[3] = ("caption 3", "caption 3", " ", "caption 40")
    texts[7], texts[9], texts[11] = None, (), ("caption 44", " ")
    images, table = small_integers(rng, 31, 4), small_integers(rng, 155, 4)
    words = Words(f"caption {i}" for i in range(155))
    found = evaluate("retrieval", Cards(texts), words, stub(images, table), encoder(mesh))
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
            fraction = sum(place < k for place in places) / len(places)
            assert values(found)[f"{way}/recall@{k}"] == pytest.approx(fraction, abs=1e-9)
            wanted = np.mean([float(exact_chance(candidates, m, k)) for m in matches])
            assert chances(found)[f"{way}/recall@{k}"] == pytest.approx(wanted)
    assert 0 < values(found)["text_to_image/recall@1"] < values(found)["image_to_text/recall@10"]
    for row in found.details["gallery"]:
        assert row["hits"] == [row["query"] in owned[i] for i in numbers_shown(row)]


def test_retrieval_equals_the_definition(captioned, mesh):
    source, images, table = captioned
    found, words = retrieve(source, images, table, mesh)
    used = [i for i in range(41) if i not in (5, 11)]
    assert (found.details["images"], found.details["skipped"]) == (39, {"unusable example": 1})
    captions = sorted({source.texts[i] for i in used}, key=words.texts.index)
    assert len(captions) < len(used)
    group = np.array([captions.index(source.texts[i]) for i in used])
    texts = table[[words.texts.index(caption) for caption in captions]]
    numbers = np.arange(len(captions))
    ranks = {
        "image_to_text": reference_ranks(images[used], group, texts, numbers),
        "text_to_image": reference_ranks(texts, numbers, images[used], group),
    }
    assert set(values(found)) == {f"{way}/recall@{k}" for way in ranks for k in (1, 5, 10)}
    assert found.headline.metric == "text_to_image/recall@1"
    for way, places in ranks.items():
        for k in (1, 5, 10):
            fraction = sum(place < k for place in places) / len(places)
            assert values(found)[f"{way}/recall@{k}"] == pytest.approx(fraction, abs=1e-9)
    assert 0 < values(found)["text_to_image/recall@1"] < values(found)["text_to_image/recall@10"]
    # What chance reaches, too, counts every caption once.
    sizes = np.bincount(group)
    wanted = np.mean([float(exact_chance(len(used), int(m), 5)) for m in sizes])
    assert chances(found)["text_to_image/recall@5"] == pytest.approx(wanted)
    wanted = float(exact_chance(len(captions), 1, 5))
    assert chances(found)["image_to_text/recall@5"] == pytest.approx(wanted)


def test_gallery_shows_the_nearest_images(captioned, mesh):
    source, images, table = captioned
    found, words = retrieve(source, images, table, mesh)
    used = [i for i in range(41) if i not in (5, 11)]
    gallery = found.details["gallery"]
    assert len(gallery) == len({row["query"] for row in gallery}) == 12
    for row in gallery:
        text = table[words.texts.index(row["query"])]
        # Which of several images of one score comes first is open; the scores are not.
        scores = sorted((images[i] @ text for i in used), reverse=True)[:5]
        shown = numbers_shown(row)
        assert [float(images[i] @ text) for i in shown] == [float(score) for score in scores]
        assert row["hits"] == [source.texts[i] == row["query"] for i in shown]


def test_captions_behind_a_prompt_are_tried_too(mesh1):
    eye = np.eye(24, dtype=np.float32)
    words = Words([f"text {i}" for i in range(12)])
    words([f"a photo of text {11 - i}" for i in range(12)])  # embedded as if in reverse order
    table = np.concatenate([eye[:12], eye[:12]])
    source = Cards([f"text {i}" for i in range(12)])
    found = evaluate("retrieval", source, words, stub(eye[:12], table), encoder(mesh1), whole=True)
    recall = {s.variant: s.value for s in found.scores if s.metric == "text_to_image/recall@1"}
    assert recall == {"captions": 1.0, "captions behind a prompt": 0.0}
    assert found.details["prompt"] == "a photo of {}"


def test_perfect_retrieval(mesh):
    eye = np.eye(24, dtype=np.float32)
    found, _ = retrieve(Cards([f"text {i}" for i in range(24)]), eye, eye, mesh)
    assert set(values(found).values()) == {1.0}
    assert all(row["hits"][0] and not any(row["hits"][1:]) for row in found.details["gallery"])


@pytest.mark.parametrize(
    ("texts", "message"), [([None, None], "no usable image"), ([None, "", " "], "has a caption")]
)
def test_retrieval_without_a_usable_example(mesh1, texts, message):
    eye = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match=message):
        retrieve(Cards(texts), eye, eye, mesh1)


def exact_chance(candidates: int, matches: int, k: int) -> Fraction:
    """The probability of a match among k candidates drawn without replacement."""
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
