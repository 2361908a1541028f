"""Splits of scikit-learn's digits, and its own linear probe."""

import numpy as np
import threadpoolctl
from sklearn import datasets, preprocessing
from sklearn.linear_model import LogisticRegression

from clip_jax.evaluate.measures.metrics import METRICS
from clip_jax.evaluate.measures.sweep import Split

ACCURACY = METRICS["accuracy"]


def digits() -> tuple[Split, Split, Split]:
    """300 to train on, 250 to validate, 350 to test; noisy, for the penalty to matter."""
    features, classes = datasets.load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    features = preprocessing.scale(features) + 2 * rng.normal(size=features.shape)
    order = rng.permutation(len(features))
    features, classes = features[order].astype(np.float32), classes[order].astype(np.int32)
    bounds = [(0, 300), (300, 550), (550, 900)]
    return tuple(Split(features[a:b], classes[a:b]) for a, b in bounds)


def scikit_learn(train: Split, l2: float) -> LogisticRegression:
    """Fits in float64, to full convergence."""
    model = LogisticRegression(C=1 / l2, tol=1e-7, max_iter=5000)
    with threadpoolctl.threadpool_limits(1):
        return model.fit(np.float64(train.features), train.targets)
