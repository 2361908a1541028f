"""L2-regularised logistic regression on the devices of a mesh (paper, linear probes).

The objective is that of scikit-learn's LogisticRegression with the solver lbfgs: the sum of the
examples' losses + strength / 2 * |weights|^2, where strength is 1 / C and the intercepts are not
penalised. Targets int [n] are classes, fitted jointly (softmax; two classes as one column and its
negative, as there). Targets [n, c] are labels of which an example may have several, each a
regression of its own, as by OneVsRestClassifier.

Several strengths are fitted at once, since reading the features is what takes the time. They are
centred and turned into their principal axes first, which leaves the optimum where it is and takes
few iterations (`lbfgs`). A fit has converged when its gradient, of the mean loss per example, over
all weights and intercepts, is at most `tolerance` in Euclidean norm; for weights it is measured in
units of the features' deviation, so that their scale does not matter. scikit-learn asks of each
component 1e-4 in the features' own units.

Every process passes the same arguments and gets the same results.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax import sharding
from clip_jax.errors import UserError
from clip_jax.evaluate.measures import lbfgs

TOLERANCE = 1e-6  # seen to be reached in float32 by 16,000 examples of 4096 features
_LOGITS = 2**28  # per device, of an array over all strengths; more of these are fitted in turns
_EXAMPLES = PartitionSpec(None, sharding.AXES)

Start = tuple[np.ndarray, np.ndarray]  # weights [k, d, c] and bias [k, c]


class Features(NamedTuple):
    """Features of training examples on the devices, in their principal axes.

    Attributes:
      rows: float32 [r + 1, m], split over the m examples, some of them padding: zeros; the last
        row is 1 for the others. r is the smaller of d and m.
      moments: float32 [r + 1], mean squares of the rows.
      axes: float32 [d, r], orthonormal.
      mean: float32 [d].
      count: examples, n.
    """

    rows: jax.Array
    moments: jax.Array
    axes: jax.Array
    mean: jax.Array
    count: int


class Fitted(NamedTuple):
    """Of k strengths.

    Attributes:
      weights: float32 [k, d, c].
      bias: float32 [k, c].
      iterations: int32 [k], of the class that took most where each has its own regression.
      converged: bool [k]; else `max_iter` was reached, or the end of float32.
    """

    weights: np.ndarray
    bias: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray


def fit(
    features: np.ndarray,
    targets: np.ndarray,
    strengths: Sequence[float],
    classes: int,
    mesh: Mesh,
    max_iter: int = 1000,
    tolerance: float = TOLERANCE,
) -> Fitted:
    """Fits one regression for each strength.

    Args:
      features: float [n, d].
      targets: int [n]; or [n, c], bool, or int with -1 for what is neither true nor false.
      strengths: [k], above 0; 1 / C of scikit-learn.
      classes: c, at least 2 unless targets are [n, c].
      mesh: devices that the examples are split over.
      max_iter: of L-BFGS; the paper's is 1,000.
      tolerance: of the gradient.

    Raises:
      UserError: no examples, lengths that differ, values that are not finite, or targets that are
        not classes.
    """
    return fit_placed(place(features, mesh), targets, strengths, classes, mesh, max_iter, tolerance)


def place(features: np.ndarray, mesh: Mesh, rows: int = 0) -> Features:
    """Moves features onto the devices, for several calls of `fit_placed`.

    Args:
      features: float [n, d].
      mesh: devices to split them over.
      rows: to pad to at least; sets padded alike share compiled programs.

    Raises:
      UserError: no examples, or values that are not finite.
    """
    if features.ndim != 2 or not features.size:
        raise UserError(f"A probe needs features [n, d], but got {list(features.shape)}.")
    if not np.isfinite(features).all():
        raise UserError(
            "A probe needs finite features, but some are NaN or infinite: look for a model that "
            "diverged, or a compute dtype that overflows."
        )
    count = len(features)
    padded = _put(features.astype(np.float32, copy=False), max(rows, count), mesh)
    turned = _turn_program(mesh)(padded, np.float32(count))
    return Features(*turned, count=count)


def fit_placed(
    features: Features,
    targets: np.ndarray,
    strengths: Sequence[float],
    classes: int,
    mesh: Mesh,
    max_iter: int = 1000,
    tolerance: float = TOLERANCE,
    start: Start | None = None,
    at_once: int | None = None,
) -> Fitted:
    """`fit` of features that are on the devices.

    Args:
      features: placed on `mesh`.
      targets, strengths, classes, mesh, max_iter, tolerance: as of `fit`.
      start: where to begin; None: zeros.
      at_once: strengths in one product; None: all that memory allows. Those that need about the
        same number of iterations should be together; calls with the same number share a program.

    Raises:
      UserError: as of `fit`.
    """
    check_targets(targets, features.count, classes)
    if min(strengths) <= 0:
        raise UserError(f"L2 strengths must be above 0, but one is {min(strengths)}.")
    joint = targets.ndim == 1
    labels = _put(targets.astype(np.int32 if joint else np.int8), features.rows.shape[1], mesh)
    # Two classes are one column of weights there, split over two here: half the sum of squares.
    penalties = np.array(strengths, np.float32) * (2 if joint and classes == 2 else 1)
    k, width = len(penalties), len(features.mean)
    weights, bias = start or (np.zeros((k, width, classes)), np.zeros((k, classes)))
    parts = []
    for part in _turns(k, at_once or k, classes * features.rows.shape[1] / mesh.size):
        result = _fit_program(mesh, classes, joint)(
            features[:-1],
            np.float32(features.count),
            labels,
            penalties[part],
            weights[part].astype(np.float32),
            bias[part].astype(np.float32),
            np.int32(max_iter),
            np.float32(tolerance),
        )
        parts.append([np.asarray(array.addressable_data(0)) for array in result])
    return Fitted(*(np.concatenate(arrays)[:k] for arrays in zip(*parts)))


def scores(fitted: Fitted, features: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Decision values, float32 [k, n, c]: softmax or sigmoid makes probabilities of them.

    Args:
      fitted: of k strengths.
      features: float [n, d].
      mesh: devices to split the examples over.

    Raises:
      UserError: features of another width than was fitted.
    """
    if features.ndim != 2 or features.shape[1] != fitted.weights.shape[1]:
        raise UserError(
            f"This probe was fitted to features of width {fitted.weights.shape[1]}, but is given "
            f"{list(features.shape)}: take both from the same model."
        )
    placed = _put(features.astype(np.float32, copy=False), len(features), mesh)
    program = _score_program(mesh)
    found = [program(placed, *one) for one in zip(fitted.weights, fitted.bias)]
    return np.stack([np.asarray(one.addressable_data(0))[: len(features)] for one in found])


def check_targets(targets: np.ndarray, count: int, classes: int) -> None:
    """Whether these are targets of so many examples.

    Raises:
      UserError: they are not.
    """
    several = targets.ndim == 2
    shape, least, most = ((count, classes), -1, 1) if several else ((count,), 0, classes - 1)
    if targets.shape != shape or targets.dtype.kind not in ("iu" if not several else "iub"):
        raise UserError(
            f"A probe of {count} examples and {classes} classes needs targets int [{count}], or "
            f"bool [{count}, {classes}] where an example may have several, but got "
            f"{targets.dtype} {list(targets.shape)}."
        )
    if not several and classes < 2:
        raise UserError("A probe needs at least two classes.")
    if targets.min() < least or targets.max() > most:
        raise UserError(
            f"Targets must lie between {least} and {most}, but range from {targets.min()} to "
            f"{targets.max()}: leave unlabelled examples out, and name every class."
        )


def _turns(count: int, at_once: int, logits: float) -> list[np.ndarray]:
    """Which of `count` strengths to fit together, each of so many logits per device.

    All turns are of one length, so that they share a program: the last strength is repeated.
    """
    length = max(1, min(at_once, int(_LOGITS // logits)))
    turns = -(-count // length)
    return np.split(np.minimum(np.arange(turns * length), count - 1), turns)


def _put(rows: np.ndarray, count: int, mesh: Mesh) -> jax.Array:
    """Rows that every process holds, zero-padded to at least `count` and split over all devices."""
    count = -(-count // mesh.size) * mesh.size

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(count)
        held = rows[first:last]
        return np.pad(held, [(0, last - first - len(held))] + [(0, 0)] * (rows.ndim - 1))

    split = NamedSharding(mesh, sharding.EVERY_AXIS)
    return jax.make_array_from_callback((count, *rows.shape[1:]), split, part)


# ---- Programs ----------------------------------------------------------------------------------


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _turn_program(mesh: Mesh):
    """(features [m, d], count) -> `Features` without the count."""
    whole = sharding.replicated(mesh)

    def turn(padded: jax.Array, count: jax.Array):
        examples, width = padded.shape
        mean = padded.sum(axis=0) / count
        real = jnp.arange(examples) < count
        columns = jnp.where(real, (padded - mean).T, 0)
        # Fewer examples than axes span a space of no more axes than examples.
        basis, columns = jnp.linalg.qr(columns) if examples < width else (None, columns)
        moments, axes = jnp.linalg.eigh(_product("dm,em->de", columns, columns) / count)
        rows = _product("dr,dm->rm", axes, columns)
        rows = jnp.concatenate([rows, real.astype(jnp.float32)[None]])
        axes = axes if basis is None else _product("de,er->dr", basis, axes)
        return rows, jnp.append(moments, 1), axes, mean

    split = NamedSharding(mesh, _EXAMPLES)
    return jax.jit(turn, out_shardings=(split, whole, whole, whole))


@functools.cache
def _fit_program(mesh: Mesh, classes: int, joint: bool):
    """`Fitted` of placed features, labels [m] or [m, c], penalties [k] and a start."""
    split = NamedSharding(mesh, PartitionSpec(None, None, sharding.AXES))

    def run(features, count, labels, penalties, weights, bias, max_iter, tolerance):
        rows, moments, axes, mean = features
        each = jnp.arange(classes, dtype=jnp.int32)[:, None]
        targets = (labels == each).astype(jnp.int8) if joint else labels.T
        unpenalised = jnp.ones(len(moments)).at[-1].set(0)
        deviation = jnp.sqrt(jnp.maximum(moments[:-1].sum() / len(mean), jnp.finfo("f").tiny))
        problem = lbfgs.Problem(
            rows=rows,
            moments=moments,
            targets=targets,
            penalty=penalties[:, None, None] / count * unpenalised,
            units=jnp.full_like(moments, deviation).at[-1].set(1),
            count=count,
            joint=joint,
            split=split,
        )
        level = bias + _product("kdc,d->kc", weights, mean)
        start = jnp.concatenate([_product("kdc,dr->kcr", weights, axes), level[..., None]], axis=-1)
        if joint:  # what all classes share has no effect
            start -= start.mean(axis=1, keepdims=True)
        found, iterations, converged = lbfgs.minimise(problem, start, max_iter, tolerance)
        weights = _product("kcr,dr->kdc", found[..., :-1], axes)
        bias = found[..., -1] - _product("kdc,d->kc", weights, mean)
        return weights, bias, iterations.max(axis=1), converged.all(axis=1)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


@functools.cache
def _score_program(mesh: Mesh):
    def score(features: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
        return _product("nd,dc->nc", features, weights) + bias

    return jax.jit(score, out_shardings=sharding.replicated(mesh))
