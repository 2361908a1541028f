"""Zero-shot and retrieval against float64 loops, scikit-learn and exact chances."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import Mesh
from ml_collections import ConfigDict
from sklearn import metrics as sklearn_metrics

from clip_jax import models, sharding
from clip_jax.data import tokenizer as tokenizers
from clip_jax.data.captions import Captions
from clip_jax.data.sources import Example
from clip_jax.errors import BadExample, UserError
from clip_jax.evals import Encoder, Evaluators, Retrieval, Zeroshot, retrieval, zeroshot

SIDE, WIDTH = 4, 8  # of the stub's images and embeddings


class Table:
    """A `CLIP` that looks its embeddings up: image and text i have row i of a table."""

    @dataclasses.dataclass
    class size:
        image_size = SIDE
        image_crop = "center"
        context_length = 3

    def apply(self, variables, values, method):
        if method == "encode_image":
            assert values.dtype == jnp.uint8
            pixels = values[:, 0, 0].astype(jnp.int32)
            return variables["images"][pixels[:, 0] * 256 + pixels[:, 1]]
        assert method == "encode_text"
        return variables["texts"][values[:, 1]]


class Likelihoods:
    """A model without a text tower: image i and text t have the score of that place in a table."""

    size = Table.size

    def score(self):
        raise AssertionError("called by name only")

    def apply(self, variables, pixels, prompts, method):
        assert method == "score"
        assert pixels.dtype == jnp.uint8
        numbers = pixels[:, 0, 0].astype(jnp.int32)
        images = numbers[:, 0] * 256 + numbers[:, 1]
        return variables["scores"][images[:, None], prompts.tokens[:, 1]]


class Words:
    """A tokenizer: each text has the number of its place in a list."""

    context_length = 3
    vocab_size = 1000

    def __init__(self, texts=()):
        self.texts = list(dict.fromkeys(texts))

    def encode(self, text: str) -> tuple[np.ndarray, bool]:
        if not text.strip():
            return np.array([998, 999, 0], np.int32), False
        return np.array([998, self.texts.index(text), 999], np.int32), False

    def __call__(self, texts) -> np.ndarray:
        self.texts += [text for text in texts if text not in self.texts]
        return np.stack([self.encode(text)[0] for text in texts])

    def is_empty(self, ids) -> bool:
        return ids[1] == 999

    def decode(self, ids) -> str:
        return self.texts[ids[1]]


class Cards:
    """Example i shows the number i; a text of None is an unreadable image, a tuple of texts several
    captions."""

    templates = ("a {}", "the {}")

    def __init__(self, texts, labels=None, class_names=()):
        self.texts, self.class_names = texts, tuple(class_names)
        self.labels = [-1] * len(texts) if labels is None else labels

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Example:
        if self.texts[index] is None:
            raise BadExample("unreadable image", f"card {index}")
        texts = self.texts[index]
        texts = (texts,) if isinstance(texts, str) else texts
        return Example(
            image=np.full((SIDE, SIDE, 3), [index // 256, index % 256, 0], np.uint8),
            captions=Captions(texts, (1.0,) * len(texts)),
            labels=(int(self.labels[index]),) if self.labels[index] >= 0 else (),
            key=f"card {index}",
        )


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def stub(images: np.ndarray, texts: np.ndarray, scale: float = 10.0) -> dict:
    """Variables of a `Table`."""
    params = {"logit_scale": jnp.log(jnp.float32(scale))}
    return {"images": jnp.asarray(images), "texts": jnp.asarray(texts), "params": params}


@pytest.fixture(scope="module")
def mesh1() -> Mesh:
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


@pytest.fixture(params=["one", "eight"])
def mesh(request, mesh1, mesh8) -> Mesh:
    return mesh1 if request.param == "one" else mesh8


def encoder(mesh: Mesh, batch_size: int = 16) -> Encoder:
    return Encoder(Table(), mesh, batch_size, threads=2)


# Zero-shot classification

CLASS_NAMES = ("zero|none", "one", "two|pair|couple", "three", "four", "five", "six")


@dataclasses.dataclass
class Task:
    """A labelled set of 37 images, which no batch divides; two unlabelled, one unreadable."""

    source: Cards
    used: np.ndarray  # of the images, those that count
    labels: np.ndarray  # of those
    images: np.ndarray
    texts: np.ndarray


@pytest.fixture(scope="module")
def task() -> Task:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 37)  # class 6 has no example
    labels[[3, 36]] = -1
    texts: list[str | None] = ["a picture"] * 37
    texts[20] = None
    used = np.array([i for i in range(37) if i not in (3, 20, 36)])
    source = Cards(texts, labels, CLASS_NAMES)
    return Task(source, used, labels[used], unit(rng, 37, WIDTH), unit(rng, 64, WIDTH))


def reference_probabilities(task: Task, words: Words, scale: float) -> np.ndarray:
    """float64 [images used, classes]: the definition, a loop at a time."""
    centres = []
    for names in CLASS_NAMES:
        vectors = [
            task.texts[words.texts.index(template.replace("{}", name))].astype(np.float64)
            for name in names.split("|")
            for template in Cards.templates
        ]
        mean = sum(vectors) / len(vectors)
        centres.append(mean / math.sqrt(sum(mean * mean)))
    rows = []
    for i in task.used:
        odds = [math.exp(scale * float(task.images[i] @ centre)) for centre in centres]
        rows.append([value / sum(odds) for value in odds])
    return np.array(rows)


def test_zeroshot_equals_the_definition(task, mesh):
    words = Words()
    found = Zeroshot(encoder(mesh), task.source, words).run(stub(task.images, task.texts))
    assert len(words.texts) == 2 * 10  # every name in every template
    wanted = reference_probabilities(task, words, scale=10.0)
    predicted = wanted.argmax(axis=1)
    classes = range(len(CLASS_NAMES))
    assert found.n == 34
    assert found.class_names == tuple(names.split("|")[0] for names in CLASS_NAMES)
    assert found.templates == Cards.templates
    np.testing.assert_array_equal(
        found.confusion,
        sklearn_metrics.confusion_matrix(task.labels, predicted, labels=classes),
    )
    top1, top5 = (
        sklearn_metrics.top_k_accuracy_score(task.labels, wanted, k=k, labels=classes)
        for k in (1, 5)
    )
    assert 0 < top1 < top5 < 1
    assert found.top1 == pytest.approx(top1, abs=1e-12)
    assert found.top5 == pytest.approx(top5, abs=1e-12)
    recall = sklearn_metrics.recall_score(
        task.labels, predicted, labels=classes, average=None, zero_division=np.nan
    )
    np.testing.assert_allclose(found.per_class, recall)
    assert np.isnan(found.per_class[6])


def test_zeroshot_by_the_likelihood_of_prompts(task, mesh):
    words, table = Words(), np.random.default_rng(5).normal(-20, 3, (37, 64)).astype(np.float32)
    encoder = Encoder(Likelihoods(), mesh, 16, threads=2)
    found = Zeroshot(encoder, task.source, words).run({"scores": jnp.asarray(table), "params": {}})
    wanted = []
    for i in task.used:
        likely = [
            np.mean(
                [
                    math.exp(table[i, words.texts.index(template.replace("{}", name))])
                    for name in names.split("|")
                    for template in Cards.templates
                ]
            )
            for names in CLASS_NAMES
        ]
        wanted.append(np.array(likely) / sum(likely))
    predicted = np.argmax(wanted, axis=1)
    np.testing.assert_array_equal(
        found.confusion,
        sklearn_metrics.confusion_matrix(task.labels, predicted, labels=range(len(CLASS_NAMES))),
    )
    assert found.by_score
    assert 0 < found.top1 < found.top5 < 1
    wrong = np.flatnonzero(predicted != task.labels)
    best = max(np.max(wanted[i]) for i in wrong)
    assert found.mistakes[0].probability == pytest.approx(best, rel=1e-4)


def test_zeroshot_lists_the_most_confident_mistakes(task, mesh):
    words = Words()
    found = Zeroshot(encoder(mesh), task.source, words).run(stub(task.images, task.texts))
    wanted = reference_probabilities(task, words, scale=10.0)
    predicted, best = wanted.argmax(axis=1), wanted.max(axis=1)
    wrong = np.flatnonzero(predicted != task.labels)
    worst = sorted(wrong, key=lambda i: -best[i])[: len(found.mistakes)]
    assert 0 < len(found.mistakes) <= 12
    short = [names.split("|")[0] for names in CLASS_NAMES]
    for mistake, i in zip(found.mistakes, worst, strict=True):
        assert mistake.probability == pytest.approx(best[i], rel=1e-4)
        assert (mistake.true, mistake.predicted) == (short[task.labels[i]], short[predicted[i]])
        np.testing.assert_array_equal(mistake.image, task.source[int(task.used[i])].image)


def test_zeroshot_takes_the_configs_names_before_the_sources(task, mesh1):
    words = Words()
    names, templates = ("x", "y", "z", "u", "v", "w"), ("one {} only",)
    found = Zeroshot(encoder(mesh1), task.source, words, names, templates).run(
        stub(task.images, task.texts)
    )
    assert words.texts == [f"one {name} only" for name in names]
    assert (found.class_names, found.templates) == (names, templates)


def test_top5_is_left_out_where_it_means_nothing(mesh1):
    rng = np.random.default_rng(1)
    source = Cards(["x"] * 9, rng.integers(0, 5, 9), "abcde")
    found = Zeroshot(encoder(mesh1), source, Words()).run(
        stub(unit(rng, 9, WIDTH), unit(rng, 10, WIDTH))
    )
    assert found.top5 is None
    assert found.confusion.sum() == 9


def test_class_prompts_by_hand():
    prompts, owners = zeroshot.class_prompts(["cat|kitten", "dog"], ["a {}.", "{}"])
    assert prompts == ["a cat.", "cat", "a kitten.", "kitten", "a dog.", "dog"]
    assert owners.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (("cat",), ("a photo",), "'a photo'.*exactly one"),
        (("cat",), ("{} and {}",), "exactly one"),
        ((), ("a {}",), "eval.zeroshot.class_names"),
        (("cat",), (), "eval.zeroshot.templates"),
    ],
)
def test_class_prompts_refuses(names, templates, message):
    with pytest.raises(UserError, match=message):
        zeroshot.class_prompts(names, templates)


@pytest.mark.parametrize("template", ["a {0}", "{name}", "a {} in {0}", "a {} {"])
def test_class_prompts_with_other_braces(template):
    """Either a sentence about the template, or prompts with the name in it; no other error."""
    try:
        prompts, _ = zeroshot.class_prompts(["cat"], [template])
    except UserError as error:
        assert template in str(error)  # noqa: PT017
    else:
        assert prompts == [template.replace("{}", "cat")]


def test_zeroshot_without_labels(mesh1):
    variables = stub(np.eye(WIDTH, dtype=np.float32), np.eye(WIDTH, dtype=np.float32))
    source = Cards(["x"] * 5, None, ("a", "b"))
    with pytest.raises(UserError, match="label_key"):
        Zeroshot(encoder(mesh1), source, Words()).run(variables)


def test_zeroshot_with_a_label_beyond_the_class_names(mesh1):
    variables = stub(np.eye(WIDTH, dtype=np.float32), np.eye(WIDTH, dtype=np.float32))
    source = Cards(["x"] * 5, [0, 1, 0, 2, 1], ("a", "b"))
    with pytest.raises(UserError, match="label 2, but only 2 class names"):
        Zeroshot(encoder(mesh1), source, Words()).run(variables)


# Retrieval


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


# With a real model and the embedded data


@pytest.fixture(scope="module")
def tiny():
    """A config and its model with random weights."""
    config = tiny_run.config({"eval.batch_size": 100, "eval.retrieval.max_examples": 150})
    net = models.create("ViT-B/32", size=config.model.size.to_dict())
    images = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    tokens = jnp.zeros((1, 24), jnp.int32)
    variables = jax.jit(net.init)(jax.random.key(3), images, tokens)
    # Far from its initialisation, where all images look alike to it.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (1 if "logit_scale" in jax.tree_util.keystr(path) else 3),
        variables,
    )
    return config, net, variables


def run_evaluators(config: ConfigDict, net, variables, mesh: Mesh):
    variables = jax.device_put(variables, sharding.replicated(mesh))
    evaluators = Evaluators(config, net, mesh, tokenizers.create("openai", 24))
    return evaluators, evaluators.run(variables)


@pytest.fixture(scope="module")
def on_eight(tiny, mesh8):
    return run_evaluators(*tiny, mesh8)


def test_evaluators_on_one_device_and_on_eight(tiny, mesh1, on_eight):
    (one, found1), (eight, found8) = run_evaluators(*tiny, mesh1), on_eight
    directions = ("image_to_text", "text_to_image")
    assert set(found1) == {"zeroshot/top1", "zeroshot/top5"} | {
        f"retrieval/{way}/recall@{k}" for way in directions for k in (1, 5, 10)
    }
    assert found1 == pytest.approx(found8, abs=0.01)  # a rounding may swap two neighbours
    assert one.zeroshot.n == eight.zeroshot.n == 360
    assert np.abs(one.zeroshot.confusion - eight.zeroshot.confusion).sum() <= 4
    assert found1["zeroshot/top1"] == one.zeroshot.top1
    assert (
        found1["retrieval/text_to_image/recall@5"]
        == one.retrieval.metrics["text_to_image/recall@5"]
    )


def test_evaluators_agree_with_the_module_applied_by_hand(tiny, on_eight):
    _, net, variables = tiny
    evaluators, found = on_eight
    source = evaluators._zeroshot._source
    examples = [source[i] for i in range(len(source))]
    encode_image, encode_text = (
        jax.jit(lambda values, method=method: net.apply(variables, values, method=method))
        for method in ("encode_image", "encode_text")
    )
    images = encode_image(np.stack([example.image for example in examples]))
    tokens = tokenizers.create("openai", 24)
    centres = []
    for names in source.class_names:
        prompts = [t.format(name) for name in names.split("|") for t in source.templates]
        embeds = np.asarray(encode_text(tokens(prompts)), np.float64)
        centres.append(embeds.mean(axis=0))
    classes = np.stack(centres)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    predicted = (np.asarray(images, np.float64) @ classes.T).argmax(axis=1)
    labels = [example.label for example in examples]
    assert len(set(predicted)) > 3
    assert found["zeroshot/top1"] == pytest.approx(
        sklearn_metrics.accuracy_score(labels, predicted), abs=1 / 360
    )


def test_evaluators_that_are_switched_off(tiny, mesh1):
    config, net, variables = tiny
    config = config.copy_and_resolve_references()
    config.eval.zeroshot.source.type = ""
    config.eval.retrieval.source.type = ""
    evaluators, found = run_evaluators(config, net, variables, mesh1)
    assert found == {}
    assert evaluators.zeroshot is evaluators.retrieval is None
