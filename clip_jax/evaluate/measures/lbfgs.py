"""L-BFGS for many logistic regressions at once, on the same examples.

Two properties make it faster than a general optimiser. Logits are linear in the weights, so a step
of any length along a direction needs no further product with the features: each iteration reads
them twice, and its line search is close to exact. And if all examples had the same probabilities,
the Hessian would be known and easily inverted in the features' principal axes: every iteration
takes that inverse as the initial one of its two loops.

A regression has converged when the next step is expected to lower its objective by no more than
`tolerance` of it. No fixed norm of the gradient would do. Where classes are separable and the
penalty is weak, the objective itself falls to 1e-8 per example, and its gradient with it. For the
same reason float32 holds the probabilities of wrong answers, which may be as small, and never
their complements.

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
# Steps that must be remembered for the expected decrease to be believed.
_MEMORY = 5
_TRIALS = 20  # step lengths of a line search; only rounding uses them up
_EPSILON = float(jnp.finfo(jnp.float32).eps)


class Problem(NamedTuple):
    """Regressions that share their features; the objective is a mean over the examples.

    Attributes:
      rows: centred features in their principal axes; last row 1, padding 0.
      moments: mean squares of the rows.
      targets: 1 of this class, 0 not, -1 neither, and not to be counted.
      penalty: factor of the halved squares of the weights.
      count: number of examples.
      joint: whether there is one softmax over the classes, or a sigmoid for each.
      split: sharding of an array [k, c, m].
    """

    rows: Float[Array, "d m"]
    moments: Float[Array, " d"]
    targets: Int8[Array, "c m"]
    penalty: Float[Array, "k 1 d"]
    count: Float[Array, ""]
    joint: bool
    split: jax.sharding.NamedSharding

    def logits(self, weights: Float[Array, "k c d"]) -> Float[Array, "k c m"]:
        """Computes the logits of all examples."""
        logits = jnp.einsum("kcd,dm->kcm", weights, self.rows, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.with_sharding_constraint(logits, self.split)

    def errors(self, logits: Float[Array, "k c m"]) -> Float[Array, "k c m"]:
        """Computes the probability of each wrong answer.

        That is the class's probability where it is not the target, and all others' where it is:
        the absolute value of the loss's derivative by the logits. Near certainty 1 - p would be
        rounding, so it is never computed.
        """
        if not self.joint:
            return jnp.where(
                self.targets < 0, 0, jax.nn.sigmoid(jnp.where(self.targets > 0, -logits, logits))
            )
        others = jnp.where(self.targets > 0, 0, jax.nn.softmax(logits, axis=1))
        return jnp.where(self.targets > 0, others.sum(axis=1, keepdims=True), others)

    def relative(self, logits: Float[Array, "k c m"]) -> Float[Array, "k c m"]:
        """Subtracts the target's logit from those of an example, which changes no softmax."""
        if not self.joint:
            return logits
        return logits - jnp.where(self.targets > 0, logits, 0).sum(axis=1, keepdims=True)

    def slopes(self, errors: Float[Array, "k c m"]) -> Float[Array, "k c m"]:
        """Computes the derivative of the loss by the logits.

        Padding needs no mask here: its rows are zero wherever slopes are multiplied with them.
        """
        return jnp.where(self.targets > 0, -errors, errors)

    def objective(
        self, weights: Float[Array, "k c d"], errors: Float[Array, "k c m"]
    ) -> Float[Array, "k r"]:
        """Computes the mean loss and the penalty."""
        errors = jnp.where(self.targets > 0, errors, 0) if self.joint else errors
        losses = self.rows[-1] * jnp.log1p(-jnp.minimum(errors, 1 - _EPSILON))
        penalty = self.dot(weights, self.penalty * weights) / 2
        return penalty - self.dot(losses, jnp.ones_like(losses)) / self.count

    def gradient(
        self, weights: Float[Array, "k c d"], errors: Float[Array, "k c m"]
    ) -> Float[Array, "k c d"]:
        """Computes the gradient of the objective by the weights."""
        slopes = self.slopes(errors)
        sums = jnp.einsum("kcm,dm->kcd", slopes, self.rows, precision=jax.lax.Precision.HIGHEST)
        return sums / self.count + self.penalty * weights

    def dot(self, a: Float[Array, "k c x"], b: Float[Array, "k c x"]) -> Float[Array, "k r"]:
        """Computes the inner product of each regression, over weights or over logits."""
        sums = (a * b).sum(axis=-1)
        return sums.sum(axis=1, keepdims=True) if self.joint else sums

    def curvature(
        self, errors: Float[Array, "k c m"], change: Float[Array, "k c m"]
    ) -> Float[Array, "k r"]:
        """Computes the second derivative of the loss along a `relative` change of the logits."""
        weighted = errors * change
        if self.joint:  # the target's change is 0
            variance = (weighted * change).sum(axis=1) - weighted.sum(axis=1) ** 2
            return variance.sum(axis=-1)[:, None] / self.count
        return (weighted * (1 - errors) * change).sum(axis=-1) / self.count

    def variance(self, errors: Float[Array, "k c m"]) -> Float[Array, "k c"]:
        """Computes the means of p (1 - p) over the examples, above 0."""
        variance = (errors * (1 - errors) * self.rows[-1]).sum(axis=-1) / self.count
        # An intercept without a penalty falls for ever where a class has no example.
        largest = variance.max(axis=1, keepdims=True) if self.joint else variance
        return jnp.maximum(variance, jnp.maximum(_EPSILON * largest, _EPSILON**2))

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
      logits, errors: predictions of the weights; `Problem.relative` ones.
      s: last changes of the weights.
      y: last changes of the gradient.
      rho: 1 / (s . y); 0 where nothing is remembered.
      direction: direction of the next step.
      slope: derivative of the objective along the direction.
      iterations: iterations until the regression was done.
      converged: whether it has converged.
      done: whether it has converged, or no step improves it.
    """

    step: Int[Array, ""]
    weights: Float[Array, "k c d"]
    gradient: Float[Array, "k c d"]
    logits: Float[Array, "k c m"]
    errors: Float[Array, "k c m"]
    s: Float[Array, "history k c d"]
    y: Float[Array, "history k c d"]
    rho: Float[Array, "history k r"]
    direction: Float[Array, "k c d"]
    slope: Float[Array, "k r"]
    iterations: Int[Array, "k r"]
    converged: Bool[Array, "k r"]
    done: Bool[Array, "k r"]


def minimise(
    problem: Problem,
    start: Float[Array, "k c d"],
    max_iter: Int[Array, ""],
    tolerance: Float[Array, ""],
) -> tuple[Float[Array, "k c d"], Int[Array, "k r"], Bool[Array, "k r"]]:
    """Minimises the objective until a step is expected to lower it by `tolerance` of itself.

    Args:
      problem: the regressions.
      start: initial weights. Where the classes are fitted jointly they sum to zero over the
        classes, and so do the results.
      max_iter: most iterations.
      tolerance: expected decrease at which a regression has converged, as a fraction of the
        objective.

    Returns:
      Weights, iterations, and whether each regression converged.
    """
    logits = problem.relative(problem.logits(start))
    errors = problem.errors(logits)
    gradient = problem.gradient(start, errors)
    nothing = jnp.zeros((_HISTORY, *start.shape))
    none = jnp.zeros_like(problem.dot(gradient, gradient))
    state = State(
        step=jnp.int32(0),
        weights=start,
        gradient=gradient,
        logits=logits,
        errors=errors,
        s=nothing,
        y=nothing,
        rho=jnp.zeros((_HISTORY, *none.shape)),
        direction=start,
        slope=none,
        iterations=none.astype(jnp.int32),
        converged=none > 0,
        done=none > 0,
    )
    state = jax.lax.while_loop(
        lambda state: (state.step < max_iter) & ~state.done.all(),
        functools.partial(_iterate, problem, tolerance),
        _aim(problem, state),
    )
    return state.weights, state.iterations, state.converged


def _iterate(problem: Problem, tolerance: Float[Array, ""], state: State) -> State:
    change = problem.relative(problem.logits(state.direction))
    length, found = _line_search(problem, state, change)
    length = jnp.where(found, length, 0)[..., None]
    weights = state.weights + length * state.direction
    logits = state.logits + length * change
    errors = problem.errors(logits)
    gradient = problem.gradient(weights, errors)

    s, y = weights - state.weights, gradient - state.gradient
    product = problem.dot(s, y)
    rho = jnp.where(product > 0, 1 / jnp.where(product > 0, product, 1), 0)
    slot = state.step % _HISTORY
    # A regression that finds no step along its direction forgets its history and tries the plain
    # Newton step. One that has no history either is as good as float32 can make it.
    stuck = ~found & ~(state.rho > 0).any(axis=0)
    state = state._replace(
        step=state.step + 1,
        weights=weights,
        gradient=gradient,
        logits=logits,
        errors=errors,
        s=state.s.at[slot].set(s),
        y=state.y.at[slot].set(y),
        rho=jnp.where(found, state.rho.at[slot].set(rho), 0),
        iterations=state.iterations + ~state.done,
    )
    state = _aim(problem, state)
    # Half the slope is what a Newton step would gain.
    is_small = -state.slope <= 2 * tolerance * problem.objective(weights, errors)
    is_known = stuck | ((state.rho > 0).sum(axis=0) >= _MEMORY)
    converged = state.converged | (is_small & is_known & ~state.done)
    return state._replace(converged=converged, done=state.done | converged | stuck)


def _aim(problem: Problem, state: State) -> State:
    """Returns the state with the direction of its next step."""
    direction = _direction(problem, state)
    return state._replace(direction=direction, slope=problem.dot(state.gradient, direction))


def _direction(problem: Problem, state: State) -> Float[Array, "k c d"]:
    """Runs the two loops of L-BFGS (Nocedal and Wright, algorithm 7.4)."""
    variance = problem.variance(state.errors)

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
    change: Float[Array, "k c m"],
) -> tuple[Float[Array, "k r"], Bool[Array, "k r"]]:
    """Finds step lengths at which the slope is nearly zero.

    The objective is convex, so the slope rises with the length: Newton's method, kept within the
    bracket.

    Args:
      problem: the regressions.
      state: current iterates, and the directions of their steps.
      change: the directions in logits.

    Returns:
      Lengths, and whether each was found.
    """
    first, direction = state.slope, state.direction
    # The penalty's slope at length 0, and its curvature.
    penalty_slope = problem.dot(state.weights, problem.penalty * direction)
    penalty_curvature = problem.dot(direction, problem.penalty * direction)
    finished = state.done | ~(first < 0)

    def slope_and_curvature(length):
        errors = problem.errors(state.logits + length[..., None] * change)
        slope = problem.dot(problem.slopes(errors), change) / problem.count
        curvature = problem.curvature(errors, change) + penalty_curvature
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
