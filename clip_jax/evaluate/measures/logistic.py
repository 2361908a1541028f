"""L2-regularised logistic regression on the devices of a mesh (paper, linear probes).

The objective is that of scikit-learn's LogisticRegression with the solver lbfgs: the sum of the
examples' losses + l2 / 2 * |weights|^2, where l2 is 1 / C and the intercepts are not penalised.
Targets int [n] are classes, fitted jointly (softmax; two classes as one column and its negative, as
there). Targets [n, c] are labels of which an example may have several, each a regression of its
own, as by OneVsRestClassifier.

Several penalties are fitted at once, since reading the features takes most of the time. The
features are centred and rotated into their principal axes first. That leaves the optimum where it
is, and `lbfgs` needs few iterations.

A fit has converged when its next step is expected to lower the objective by at most `tolerance` of
it. The objective then lies within 1e-3 of its least value, relative to it, for every penalty from
1e-6 to 1e6: seen with features that are collinear, or of very different scales, and with separable
classes, whose weights grow without bound as the penalty falls. scikit-learn's default asks that no
component of the gradient exceed 1e-4, in the features' own units.

Every process passes the same arguments and gets the same results.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32, Integer, Shaped

from clip_jax import sharding
from clip_jax.errors import UserError
from clip_jax.evaluate.measures import lbfgs

MAX_ITER = 1000  # the paper's
TOLERANCE = 1e-9  # expected decrease of the objective, as a fraction of it
# Most logits of one array on a device: more penalties are fitted one group after the other.
_LOGITS = 2**28
_EXAMPLES = PartitionSpec(None, sharding.AXES)

# Weights and biases of k penalties.
Start = tuple[Float[np.ndarray, "k d c"], Float[np.ndarray, "k c"]]
# Classes, or several labels each; `check_targets` compares them with the features.
Targets = Integer[np.ndarray, " m"] | Integer[np.ndarray, "m c"] | Bool[np.ndarray, "m c"]


class Features(NamedTuple):
    """Features of training examples on the devices, in their principal axes.

    Attributes:
      rows: coordinates, split over the m examples, of which some are padding: zeros. The last row
        is 1 for the others. r is the smaller of d and m.
      moments: mean squares of the rows.
      axes: principal axes, orthonormal.
      mean: mean of the features.
      count: number of examples, n.
    """

    rows: Float32[Array, " r+1 m"]
    moments: Float32[Array, " r+1"]
    axes: Float32[Array, "d r"]
    mean: Float32[Array, " d"]
    count: int


class Fitted(NamedTuple):
    """Regressions of k penalties.

    Attributes:
      weights: one column for each class.
      bias: intercepts.
      iterations: iterations; of the slowest class where each has its own regression.
      converged: whether the fit ended neither by `max_iter` nor by float32's precision.
    """

    weights: Float32[np.ndarray, "k d c"]
    bias: Float32[np.ndarray, "k c"]
    iterations: Int32[np.ndarray, " k"]
    converged: Bool[np.ndarray, " k"]


def fit(
    features: Float[np.ndarray, "n d"],
    targets: Targets,
    l2: Sequence[float],
    classes: int,
    mesh: Mesh,
    max_iter: int = MAX_ITER,
    tolerance: float = TOLERANCE,
) -> Fitted:
    """Fits one regression for each penalty.

    Args:
      features: features of the examples.
      targets: class ids [n]; or labels [n, c], bool, or int with -1 for entries that are neither
        true nor false.
      l2: k penalties above 0; 1 / C of scikit-learn.
      classes: c, at least 2 unless targets are [n, c].
      mesh: devices to split the examples over.
      max_iter: most iterations of L-BFGS.
      tolerance: expected decrease at convergence, as a fraction of the objective.

    Raises:
      UserError: no examples, lengths that differ, values that are not finite, or targets that are
        not classes.
    """
    return fit_placed(place(features, mesh), targets, l2, classes, mesh, max_iter, tolerance)


def place(features: Float[np.ndarray, "n d"], mesh: Mesh, rows: int = 0) -> Features:
    """Moves features onto the devices, for several calls of `fit_placed`.

    Args:
      features: features of the examples.
      mesh: devices to split them over.
      rows: least size to pad to; sets padded to one size share compiled programs.

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
    rotated = _rotation_program(mesh)(padded, np.float32(count))
    return Features(*rotated, count=count)


def fit_placed(
    features: Features,
    targets: Targets,
    l2: Sequence[float],
    classes: int,
    mesh: Mesh,
    max_iter: int = MAX_ITER,
    tolerance: float = TOLERANCE,
    start: Start | None = None,
    at_once: int | None = None,
) -> Fitted:
    """Fits as `fit` does, with features that are on the devices.

    Args:
      features: placed on `mesh`.
      targets, l2, classes, mesh, max_iter, tolerance: arguments of `fit`.
      start: initial weights and biases; None: zeros.
      at_once: penalties in one product; None: all that memory allows. Penalties that need about the
        same number of iterations belong together; calls with the same number share a program.

    Raises:
      UserError: `fit` raises it.
    """
    check_targets(targets, features.count, classes)
    if min(l2) <= 0:
        raise UserError(f"L2 penalties must be above 0, but one is {min(l2)}.")
    joint = targets.ndim == 1
    labels = _put(targets.astype(np.int32 if joint else np.int8), features.rows.shape[1], mesh)
    # Two classes are one column of weights there, split over two here: half the sum of squares.
    penalties = np.array(l2, np.float32) * (2 if joint and classes == 2 else 1)
    k, width = len(penalties), len(features.mean)
    weights, bias = start or (np.zeros((k, width, classes)), np.zeros((k, classes)))
    parts = []
    for part in _groups(k, at_once or k, classes * features.rows.shape[1] / mesh.size):
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
        parts.append([sharding.to_host(array) for array in result])
    return Fitted(*(np.concatenate(arrays)[:k] for arrays in zip(*parts)))


def scores(
    fitted: Fitted, features: Float[np.ndarray, "n d"], mesh: Mesh
) -> Float32[np.ndarray, "k n c"]:
    """Computes decision values, which softmax or sigmoid turns into probabilities.

    Args:
      fitted: regressions of k penalties.
      features: features of the examples.
      mesh: devices to split the examples over.

    Raises:
      UserError: the features have another width than the fitted ones.
    """
    if features.ndim != 2 or features.shape[1] != fitted.weights.shape[1]:
        raise UserError(
            f"This probe was fitted to features of width {fitted.weights.shape[1]}, but is given "
            f"{list(features.shape)}: take both from the same model."
        )
    placed = _put(features.astype(np.float32, copy=False), len(features), mesh)
    program = _score_program(mesh)
    found = [program(placed, *one) for one in zip(fitted.weights, fitted.bias)]
    return np.stack([sharding.to_host(one)[: len(features)] for one in found])


def check_targets(targets: Shaped[np.ndarray, "*shape"], count: int, classes: int) -> None:
    """Checks the shape, type and range of targets.

    Raises:
      UserError: they do not fit the number of examples and classes.
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


def _groups(count: int, at_once: int, logits: float) -> list[Integer[np.ndarray, " size"]]:
    """Groups the indices of `count` penalties that are fitted together.

    All groups have one size, to share a program: the last penalty is repeated.

    Args:
      count: number of penalties.
      at_once: largest size of a group.
      logits: logits of one penalty on a device.
    """
    size = max(1, min(at_once, int(_LOGITS // logits)))
    groups = -(-count // size)
    return np.split(np.minimum(np.arange(groups * size), count - 1), groups)


def _put(rows: Shaped[np.ndarray, " n *d"], count: int, mesh: Mesh) -> Shaped[Array, " padded *d"]:
    """Splits rows that every process holds over all devices, zero-padded to at least `count`."""
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
def _rotation_program(mesh: Mesh):
    """Compiles the rotation: (features [m, d], count) -> `Features` without the count."""
    whole = sharding.replicated(mesh)

    def rotate(padded: Float32[Array, "m d"], count: Float32[Array, ""]):
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
    return jax.jit(rotate, out_shardings=(split, whole, whole, whole))


@functools.cache
def _fit_program(mesh: Mesh, classes: int, joint: bool):
    """Compiles the fit of placed features to labels [m] or [m, c]; it returns `Fitted`."""
    split = NamedSharding(mesh, PartitionSpec(None, None, sharding.AXES))

    def run(features, count, labels, penalties, weights, bias, max_iter, tolerance):
        rows, moments, axes, mean = features
        each = jnp.arange(classes, dtype=jnp.int32)[:, None]
        targets = (labels == each).astype(jnp.int8) if joint else labels.T
        unpenalised = jnp.ones(len(moments)).at[-1].set(0)
        problem = lbfgs.Problem(
            rows=rows,
            moments=moments,
            targets=targets,
            penalty=penalties[:, None, None] / count * unpenalised,
            count=count,
            joint=joint,
            split=split,
        )
        level = bias + _product("kdc,d->kc", weights, mean)
        start = jnp.concatenate([_product("kdc,dr->kcr", weights, axes), level[..., None]], axis=-1)
        if joint:  # a common part of all classes has no effect on the softmax
            start -= start.mean(axis=1, keepdims=True)
        found, iterations, converged = lbfgs.minimise(problem, start, max_iter, tolerance)
        weights = _product("kcr,dr->kdc", found[..., :-1], axes)
        bias = found[..., -1] - _product("kdc,d->kc", weights, mean)
        return weights, bias, iterations.max(axis=1), converged.all(axis=1)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))


@functools.cache
def _score_program(mesh: Mesh):
    def score(
        features: Float32[Array, "n d"], weights: Float32[Array, "d c"], bias: Float32[Array, " c"]
    ) -> Float32[Array, "n c"]:
        return _product("nd,dc->nc", features, weights) + bias

    return jax.jit(score, out_shardings=sharding.replicated(mesh))
