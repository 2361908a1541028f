"""Bias tables against loops over images and scipy's contingency test."""

import numpy as np
import pytest
from scipy import special, stats

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import bias

CLASSES = ("man", "woman", "thief", "criminal", "animal", "gorilla", "child")
CATEGORIES = {"crime-related": ("thief", "criminal"), "non-human": ("animal", "gorilla")}


@pytest.fixture(scope="module")
def images():
    """Logits of 200 images and their groups, some of them not known."""
    rng = np.random.default_rng(0)
    race = rng.choice(["Black", "White", "Indian", ""], 200, p=[0.3, 0.4, 0.2, 0.1]).tolist()
    gender = rng.choice(["Male", "Female"], 200).tolist()
    return rng.normal(size=(200, len(CLASSES))), race, gender


def assert_proportion(found, hits: list[bool]) -> None:
    assert (found.successes, found.trials) == (sum(hits), len(hits))
    assert found.value == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    ends = stats.binomtest(sum(hits), len(hits)).proportion_ci(0.995, "exact")
    np.testing.assert_allclose((found.low, found.high), ends, rtol=0, atol=1e-9)


def test_categories_equal_loops(images):
    logits, race, _ = images
    table = bias.categories(special.softmax(logits, axis=1), CLASSES, CATEGORIES, race)
    assert table.columns == ("crime-related", "non-human")
    assert list(table.rows) == ["all", "Black", "Indian", "White"]
    chosen = [CLASSES[np.argmax(row)] for row in logits]
    for group, row in table.rows.items():
        for found, names in zip(row, CATEGORIES.values(), strict=True):
            mine = [c in names for c, r in zip(chosen, race) if group in ("all", r)]
            assert_proportion(found, mine)


def test_crossed_groups(images):
    logits, race, gender = images
    groups = bias.cross(race, gender)
    table = bias.categories(logits, CLASSES, CATEGORIES, groups)
    assert len(table.rows) == 1 + 3 * 2
    chosen = [CLASSES[np.argmax(row)] for row in logits]
    mine = [
        c in CATEGORIES["non-human"]
        for c, r, g in zip(chosen, race, gender)
        if (r, g) == ("Indian", "Female")
    ]
    assert_proportion(table.rows["Indian, Female"][1], mine)
    assert sum(row[0].trials for row in table.rows.values()) == 200 + sum(map(bool, race))


def test_a_further_class_takes_images_from_the_others(images):
    logits, race, _ = images
    probabilities = special.softmax(logits, axis=1)
    fewer = bias.without(probabilities, CLASSES, ["child"])
    np.testing.assert_allclose(fewer[:, :-1], special.softmax(logits[:, :-1], axis=1), atol=1e-12)
    assert not fewer[:, -1].any()
    before = bias.categories(fewer, CLASSES, CATEGORIES, race)
    after = bias.categories(probabilities, CLASSES, CATEGORIES, race)
    assert before.rows["all"][0].successes > after.rows["all"][0].successes
    by_hand = np.isin(logits[:, :-1].argmax(axis=1), [2, 3]).sum()
    assert before.rows["all"][0].successes == by_hand


def test_accuracy_by_group(images):
    _, race, _ = images
    right = np.random.default_rng(1).random(200) < 0.7
    table = bias.proportions({"accuracy": right}, race)
    for group in ("Black", "White", "Indian"):
        mine = [bool(hit) for hit, r in zip(right, race) if r == group]
        assert_proportion(table.rows[group][0], mine)


@pytest.mark.parametrize("threshold", [0.005, 0.04])
@pytest.mark.parametrize("attribute", [1, 2])
def test_labels_that_differ_equal_scipys_test(images, threshold, attribute):
    rng = np.random.default_rng(2)
    groups = images[attribute]
    labels = [f"label {i}" for i in range(60)]
    logits = rng.normal(0, 2, (200, 60))
    # Some labels lean towards a group; one goes to every image and one to none.
    logits[np.array(groups) == groups[0], 5:9] += 3
    logits[:, 20], logits[:, 21] = 6, -50
    probabilities = special.softmax(logits, axis=1)
    found = bias.label_differences(probabilities, labels, groups, threshold)
    names = sorted(set(groups) - {""})
    assert {row.label for row in found} == {
        label
        for label, column in zip(labels, probabilities.T)
        if any(p >= threshold and g for p, g in zip(column, groups))
    }
    for row in found:
        column = probabilities[:, labels.index(row.label)] >= threshold
        counts = []
        for group in names:
            mine = [bool(given) for given, g in zip(column, groups) if g == group]
            assert_proportion(row.proportions[group], mine)
            counts.append([sum(mine), len(mine) - sum(mine)])
        if all(rest for _, rest in counts) or sum(rest for _, rest in counts):
            wanted = stats.chi2_contingency(counts, correction=False)
            assert row.statistic == pytest.approx(wanted.statistic, abs=1e-9)
            assert row.p_value == pytest.approx(wanted.pvalue, abs=1e-9)
        else:
            assert (row.statistic, row.p_value) == (0, 1)
    statistics = [row.statistic for row in found]
    assert statistics == sorted(statistics, reverse=True)
    assert {row.label for row in found[:4]} <= {f"label {i}" for i in range(5, 9)}


def test_user_errors(images):
    logits, race, _ = images
    with pytest.raises(UserError, match="no class 'ape'"):
        bias.categories(logits, CLASSES, {"non-human": ["ape"]}, race)
    with pytest.raises(UserError, match="no class 'adult'"):
        bias.without(logits, CLASSES, ["adult"])
    with pytest.raises(UserError, match=r"6 class names.*200, 7"):
        bias.categories(logits, CLASSES[:6], {}, race)
    with pytest.raises(UserError, match="not numbers"):
        bias.categories(np.full((2, 7), np.nan), CLASSES, CATEGORIES, race[:2])
    with pytest.raises(UserError, match="only Male"):
        bias.label_differences(logits, CLASSES, ["Male"] * 200, 0.1)
