"""Zero-shot classification against float64 loops and scikit-learn."""

import base64
import dataclasses
import io
import json
import math
import tracemalloc
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from lookup import WIDTH, Cards, Likelihoods, Words, encoder, evaluate, stub, unit
from PIL import Image
from sklearn import metrics as sklearn_metrics

from clip_jax.embed.encoder import Encoder
from clip_jax.errors import UserError
from clip_jax.evaluate import confusion
from clip_jax.evaluate.confusion import Confusion
from clip_jax.evaluate.results import Result
from clip_jax.models.prompts import class_prompts

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
        weights = [math.exp(scale * float(task.images[i] @ centre)) for centre in centres]
        rows.append([value / sum(weights) for value in weights])
    return np.array(rows)


def confusions(result: Result) -> Confusion:
    return confusion.from_json(result.details["classes"])


def pixels(thumbnail) -> np.ndarray:
    data = thumbnail.src.partition(";base64,")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_zeroshot_equals_the_definition(task, mesh):
    words = Words()
    variables = stub(task.images, task.texts)
    result = evaluate("zeroshot", task.source, words, variables, encoder(mesh))
    found = confusions(result)
    assert len(words.texts) == 2 * 10  # every name in every template
    wanted = reference_probabilities(task, words, scale=10.0)
    predicted = wanted.argmax(axis=1)
    classes = range(len(CLASS_NAMES))
    assert result.headline.n == 34
    assert result.headline.chance == 1 / 7
    assert result.details["skipped"] == {"unusable example": 1}
    assert found.class_names == tuple(names.split("|")[0] for names in CLASS_NAMES)
    assert result.details["templates"] == list(Cards.templates)
    np.testing.assert_array_equal(
        found.matrix(),
        sklearn_metrics.confusion_matrix(task.labels, predicted, labels=classes),
    )
    top1, top5 = (
        sklearn_metrics.top_k_accuracy_score(task.labels, wanted, k=k, labels=classes)
        for k in (1, 5)
    )
    assert 0 < top1 < top5 < 1
    values = {score.metric: score.value for score in result.scores}
    assert values == pytest.approx({"accuracy": top1, "top5": top5}, abs=1e-12)
    assert {score.variant for score in result.scores} == {"ensemble"}
    recall = sklearn_metrics.recall_score(
        task.labels, predicted, labels=classes, average=None, zero_division=np.nan
    )
    np.testing.assert_allclose(found.per_class, recall)
    assert np.isnan(found.per_class[6])


def test_zeroshot_by_the_likelihood_of_prompts(task, mesh):
    words, table = Words(), np.random.default_rng(5).normal(-20, 3, (37, 64)).astype(np.float32)
    encoder = Encoder(Likelihoods(), mesh, 16, threads=2)
    variables = {"scores": jnp.asarray(table), "params": {}}
    result = evaluate("zeroshot", task.source, words, variables, encoder)
    found = confusions(result)
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
        found.matrix(),
        sklearn_metrics.confusion_matrix(task.labels, predicted, labels=range(len(CLASS_NAMES))),
    )
    assert result.details["by_likelihood"]
    top1, top5 = (score.value for score in result.scores)
    assert 0 < top1 < top5 < 1
    wrong = np.flatnonzero(predicted != task.labels)
    best = max(np.max(wanted[i]) for i in wrong)
    assert found.mistakes[0].probability == pytest.approx(best, rel=1e-4)


def test_zeroshot_lists_the_most_confident_mistakes(task, mesh):
    words, variables = Words(), stub(task.images, task.texts)
    found = confusions(evaluate("zeroshot", task.source, words, variables, encoder(mesh)))
    wanted = reference_probabilities(task, words, scale=10.0)
    predicted, best = wanted.argmax(axis=1), wanted.max(axis=1)
    wrong = np.flatnonzero(predicted != task.labels)
    worst = sorted(wrong, key=lambda i: -best[i])[: len(found.mistakes)]
    assert 0 < len(found.mistakes) <= 12
    short = [names.split("|")[0] for names in CLASS_NAMES]
    for mistake, i in zip(found.mistakes, worst, strict=True):
        assert mistake.probability == pytest.approx(best[i], rel=1e-4)
        assert (mistake.true, mistake.predicted) == (short[task.labels[i]], short[predicted[i]])
        np.testing.assert_array_equal(pixels(mistake.image), task.source[int(task.used[i])].image)


def test_variants_have_less_and_less_context(task, mesh1):
    words, variables = Words(), stub(task.images, task.texts)
    result = evaluate("zeroshot", task.source, words, variables, encoder(mesh1), whole=True)
    names = [(score.variant, score.metric) for score in result.scores]
    variants = ["ensemble", "one prompt", "bare names"]
    assert names == [*((variant, "accuracy") for variant in variants), ("ensemble", "top5")]
    assert {"a photo of a pair.", "pair", "the pair"} <= set(words.texts)
    alone = evaluate("zeroshot", task.source, Words(), variables, encoder(mesh1))
    assert alone.headline == result.headline


def test_top5_is_left_out_where_it_means_nothing(mesh1):
    rng = np.random.default_rng(1)
    source = Cards(["x"] * 9, rng.integers(0, 5, 9), "abcde")
    variables = stub(unit(rng, 9, WIDTH), unit(rng, 10, WIDTH))
    result = evaluate("zeroshot", source, Words(), variables, encoder(mesh1))
    assert [score.metric for score in result.scores] == ["accuracy"]
    assert confusions(result).counts.sum() == 9


def test_class_prompts_by_hand():
    prompts, class_ids = class_prompts(["cat|kitten", "dog"], ["a {}.", "{}"])
    assert prompts == ["a cat.", "cat", "a kitten.", "kitten", "a dog.", "dog"]
    assert class_ids.tolist() == [0, 0, 0, 0, 1, 1]


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
        class_prompts(names, templates)


@pytest.mark.parametrize("template", ["a {0}", "{name}", "a {} in {0}", "a {} {"])
def test_class_prompts_with_other_braces(template):
    """Either a sentence about the template, or prompts with the name in it; no other error."""
    try:
        prompts, _ = class_prompts(["cat"], [template])
    except UserError as error:
        assert template in str(error)  # noqa: PT017
    else:
        assert prompts == [template.replace("{}", "cat")]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "set label_key"),
        ([0, 1, 0, 2, 1], "label 2.*but only 2 class names.*eval.zeroshot.class_names"),
    ],
)
def test_labels_that_cannot_be_used(mesh1, labels, message):
    variables = stub(np.eye(WIDTH, dtype=np.float32), np.eye(WIDTH, dtype=np.float32))
    source = Cards(["x"] * 5, labels, ("a", "b"))
    with pytest.raises(UserError, match=message):
        evaluate("zeroshot", source, Words(), variables, encoder(mesh1))


def test_without_a_usable_image(mesh1):
    variables = stub(np.eye(WIDTH, dtype=np.float32), np.eye(WIDTH, dtype=np.float32))
    with pytest.raises(UserError, match="no usable image in Cards"):
        evaluate("zeroshot", Cards([None] * 3, None, "ab"), Words(), variables, encoder(mesh1))


def test_confusions_of_very_many_classes_take_little_memory():
    rng, classes, n = np.random.default_rng(0), 100_000, 3000
    labels, chosen = rng.integers(classes, size=(2, n))
    chosen[:1000] = labels[:1000]
    tracemalloc.start()
    found = confusion.summarize(
        labels,
        chosen[:, None],
        rng.random(n),
        [str(i) for i in range(classes)],
        lambda row: np.zeros((1, 1, 3), np.uint8),
    )
    shown = confusion.view(confusion.from_json(json.loads(json.dumps(confusion.to_json(found)))))
    assert tracemalloc.get_traced_memory()[1] < 3e8  # a matrix: 8e10
    tracemalloc.stop()
    right = {row["name"]: row["right"] for row in shown["rows"] if row["right"]}
    assert right == {str(i): k for i, k in Counter(labels[labels == chosen]).items()}
    assert len(shown["pairs"]) == confusion.LISTED
