"""L-BFGS for many logistic regressions at once, on the same examples.

Two properties make it faster than a general optimiser. Logits are linear in the weights, so a step
of any length along a direction needs no further product with the features: each iteration reads
them twice, and its line search is close to exact. And if all examples had the same probabilities,
the Hessian would be known and easily inverted in the features' principal axes: every iteration
takes that inverse as the initial one of its two loops.

Shapes: k penalties, c classes, d axes (the last one is the intercept's), m examples, padded.
Quantities of one regression have shape [k, 1] where its classes are fitted jointly (softmax), and
[k, c] where each class is a regression of its own (sigmoid); in annotations this axis is r, and
either broadcasts against [k, c].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

_HISTORY = 10  # steps remembered, as in scikit-learn
# A line search ends where the slope is at most this fraction of the slope at its start.
_CURVATURE_CONDITION = 0.3
_TRIALS = 20  # step lengths of a line search; only rounding uses them up
_EPSILON = float(jnp.finfo(jnp.float32).eps)


class Problem(NamedTuple):
    """Regressions that share their features; the objective is a mean over the examples.

    Attributes:
      rows: centred features in their principal axes; last row 1, padding 0.
      moments: mean squares of the rows.
      targets: 1 of this class, 0 not, -1 neither, and not to be counted.
      penalty: factor of the halved squares of the weights.
      units: units in which the gradient is measured.
      count: number of examples.
      joint: whether there is one softmax over the classes, or a sigmoid for each.
      split: sharding of an array [k, c, m].
    """

    rows: Float[Array, "d m"]
    moments: Float[Array, " d"]
    targets: Int8[Array, "c m"]
    penalty: Float[Array, "k 1 d"]
    units: Float[Array, " d"]
    count: Float[Array, ""]
    joint: bool
    split: jax.sharding.NamedSharding

    def logits(self, weights: Float[Array, "k c d"]) -> Float[Array, "k c m"]:
        """Computes the logits of all examples."""
        logits = jnp.einsum("kcd,dm->kcm", weights, self.rows, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.with_sharding_constraint(logits, self.split)

    def probabilities(self, logits: Float[Array, "k c m"]) -> Float[Array, "k c m"]:
        """Applies the softmax, or the sigmoids."""
        return jax.nn.softmax(logits, axis=1) if self.joint else jax.nn.sigmoid(logits)

    def residuals(self, probabilities: Float[Array, "k c m"]) -> Float[Array, "k c m"]:
        """Computes the derivative of the loss by the logits.

        Padding needs no mask here: its rows are zero wherever residuals are multiplied with them.
        """
        return jnp.where(self.targets < 0, 0, probabilities - self.targets)

    def gradient(
        self, weights: Float[Array, "k c d"], probabilities: Float[Array, "k c m"]
    ) -> Float[Array, "k c d"]:
        """Computes the gradient of the objective by the weights."""
        residuals = self.residuals(probabilities)
        sums = jnp.einsum("kcm,dm->kcd", residuals, self.rows, precision=jax.lax.Precision.HIGHEST)
        return sums / self.count + self.penalty * weights

    def dot(self, a: Float[Array, "k c x"], b: Float[Array, "k c x"]) -> Float[Array, "k r"]:
        """Computes the inner product of each regression, over weights or over logits."""
        sums = (a * b).sum(axis=-1)
        return sums.sum(axis=1, keepdims=True) if self.joint else sums

    def norm(self, gradient: Float[Array, "k c d"]) -> Float[Array, "k r"]:
        """Computes the Euclidean norm of a gradient in its units."""
        scaled = gradient / self.units
        return jnp.sqrt(self.dot(scaled, scaled))

    def curvature(
        self, probabilities: Float[Array, "k c m"], change: Float[Array, "k c m"]
    ) -> Float[Array, "k r"]:
        """Computes the second derivative of the loss along a change of the logits."""
        weighted = probabilities * change
        if self.joint:
            variance = (weighted * change).sum(axis=1) - weighted.sum(axis=1) ** 2
            return variance.sum(axis=-1)[:, None] / self.count
        variance = jnp.where(self.targets < 0, 0, weighted * (1 - probabilities) * change)
        return variance.sum(axis=-1) / self.count

    def variance(self, probabilities: Float[Array, "k c m"]) -> Float[Array, "k c"]:
        """Computes the means of p (1 - p) over the examples, at least the float32 epsilon."""
        counted = self.rows[-1] * (self.targets >= 0)
        variance = (probabilities * (1 - probabilities) * counted).sum(axis=-1) / self.count
        return jnp.maximum(variance, _EPSILON)

    def solve(
        self, variance: Float[Array, "k c"], gradient: Float[Array, "k c d"]
    ) -> Float[Array, "k c d"]:
        """Computes the Newton step as if all examples had the same probabilities.

        The Hessian's part for an axis of moment s is then s (diag(a) - a a' / sum(a)) + penalty for
        a softmax, and without the second term for sigmoids. The former is solved for steps that sum
        to zero over the classes, as the optimum's weights do.
        """
        # Smaller moments are rounding.
        moments = jnp.maximum(self.moments, _EPSILON * self.moments.max())
        scale = 1 / (variance[..., None] * moments + self.penalty)
        if not self.joint:
            return scale * gradient
        step = scale * (gradient - gradient.mean(axis=1, keepdims=True))
        weight = variance[..., None] * scale
        return step - weight * step.sum(axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True)


class State(NamedTuple):
    """The regressions after a number of iterations; s, y and rho as in Nocedal and Wright.

    Attributes:
      step: iterations done.
      weights, gradient: current iterate and its gradient.
      logits, probabilities: predictions of the weights.
      s: last changes of the weights.
      y: last changes of the gradient.
      rho: 1 / (s . y); 0 where nothing is remembered.
      iterations: iterations until the regression was done.
      done: whether it has converged, or no step improves it.
    """

    step: Int[Array, ""]
    weights: Float[Array, "k c d"]
    gradient: Float[Array, "k c d"]
    logits: Float[Array, "k c m"]
    probabilities: Float[Array, "k c m"]
    s: Float[Array, "history k c d"]
    y: Float[Array, "history k c d"]
    rho: Float[Array, "history k r"]
    iterations: Int[Array, "k r"]
    done: Bool[Array, "k r"]


def minimise(
    problem: Problem,
    start: Float[Array, "k c d"],
    max_iter: Int[Array, ""],
    tolerance: Float[Array, ""],
) -> tuple[Float[Array, "k c d"], Int[Array, "k r"], Bool[Array, "k r"]]:
    """Minimises the objective until the norm of each gradient is at most `tolerance`.

    Args:
      problem: the regressions.
      start: initial weights. Where the classes are fitted jointly they sum to zero over the
        classes, and so do the results.
      max_iter: most iterations.
      tolerance: norm of the gradient at which a regression has converged.

    Returns:
      Weights, iterations, and whether each regression converged.
    """
    logits = problem.logits(start)
    probabilities = problem.probabilities(logits)
    gradient = problem.gradient(start, probabilities)
    norm = problem.norm(gradient)
    nothing = jnp.zeros((_HISTORY, *start.shape))
    state = State(
        step=jnp.int32(0),
        weights=start,
        gradient=gradient,
        logits=logits,
        probabilities=probabilities,
        s=nothing,
        y=nothing,
        rho=jnp.zeros((_HISTORY, *norm.shape)),
        iterations=jnp.zeros(norm.shape, jnp.int32),
        done=norm <= tolerance,
    )
    state = jax.lax.while_loop(
        lambda state: (state.step < max_iter) & ~state.done.all(),
        functools.partial(_iterate, problem, tolerance),
        state,
    )
    return state.weights, state.iterations, problem.norm(state.gradient) <= tolerance


def _iterate(problem: Problem, tolerance: Float[Array, ""], state: State) -> State:
    direction = _direction(problem, state)
    change = problem.logits(direction)
    length, found = _line_search(problem, state, direction, change)
    length = jnp.where(found, length, 0)[..., None]
    weights = state.weights + length * direction
    logits = state.logits + length * change
    probabilities = problem.probabilities(logits)
    gradient = problem.gradient(weights, probabilities)

    s, y = weights - state.weights, gradient - state.gradient
    product = problem.dot(s, y)
    rho = jnp.where(product > 0, 1 / jnp.where(product > 0, product, 1), 0)
    slot = state.step % _HISTORY
    # A regression that finds no step along its direction forgets its history and tries the plain
    # Newton step. One that has no history either has a gradient as small as float32 can make it.
    remembered = (state.rho > 0).any(axis=0)
    return State(
        step=state.step + 1,
        weights=weights,
        gradient=gradient,
        logits=logits,
        probabilities=probabilities,
        s=state.s.at[slot].set(s),
        y=state.y.at[slot].set(y),
        rho=jnp.where(found, state.rho.at[slot].set(rho), 0),
        iterations=state.iterations + ~state.done,
        done=state.done | (problem.norm(gradient) <= tolerance) | ~(found | remembered),
    )


def _direction(problem: Problem, state: State) -> Float[Array, "k c d"]:
    """Runs the two loops of L-BFGS (Nocedal and Wright, algorithm 7.4)."""
    variance = problem.variance(state.probabilities)

    def newest_first(i, carry):
        q, alphas = carry
        at = (state.step - 1 - i) % _HISTORY
        alpha = state.rho[at] * problem.dot(state.s[at], q)
        return q - alpha[..., None] * state.y[at], alphas.at[at].set(alpha)

    def oldest_first(i, r):
        at = (state.step + i) % _HISTORY
        beta = state.rho[at] * problem.dot(state.y[at], r)
        return r + (alphas[at] - beta)[..., None] * state.s[at]

    q, alphas = jax.lax.fori_loop(
        0, _HISTORY, newest_first, (state.gradient, jnp.zeros_like(state.rho))
    )
    # The initial inverse Hessian, scaled to agree with the last step.
    last = (state.step - 1) % _HISTORY
    y = state.y[last]
    size = problem.dot(y, problem.solve(variance, y)) * state.rho[last]
    gamma = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 1)
    r = gamma[..., None] * problem.solve(variance, q)
    return -jax.lax.fori_loop(0, _HISTORY, oldest_first, r)


def _line_search(
    problem: Problem,
    state: State,
    direction: Float[Array, "k c d"],
    change: Float[Array, "k c m"],
) -> tuple[Float[Array, "k r"], Bool[Array, "k r"]]:
    """Finds step lengths at which the slope is nearly zero.

    The objective is convex, so the slope rises with the length: Newton's method, kept within the
    bracket.

    Args:
      problem: the regressions.
      state: current iterates.
      direction: direction of the step.
      change: the direction in logits.

    Returns:
      Lengths, and whether each was found.
    """
    first = problem.dot(state.gradient, direction)
    # The penalty's slope at length 0, and its curvature.
    penalty_slope = problem.dot(state.weights, problem.penalty * direction)
    penalty_curvature = problem.dot(direction, problem.penalty * direction)
    finished = state.done | ~(first < 0)

    def slope_and_curvature(length):
        probabilities = problem.probabilities(state.logits + length[..., None] * change)
        slope = problem.dot(problem.residuals(probabilities), change) / problem.count
        curvature = problem.curvature(probabilities, change) + penalty_curvature
        return slope + penalty_slope + length * penalty_curvature, curvature

    def is_level(slope):
        return jnp.abs(slope) <= _CURVATURE_CONDITION * -first

    def unfinished(carry):
        trial, _, slope, *_ = carry
        return (trial < _TRIALS) & ~(is_level(slope) | finished).all()

    def refine(carry):
        trial, length, slope, curvature, low, high = carry
        low = jnp.where(slope < 0, length, low)
        high = jnp.where(slope < 0, high, length)
        newton = length - slope / curvature
        inside = (newton > low) & (newton < jnp.minimum(high, 10 * length))
        bisected = jnp.where(jnp.isinf(high), 10 * length, (low + high) / 2)
        length = jnp.where(is_level(slope), length, jnp.where(inside, newton, bisected))
        return trial + 1, length, *slope_and_curvature(length), low, high

    ones = jnp.ones_like(first)
    start = (1, ones, *slope_and_curvature(ones), 0 * ones, jnp.inf * ones)
    _, length, slope, *_ = jax.lax.while_loop(unfinished, refine, start)
    return length, is_level(slope) & ~finished
