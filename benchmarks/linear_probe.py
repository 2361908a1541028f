"""The linear probe's sweep over L2 strengths: clip_jax next to scikit-learn, taking turns.

    python benchmarks/linear_probe.py
    python benchmarks/linear_probe.py --rounds=5 --tolerance=1e-6

10,000 training and 10,000 validation examples of 512 float32 features in 10 classes: four Gaussian
clusters per class, with variances that fall as 1/i along hidden axes. All use the same search from
coarse to fine (`clip_jax.evaluate.measures.sweep`): 15 strengths, L-BFGS, at most 1,000 iterations
each.

scikit-learn fits them one by one with BLAS on all cores, or one per core at a time, in separate
processes. It stops at a gradient of 1e-4 in the maximum norm, or of --tolerance;
clip_jax where a step is expected to lower the objective by no more than 1e-9 of it.
"""

import argparse
import os
import time

# Settings of the machine that slow OpenBLAS down; before NumPy is loaded.
for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(name, None)

import numpy as np  # noqa: E402
import turns  # noqa: E402

COMPETITORS = ("scikit-learn", "scikit-learn, fits in parallel", "clip_jax")
EXAMPLES, WIDTH, CLASSES, CLUSTERS = 10_000, 512, 10, 4


def make_examples() -> tuple[np.ndarray, np.ndarray]:
    """Makes features float32 [2 n, d] and classes int32 [2 n]; the first n are for training."""
    rng = np.random.default_rng(0)
    deviations = np.arange(1, WIDTH + 1) ** -0.5
    rotation, _ = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))
    centres = 0.3 * deviations * rng.standard_normal((CLASSES, CLUSTERS, WIDTH))
    classes = rng.integers(0, CLASSES, 2 * EXAMPLES, dtype=np.int32)
    hidden = centres[classes, rng.integers(0, CLUSTERS, 2 * EXAMPLES)]
    hidden += deviations * rng.standard_normal(hidden.shape)
    scale = 0.5 / np.sqrt(np.mean(deviations**2))
    features = scale * hidden @ rotation + 0.3 * rng.standard_normal(WIDTH)
    return features.astype(np.float32), classes


def accuracy(scores: np.ndarray, targets: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == targets).mean())


# ---- Competitors: each makes what sweeps once and says (accuracy, strength) --------------------


def scikit_learn_sweep(parallel: bool, tolerance: float):
    import joblib
    from sklearn.linear_model import LogisticRegression

    from clip_jax.evaluate.measures import sweep

    features, classes = make_examples()
    train, validation = slice(EXAMPLES), slice(EXAMPLES, None)

    def score(place: int) -> float:
        model = LogisticRegression(
            C=10 ** (-place / sweep.STEPS), max_iter=1000, tol=tolerance
        ).fit(features[train], classes[train])
        return accuracy(model.decision_function(features[validation]), classes[validation])

    def run() -> tuple[float, float]:
        found: dict[int, float] = {}

        def scores_at(places: list[int]) -> list[float]:
            jobs = os.cpu_count() if parallel else 1
            found.update(
                zip(places, joblib.Parallel(jobs)(joblib.delayed(score)(p) for p in places))
            )
            return [found[place] for place in places]

        best = sweep.search(scores_at)
        return found[best], 10 ** (best / sweep.STEPS)

    return run


def clip_jax_sweep():
    from clip_jax import sharding
    from clip_jax.evaluate.measures import sweep

    features, classes = make_examples()
    train = sweep.Split(features[:EXAMPLES], classes[:EXAMPLES])
    validation = sweep.Split(features[EXAMPLES:], classes[EXAMPLES:])
    mesh = sharding.make_mesh()

    def run() -> tuple[float, float]:
        best = sweep.choose(train, validation, accuracy, CLASSES, mesh).best
        return best.score, best.l2

    return run


# ---- The run -----------------------------------------------------------------------------------


def work(competitor: str, tolerance: float) -> None:
    """Runs a competitor; the loss of `turns` is the best validation accuracy."""

    def prepare() -> tuple[turns.Step, dict]:
        if competitor == "clip_jax":
            run = clip_jax_sweep()
        else:
            run = scikit_learn_sweep("parallel" in competitor, tolerance)
        facts: dict[str, float] = {}

        def take_step() -> float:
            start = time.perf_counter()
            score, strength = run()
            facts.setdefault("first", time.perf_counter() - start)
            facts["strength"] = strength
            return score

        return take_step, facts

    turns.work(prepare)


def report(workers: list[turns.Worker]) -> None:
    fastest = min(worker.seconds for worker in workers if worker.competitor != "clip_jax")
    print("| | s | fastest - slowest | times as fast | first, s | best accuracy, % | strength |")
    print("|---|---|---|---|---|---|---|")
    for worker in workers:
        print(
            f"| {worker.competitor} | {worker.seconds:.2f} | {worker.spread} "
            f"| {fastest / worker.seconds:.2f} | {worker.ready['first']:.2f} "
            f"| {100 * worker.ready['loss']:.2f} | {worker.ready['strength']:.3g} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="scikit-learn's tol")
    parser.add_argument("--verbose", action="store_true", help="show what the competitors print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.tolerance)
    workers = turns.take_turns(__file__, list(COMPETITORS), args.rounds)
    print(turns.versions("jax", "scikit-learn", "scipy", "numpy"), end="\n\n")
    return report(workers)


if __name__ == "__main__":
    main()
