"""The search for the L2 penalty against scikit-learn and constructed scores."""

import functools
import math

import numpy as np
import pytest
from probes import ACCURACY, digits, scikit_learn

from clip_jax.evaluate.measures import sweep
from clip_jax.evaluate.measures.sweep import Split


def test_the_probe_is_scikit_learns_at_the_best_of_all_penalties(mesh8):
    train, validation, test = digits()
    found = sweep.probe(train, validation, test, ACCURACY, 10, mesh8)
    # All penalties from 0.01 on by scikit-learn; smaller ones score the same and take it long.
    scores = {
        exponent: scikit_learn(train, 10 ** (exponent / 8)).score(*validation)
        for exponent in range(-16, 49)
    }
    chosen = round(8 * math.log10(found.l2))
    assert scores[chosen] >= max(scores.values()) - 1.01 / 250
    assert scores[chosen] > scores[-16] + 0.02
    assert [p.l2 for p in found.points] == sorted(p.l2 for p in found.points)
    assert len(found.points) == 15
    for point in found.points:
        exponent = round(8 * math.log10(point.l2))
        assert point.converged
        if exponent in scores:
            assert point.score == pytest.approx(scores[exponent], abs=1.01 / 250)
    both = Split(*(np.concatenate(parts) for parts in zip(train, validation)))
    again = scikit_learn(both, found.l2)
    assert found.score == pytest.approx(again.score(*test), abs=1.01 / 350)
    np.testing.assert_array_equal(found.test_scores.argmax(axis=1), again.predict(test.features))


@pytest.mark.parametrize(("peak", "tried"), [(5, 15), (-31, 15), (48, 11), (-48, 11)])
def test_coarse_to_fine(peak: int, tried: int):
    """A score with one peak, inside and at the edges; ties go to the largest penalty."""
    asked: list[int] = []

    def scores_at(exponents: list[int]) -> list[float]:
        asked.extend(exponents)
        return [-float(abs(exponent - peak)) for exponent in exponents]

    assert sweep.search(scores_at) == peak
    assert len(asked) == len(set(asked)) <= tried
    assert asked[:7] == [-48, -32, -16, 0, 16, 32, 48]
    assert sweep.search(lambda exponents: [0.0] * len(exponents)) == 48


def test_a_search_counts_the_fits_that_did_not_converge(mesh8, monkeypatch):
    train, validation, test = digits()
    assert sweep.probe(train, validation, test, ACCURACY, 10, mesh8).unconverged == 0
    fit = functools.partial(sweep.logistic.fit_placed, max_iter=30)
    monkeypatch.setattr(sweep.logistic, "fit_placed", fit)
    found = sweep.probe(train, validation, test, ACCURACY, 10, mesh8)
    assert found.unconverged == sum(point.iterations >= 30 for point in found.points) > 0
    assert "fits have not converged" in sweep.warning(found.unconverged)
    assert not sweep.warning(0)


def test_held_out_are_a_fifth_of_each_class():
    classes = np.repeat([0, 1, 2, 3], [100, 11, 4, 1]).astype(np.int32)
    examples = Split(np.arange(116, dtype=np.float32)[:, None], classes)
    rest, fifth = sweep.hold_out(examples, seed=3)
    assert np.bincount(fifth.targets, minlength=4).tolist() == [20, 2, 1, 0]
    assert sorted([*rest.features[:, 0], *fifth.features[:, 0]]) == list(range(116))
    again = sweep.hold_out(examples, seed=3)[1]
    np.testing.assert_array_equal(fifth.features, again.features)
    assert not np.array_equal(fifth.features, sweep.hold_out(examples, seed=4)[1].features)
