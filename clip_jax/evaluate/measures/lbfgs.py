"""L-BFGS for many logistic regressions at once, on the same examples.

Two things are made use of that a general optimiser does not know. Logits are linear in the weights,
so that a step of any length along a direction needs no further product with the features: each
iteration reads them twice, and its line search is close to exact. And if all examples had the same
probabilities, the Hessian would be known and in the features' principal axes easily inverted: that
is where every iteration starts its estimate.

Shapes: k strengths, c classes, d axes (the last one is the intercept's), m examples, padded.
Functions of a regression have shape [k, 1] where its classes are fitted jointly (softmax), [k, c]
where each class is a regression of its own (sigmoid); either goes with [k, c].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_HISTORY = 10  # steps remembered, as in scikit-learn
_SLOPE = 0.3  # a step ends where the slope along it is this share of its slope at the start
_TRIALS = 20  # of step lengths; rounding is what uses them up
_EPSILON = float(jnp.finfo(jnp.float32).eps)


class Problem(NamedTuple):
    """Regressions that share their features; means over the examples of the loss and the penalty.

    Attributes:
      rows: float32 [d, m], centred features in their principal axes; last row 1, padding 0.
      moments: float32 [d], mean squares of the rows.
      targets: int8 [c, m]: 1 of this class, 0 not, -1 neither, and not to be counted.
      penalty: float32 [k, 1, d], of the weights' squares, halved.
      units: float32 [d], that the gradient is measured in.
      count: of examples.
      joint: softmax over the classes, or a sigmoid for each.
      split: sharding of an array [k, c, m].
    """

    rows: jax.Array
    moments: jax.Array
    targets: jax.Array
    penalty: jax.Array
    units: jax.Array
    count: jax.Array
    joint: bool
    split: jax.sharding.NamedSharding

    def logits(self, weights: jax.Array) -> jax.Array:
        """[k, c, d] -> [k, c, m]."""
        logits = jnp.einsum("kcd,dm->kcm", weights, self.rows, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.with_sharding_constraint(logits, self.split)

    def probabilities(self, logits: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits, axis=1) if self.joint else jax.nn.sigmoid(logits)

    def residuals(self, probabilities: jax.Array) -> jax.Array:
        """Of probabilities [k, c, m]. Padding needs no care: its rows are zero."""
        return jnp.where(self.targets < 0, 0, probabilities - self.targets)

    def gradient(self, weights: jax.Array, probabilities: jax.Array) -> jax.Array:
        """[k, c, d]."""
        residuals = self.residuals(probabilities)
        sums = jnp.einsum("kcm,dm->kcd", residuals, self.rows, precision=jax.lax.Precision.HIGHEST)
        return sums / self.count + self.penalty * weights

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Over weights [k, c, d], or over logits [k, c, m]."""
        sums = (a * b).sum(axis=-1)
        return sums.sum(axis=1, keepdims=True) if self.joint else sums

    def norm(self, gradient: jax.Array) -> jax.Array:
        scaled = gradient / self.units
        return jnp.sqrt(self.dot(scaled, scaled))

    def bend(self, probabilities: jax.Array, change: jax.Array) -> jax.Array:
        """Second derivative of the loss along a change of the logits [k, c, m]."""
        weighed = probabilities * change
        if self.joint:
            spread = (weighed * change).sum(axis=1) - weighed.sum(axis=1) ** 2
            return spread.sum(axis=-1)[:, None] / self.count
        spread = jnp.where(self.targets < 0, 0, weighed * (1 - probabilities) * change)
        return spread.sum(axis=-1) / self.count

    def spread(self, probabilities: jax.Array) -> jax.Array:
        """[k, c], means of p (1 - p); where no example is in doubt, the least that is not zero."""
        counted = self.rows[-1] * (self.targets >= 0)
        spread = (probabilities * (1 - probabilities) * counted).sum(axis=-1) / self.count
        return jnp.maximum(spread, _EPSILON)

    def solve(self, spread: jax.Array, gradient: jax.Array) -> jax.Array:
        """[k, c, d], the Newton step if all examples had the same probabilities.

        The Hessian's part for an axis of moment s is then s (diag(a) - a a' / sum(a)) + penalty for
        a softmax, and without the second term for sigmoids. The former is solved for steps that sum
        to zero over the classes, as the optimum's weights do.
        """
        # Smaller moments are rounding.
        moments = jnp.maximum(self.moments, _EPSILON * self.moments.max())
        scale = 1 / (spread[..., None] * moments + self.penalty)
        if not self.joint:
            return scale * gradient
        step = scale * (gradient - gradient.mean(axis=1, keepdims=True))
        share = spread[..., None] * scale
        return step - share * step.sum(axis=1, keepdims=True) / share.sum(axis=1, keepdims=True)


class State(NamedTuple):
    """Of all regressions after a number of iterations.

    Attributes:
      step: iterations done.
      weights, gradient: [k, c, d].
      logits, probabilities: [k, c, m], of the weights.
      moves, turns: [history, k, c, d], the last changes of the weights and of the gradient.
      ratios: [history, k, 1 | c], 1 / (move . turn); 0: nothing remembered there.
      iterations: int32 [k, 1 | c], until it was done.
      done: bool [k, 1 | c], converged, or no step leads on.
    """

    step: jax.Array
    weights: jax.Array
    gradient: jax.Array
    logits: jax.Array
    probabilities: jax.Array
    moves: jax.Array
    turns: jax.Array
    ratios: jax.Array
    iterations: jax.Array
    done: jax.Array


def minimise(problem: Problem, start: jax.Array, max_iter: jax.Array, tolerance: jax.Array):
    """From weights [k, c, d] until each gradient's norm is at most `tolerance`.

    Weights that are fitted jointly start, and remain, with a sum of zero over the classes.

    Returns:
      Weights [k, c, d]; iterations int32 and converged bool, both [k, 1 | c].
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
        moves=nothing,
        turns=nothing,
        ratios=jnp.zeros((_HISTORY, *norm.shape)),
        iterations=jnp.zeros(norm.shape, jnp.int32),
        done=norm <= tolerance,
    )
    state = jax.lax.while_loop(
        lambda state: (state.step < max_iter) & ~state.done.all(),
        functools.partial(_iterate, problem, tolerance),
        state,
    )
    return state.weights, state.iterations, problem.norm(state.gradient) <= tolerance


def _iterate(problem: Problem, tolerance: jax.Array, state: State) -> State:
    direction = _direction(problem, state)
    change = problem.logits(direction)
    length, found = _search(problem, state, direction, change)
    length = jnp.where(found, length, 0)[..., None]
    weights = state.weights + length * direction
    logits = state.logits + length * change
    probabilities = problem.probabilities(logits)
    gradient = problem.gradient(weights, probabilities)

    move, turn = weights - state.weights, gradient - state.gradient
    product = problem.dot(move, turn)
    ratio = jnp.where(product > 0, 1 / jnp.where(product > 0, product, 1), 0)
    place = state.step % _HISTORY
    # Without a step along its direction, a regression forgets; when it has nothing to forget, its
    # gradient is as small as float32 can make it.
    knew = (state.ratios > 0).any(axis=0)
    ratios = jnp.where(found, state.ratios.at[place].set(ratio), 0)
    return State(
        step=state.step + 1,
        weights=weights,
        gradient=gradient,
        logits=logits,
        probabilities=probabilities,
        moves=state.moves.at[place].set(move),
        turns=state.turns.at[place].set(turn),
        ratios=ratios,
        iterations=state.iterations + ~state.done,
        done=state.done | (problem.norm(gradient) <= tolerance) | ~(found | knew),
    )


def _direction(problem: Problem, state: State) -> jax.Array:
    """The two loops of L-BFGS (Nocedal and Wright, algorithm 7.4): [k, c, d]."""
    spread = problem.spread(state.probabilities)

    def back(i, carry):
        rest, shares = carry
        at = (state.step - 1 - i) % _HISTORY
        share = state.ratios[at] * problem.dot(state.moves[at], rest)
        return rest - share[..., None] * state.turns[at], shares.at[at].set(share)

    def forth(i, ahead):
        at = (state.step + i) % _HISTORY
        share = state.ratios[at] * problem.dot(state.turns[at], ahead)
        return ahead + (shares[at] - share)[..., None] * state.moves[at]

    rest, shares = jax.lax.fori_loop(
        0, _HISTORY, back, (state.gradient, jnp.zeros_like(state.ratios))
    )
    last = (state.step - 1) % _HISTORY
    turn = state.turns[last]
    size = problem.dot(turn, problem.solve(spread, turn)) * state.ratios[last]
    scale = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 1)
    ahead = scale[..., None] * problem.solve(spread, rest)
    return -jax.lax.fori_loop(0, _HISTORY, forth, ahead)


def _search(problem: Problem, state: State, direction: jax.Array, change: jax.Array):
    """Lengths [k, 1 | c] at which the slope is nearly level, and whether they were found.

    The slope rises with the length, since the objective is convex: Newton's method, kept within
    the bracket. `change` is the direction in logits, [k, c, m].
    """
    first = problem.dot(state.gradient, direction)
    pull = problem.dot(state.weights, problem.penalty * direction)
    drag = problem.dot(direction, problem.penalty * direction)
    finished = state.done | ~(first < 0)

    def slope_at(length):
        probabilities = problem.probabilities(state.logits + length[..., None] * change)
        slope = problem.dot(problem.residuals(probabilities), change) / problem.count
        return slope + pull + length * drag, problem.bend(probabilities, change) + drag

    def level(slope):
        return jnp.abs(slope) <= _SLOPE * -first

    def unfinished(carry):
        trial, _, slope, *_ = carry
        return (trial < _TRIALS) & ~(level(slope) | finished).all()

    def refine(carry):
        trial, length, slope, bend, low, high = carry
        low = jnp.where(slope < 0, length, low)
        high = jnp.where(slope < 0, high, length)
        newton = length - slope / bend
        inside = (newton > low) & (newton < jnp.minimum(high, 10 * length))
        halved = jnp.where(jnp.isinf(high), 10 * length, (low + high) / 2)
        length = jnp.where(level(slope), length, jnp.where(inside, newton, halved))
        return trial + 1, length, *slope_at(length), low, high

    ones = jnp.ones_like(first)
    start = (1, ones, *slope_at(ones), 0 * ones, jnp.inf * ones)
    _, length, slope, *_ = jax.lax.while_loop(unfinished, refine, start)
    return length, level(slope) & ~finished
