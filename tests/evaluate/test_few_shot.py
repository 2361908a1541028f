"""Few-shot probes against scikit-learn and hand-worked cases."""

import math

import numpy as np
import pytest
from probes import ACCURACY, digits, scikit_learn

from clip_jax.errors import UserError
from clip_jax.evaluate.measures import few_shot
from clip_jax.evaluate.measures.sweep import Split


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
        for repeat, (score, l2) in enumerate(zip(point.scores, point.l2)):
            drawn = few_shot.draw(train.targets, 4, 10, seed=repeat)[: point.shots].ravel()
            few = Split(train.features[drawn], train.targets[drawn])
            wanted = scikit_learn(few, l2).score(*test)
            assert score == pytest.approx(wanted, abs=2.01 / 350)  # flat optima of small penalties


def test_labels_that_zero_shot_is_worth():
    """Accuracy 0.5, 0.6, 0.8 at 1, 2, 8 shots and 0.9 at 128; linear in the logarithm between."""
    known = ([1, 2, 8], [0.5, 0.6, 0.8], 128.0, 0.9)
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
    # The curve falls again: the first crossing counts.
    assert few_shot.labels_needed(0.6, [1, 2, 4], [0.5, 0.7, 0.4], 8.0, 0.9) == pytest.approx(
        2**0.5
    )
