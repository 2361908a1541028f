"""Tests the accuracy that python -m clip_jax plan --budget predicts, on published results.

    python benchmarks/accuracy.py

Prints how far the law of clip_jax/plan/accuracy.py is off where it has not seen a result: each
result alone left out, all of one model, all of one collection of data, and those of more pairs than
it was fitted to. A quarter of a minute on a CPU.
"""

from collections.abc import Callable, Hashable

import numpy as np

from clip_jax.common.formatting import aligned
from clip_jax.plan import accuracy
from clip_jax.plan.accuracy import Law, Result

SPLIT = 3.5e9  # pairs seen; the study of 2025 ends at 3 billion


def source(result: Result) -> str:
    return result.source.split("@")[0].removeprefix("github.com/")


def left_out(results: list[Result], group: Callable[[Result], Hashable]) -> np.ndarray:
    """Returns the errors, in points, of predictions without the results of the same group."""
    errors = np.zeros(len(results))
    for name in {group(result) for result in results}:
        law = Law([result for result in results if group(result) != name])
        for i, result in enumerate(results):
            if group(result) == name:
                errors[i] = 100 * (law.predict(result.setting).top1 - result.top1)
    return errors


def new_data(results: list[Result]) -> tuple[np.ndarray, float]:
    """Returns the errors, in points, on data of which no result is known, and the coverage.

    Each collection counts the same in the coverage, however many results it has.
    """
    errors, coverage = [], []
    for name in sorted({result.setting.collection for result in results}):
        law = Law([result for result in results if result.setting.collection != name])
        chosen = [result for result in results if result.setting.collection == name]
        found = [law.predict(result.setting) for result in chosen]
        errors += [100 * (p.top1 - result.top1) for p, result in zip(found, chosen)]
        coverage.append(np.mean([p.low <= r.top1 <= p.high for p, r in zip(found, chosen)]))
    return np.array(errors), float(np.mean(coverage))


def extrapolated(results: list[Result]) -> np.ndarray:
    """Returns the errors of the long runs, predicted from the short ones ."""
    law = Law([result for result in results if result.setting.seen < SPLIT])
    known = {result.setting.collection for result in results if result.setting.seen < SPLIT}
    long = [r for r in results if r.setting.seen >= SPLIT and r.setting.collection in known]
    return np.array([100 * (law.predict(r.setting).top1 - r.top1) for r in long])


def row(name: str, errors: np.ndarray) -> list[str]:
    size = abs(errors)
    cells = [size.mean(), np.quantile(size, 0.9), errors.mean()]
    return [name, str(len(errors)), *(f"{cell:.2f}" for cell in cells)]


def main() -> None:
    results = list(accuracy.published())
    law = Law(results)
    error, inside = law.leave_one_out()
    alone = 100 * accuracy.top1_errors(results, error)
    table = [["left out, then predicted", "results", "mean", "90 % below", "bias"]]
    table.append(row("each result", alone))
    for name in sorted({source(result) for result in results}):
        chosen = np.array([source(result) == name for result in results])
        table.append(row(f"  of {name}", alone[chosen]))
    for low, high in ((0.0, 0.4), (0.4, 0.6), (0.6, 0.7), (0.7, 1.0)):
        chosen = np.array([low <= result.top1 < high for result in results])
        table.append(row(f"  top-1 {low:.0%} to {high:.0%}", alone[chosen]))
    table.append(row("all of a model", left_out(results, lambda r: r.model)))
    new, covered = new_data(results)
    table.append(row("all of a collection, as unknown data", new))
    table.append(row(f"more than {SPLIT / 1e9:.1f}B pairs seen", extrapolated(results)))
    print("Points of top-1:")
    print(aligned(table, "<>>>>"))
    print(
        f"Within the interval of {accuracy.COVERAGE:.0%}, each left out: {inside:.1%}; of data "
        f"without any result, collections counted the same: {covered:.1%}."
    )
    names = ("c", "A", "a", "B", "b", "C", "u", "k", "ResNet", *law.collections, *accuracy.RECIPES)
    raw = dict(zip(names, law.coefficients))
    shown = {k: np.exp(v) if k in ("c", "A", "B", "C") else v for k, v in raw.items()}
    print("Fitted: " + ", ".join(f"{name} {value:.3g}" for name, value in shown.items()) + ".")
    print(f"Noise {law.noise:.3f}, data {law.spread:.3f}, in logarithms of odds.")


if __name__ == "__main__":
    main()
