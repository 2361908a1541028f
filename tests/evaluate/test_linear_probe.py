"""The sweep over strengths and few-shot probes, against a search of all and hand-worked cases."""

import math

import numpy as np
import pytest
import threadpoolctl
from sklearn import datasets, preprocessing
from sklearn.linear_model import LogisticRegression

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import few_shot, sweep
from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.measures.sweep import Split

ACCURACY = METRICS["accuracy"]


def digits() -> tuple[Split, Split, Split]:
    """300 to train on, 250 to validate, 350 to test; noisy, so that the strength matters."""
    features, classes = datasets.load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    features = preprocessing.scale(features) + 2 * rng.normal(size=features.shape)
    order = rng.permutation(len(features))
    features, classes = features[order].astype(np.float32), classes[order].astype(np.int32)
    bounds = [(0, 300), (300, 550), (550, 900)]
    return tuple(Split(features[a:b], classes[a:b]) for a, b in bounds)


def scikit_learn(train: Split, strength: float) -> LogisticRegression:
    """In float64, to the end."""
    model = LogisticRegression(C=1 / strength, tol=1e-7, max_iter=5000)
    with threadpoolctl.threadpool_limits(1):
        return model.fit(np.float64(train.features), train.targets)


def test_the_probe_is_scikit_learns_at_the_best_of_all_strengths(mesh8):
    train, validation, test = digits()
    found = sweep.probe(train, validation, test, ACCURACY, 10, mesh8)
    # All strengths from 0.01 on by scikit-learn; weaker ones are all alike and take it long.
    scores = {
        place: scikit_learn(train, 10 ** (place / 8)).score(*validation) for place in range(-16, 49)
    }
    chosen = round(8 * math.log10(found.strength))
    assert scores[chosen] >= max(scores.values()) - 1.01 / 250
    assert scores[chosen] > scores[-16] + 0.02
    assert [p.strength for p in found.points] == sorted(p.strength for p in found.points)
    assert len(found.points) == 15
    for point in found.points:
        place = round(8 * math.log10(point.strength))
        assert point.converged
        if place in scores:
            assert point.score == pytest.approx(scores[place], abs=1.01 / 250)
    both = Split(*(np.concatenate(parts) for parts in zip(train, validation)))
    again = scikit_learn(both, found.strength)
    assert found.score == pytest.approx(again.score(*test), abs=1.01 / 350)
    np.testing.assert_array_equal(found.test_scores.argmax(axis=1), again.predict(test.features))


@pytest.mark.parametrize(("peak", "tried"), [(5, 15), (-31, 15), (48, 11), (-48, 11)])
def test_coarse_to_fine(peak: int, tried: int):
    """A score with one peak, anywhere and at the edges; of equals the strongest is taken."""
    asked: list[int] = []

    def scores_at(places: list[int]) -> list[float]:
        asked.extend(places)
        return [-float(abs(place - peak)) for place in places]

    assert sweep.search(scores_at) == peak
    assert len(asked) == len(set(asked)) <= tried
    assert asked[:7] == [-48, -32, -16, 0, 16, 32, 48]
    assert sweep.search(lambda places: [0.0] * len(places)) == 48


def test_held_out_are_a_fifth_of_each_class():
    classes = np.repeat([0, 1, 2, 3], [100, 11, 4, 1]).astype(np.int32)
    examples = Split(np.arange(116, dtype=np.float32)[:, None], classes)
    rest, fifth = sweep.hold_out(examples, seed=3)
    assert np.bincount(fifth.targets, minlength=4).tolist() == [20, 2, 1, 0]
    assert sorted([*rest.features[:, 0], *fifth.features[:, 0]]) == list(range(116))
    again = sweep.hold_out(examples, seed=3)[1]
    np.testing.assert_array_equal(fifth.features, again.features)
    assert not np.array_equal(fifth.features, sweep.hold_out(examples, seed=4)[1].features)


def test_draws_are_balanced_nested_and_repeatable():
    targets = np.random.default_rng(0).integers(0, 3, 90).astype(np.int32)
    drawn = few_shot.draw(targets, 4, 3, seed=1)
    assert (targets[drawn] == [0, 1, 2]).all()
    assert len(set(drawn.ravel())) == 12
    np.testing.assert_array_equal(drawn[:2], few_shot.draw(targets, 2, 3, seed=1))
    assert not np.array_equal(drawn, few_shot.draw(targets, 4, 3, seed=2))
    with pytest.raises(UserError, match=r"Class \d has 2\d training examples, but 40"):
        few_shot.draw(targets, 40, 3, seed=0)
    with pytest.raises(UserError, match="several labels"):
        few_shot.draw(np.zeros((4, 2), bool), 1, 2, seed=0)


def test_few_shot_probes_are_scikit_learns(mesh8):
    train, validation, test = digits()
    points = few_shot.curve(train, validation, test, ACCURACY, 10, mesh8, shots=(4, 1), repeats=2)
    assert [point.shots for point in points] == [1, 4]
    assert points[0].mean < points[1].mean
    for point in points:
        assert point.mean == pytest.approx(np.mean(point.scores))
        assert point.deviation == pytest.approx(abs(np.subtract(*point.scores)) / math.sqrt(2))
        for repeat, (score, strength) in enumerate(zip(point.scores, point.strengths)):
            places = few_shot.draw(train.targets, 4, 10, seed=repeat)[: point.shots].ravel()
            few = Split(train.features[places], train.targets[places])
            wanted = scikit_learn(few, strength).score(*test)
            assert score == pytest.approx(wanted, abs=2.01 / 350)  # flat optima of weak strengths


def test_labels_that_zero_shot_is_worth():
    """Accuracy 0.5, 0.6, 0.8 at 1, 2, 8 shots and 0.9 at 128; linear in the logarithm between."""
    known = ([1, 2, 8], [0.5, 0.6, 0.8], 128, 0.9)
    for zero_shot, wanted in (
        (0.4, 1.0),  # a bound: one is too many already
        (0.5, 1.0),
        (0.55, 2**0.5),
        (0.6, 2.0),
        (0.7, 4.0),
        (0.85, 32.0),
        (0.9, 128.0),
        (0.91, math.inf),
    ):
        assert few_shot.labels_needed(zero_shot, *known) == pytest.approx(wanted)
    # Where it falls again, the first crossing counts.
    assert few_shot.labels_needed(0.6, [1, 2, 4], [0.5, 0.7, 0.4], 8, 0.9) == pytest.approx(2**0.5)
