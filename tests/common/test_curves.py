"""Learning curves: the drawn lines are the metrics given."""

import re

import numpy as np

from clip_jax.common.pages import curves


def test_resumed_and_sparse_history():
    rows = [(10, 3.0), (20, 2.0), (30, 9.0), (20, 2.5), (30, 1.5)]
    history = [{"step": step, "train/loss": loss} for step, loss in rows]
    history.insert(2, {"step": 25, "zeroshot/top1": 0.4})
    series = curves.collect(history, {"zeroshot/top1": 0.1})
    assert series["train/loss"].steps.tolist() == [10, 20, 30]
    assert series["train/loss"].values.tolist() == [3.0, 2.5, 1.5]
    assert series["zeroshot/top1"].steps.tolist() == [25]
    assert series["zeroshot/top1"].chance == 0.1


def test_plot_is_affine_in_the_data():
    values = np.array([3.0, -1.0, 4.0, 1.5, -5.0, 9.0, 2.0])
    steps = np.array([10, 20, 35, 40, 70, 80, 95])
    svg = str(curves.draw([curves.Series("train/loss", steps, values)], "loss"))
    assert 'aria-label="loss"' in svg
    line = next(
        d
        for d, style in re.findall(r'd="(M[^"]*)"[^>]*style="([^"]*)"', svg)
        if "stroke: var(--line-0)" in style and d.count("L") == len(values) - 1
    )
    points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line), np.float64)
    for drawn, given, sign in ((points[:, 0], steps, 1), (points[:, 1], values, -1)):
        slope, offset = np.polyfit(given, drawn, 1)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(drawn, slope * given + offset, atol=1e-3)
    assert not re.search(r"#0000\d\d", svg)  # every placeholder colour became a variable


def test_long_series_are_averaged_with_their_range():
    rng = np.random.default_rng(0)
    steps, values = np.arange(1, 5001) * 10, rng.normal(size=5000)
    values[100], values[200:240] = 50.0, np.nan
    at, mean, low, high = curves.thin(steps, values)
    assert len(at) < 500
    assert at[-1] == steps[-1]
    assert high[np.isfinite(high)].max() == 50.0
    start = 0
    for i, end in enumerate(np.searchsorted(steps, at) + 1):
        group = values[start:end][np.isfinite(values[start:end])]
        if len(group):
            np.testing.assert_allclose(
                [mean[i], low[i], high[i]], [group.mean(), group.min(), group.max()]
            )
        else:
            assert np.isnan(mean[i])
        start = end
    assert start == 5000
    assert len(curves.draw([curves.Series("a/b", steps, values)], "b")) < 60_000
