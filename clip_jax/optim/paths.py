"""Parameters chosen by regular expressions on their paths: what learns, and how fast."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import sharding
from clip_jax.errors import UserError

_STACK = "/blocks/"  # in the path of parameters whose first dimension is the layer


def compile_pattern(pattern: str, setting: str) -> re.Pattern[str]:
    """Compiles a regular expression; UserError, naming the setting, where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{setting} {pattern!r} is no regular expression: {error}.") from None


def find(params: Any, pattern: str, setting: str) -> Any:
    """Returns True for the parameters whose path the regular expression of a setting finds.

    Raises:
      UserError: the pattern is no regular expression, or finds nothing.
    """
    expression = compile_pattern(pattern, setting)
    found = jax.tree_util.tree_map_with_path(
        lambda path, _: bool(expression.search(sharding.path_name(path))), params
    )
    if not any(jax.tree.leaves(found)):
        raise UserError(
            f"{setting} {pattern!r} finds no parameter: their paths begin with "
            f"{', '.join(sorted(params))}."
        )
    return found


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors on the learning rate, by patterns on the paths of parameters.

    The layers of a stack have paths of their own, "text/transformer/blocks/3/mlp_in/kernel", in
    which the number is the layer's. A factor of 0 freezes: such a parameter takes no gradient, no
    decay and, unless other layers of its stack learn, no optimiser state.

    Attributes:
      lines: pairs of a regular expression and its factor.
    """

    lines: tuple[tuple[re.Pattern[str], float], ...]

    @classmethod
    def parse(cls, table: str) -> "Factors":
        """Parses config.optim.factors, "PATTERN=FACTOR" separated by spaces.

        Raises:
          UserError: a line is none.
        """
        lines = []
        for line in table.split():
            pattern, _, number = line.rpartition("=")
            try:
                factor = float(number)
            except ValueError:
                factor = -1.0
            if not pattern or not 0 <= factor < float("inf"):
                raise UserError(
                    f"optim.factors has {line!r}: write PATTERN=FACTOR, a regular expression on "
                    "the paths of parameters and a number of at least 0, such as '^image/=0', "
                    "and spaces between several."
                )
            lines.append((compile_pattern(pattern, "optim.factors"), factor))
        return cls(tuple(lines))

    def by_parameter(self, params: Any) -> Any:
        """Returns the factor of each parameter; where layers of a stack differ, an array of them.

        Raises:
          UserError: a pattern finds nothing, two that find the same have different factors, or
            nothing learns.
        """
        used: set[str] = set()

        def factor(path: tuple, leaf: Any) -> Any:
            name = sharding.path_name(path)
            before, stack, after = name.partition(_STACK)
            if not stack:
                return self._factor(name, used)
            layers = [
                self._factor(f"{before}{stack}{layer}/{after}", used)
                for layer in range(leaf.shape[0])
            ]
            if len(set(layers)) == 1:
                return layers[0]
            return np.reshape(np.array(layers, np.float32), (-1, *[1] * (leaf.ndim - 1)))

        found = jax.tree_util.tree_map_with_path(factor, params)
        if unused := [pattern.pattern for pattern, _ in self.lines if pattern.pattern not in used]:
            names = [sharding.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
            example = next((name for name in names if _STACK in name), names[0])
            example = example.replace(_STACK, f"{_STACK}0/")
            raise UserError(
                f"optim.factors: {', '.join(map(repr, unused))} finds no parameter. Their paths "
                f"are like {example!r}, and begin with {', '.join(sorted(params))}."
            )
        if not any(np.any(factor) for factor in jax.tree.leaves(found)):
            raise UserError("optim.factors freezes every parameter: nothing would learn.")
        return found

    def learns(self, params: Any) -> Any:
        """Tells which parameters learn, each layer of a stack on its own; {}: all of them."""
        if not self.lines:
            return {}
        return jax.tree.map(lambda factor: np.ravel(factor) != 0, self.by_parameter(params))

    def select(self, params: Any) -> Any:
        """Returns the parameters that learn; the others are None, which is no leaf."""
        if not self.lines:
            return params
        return jax.tree.map(lambda x, any_: x if any_.any() else None, params, self.learns(params))

    def scale(self, updates: Any, params: Any) -> Any:
        """Multiplies the updates of those that learn by their factors.

        Args:
          updates: from the optimiser.
          params: all parameters, or their shapes.
        """
        if not self.lines:
            return updates
        return jax.tree.map(
            lambda factor, x: None if x is None else x * jnp.asarray(factor, x.dtype),
            self.by_parameter(params),
            updates,
        )

    def summary(self, params: Any) -> str:
        """Describes what the factors do to a model's parameters; "" where there are none."""
        if not self.lines:
            return ""
        counts: dict[float, float] = {}
        for factor, leaf in zip(
            jax.tree.leaves(self.by_parameter(params)), jax.tree.leaves(params)
        ):
            for each in np.ravel(factor):
                counts[float(each)] = counts.get(float(each), 0) + leaf.size / np.size(factor)
        names = {0.0: "are frozen", 1.0: "learn"}
        parts = [
            f"{count / 1e6:,.3g} M {names.get(factor) or f'learn at {factor:g} of the rate'}"
            for factor, count in sorted(counts.items())
        ]
        return f"Of the parameters {', '.join(parts)}."

    def _factor(self, name: str, used: set[str]) -> float:
        found = [(p.pattern, factor) for p, factor in self.lines if p.search(name)]
        used.update(pattern for pattern, _ in found)
        if len({factor for _, factor in found}) > 1:
            listed = " and ".join(f"{pattern!r} ({factor:g})" for pattern, factor in found)
            raise UserError(
                f"optim.factors: {listed} both find {name!r}: let only one of them find it."
            )
        return found[0][1] if found else 1.0


ALL = Factors(())  # every parameter learns at the learning rate


def merge(learnt: Any, params: Any) -> Any:
    """Puts parameters that learn into the place of the same ones among all."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, learnt, params, is_leaf=lambda x: x is None
    )
