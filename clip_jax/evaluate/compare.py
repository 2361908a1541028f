"""Compares models: evaluated ones, runs as they learned, and the paper's published rows.

    python -m clip_jax compare runs/quickstart runs/bag_of_words runs/captioning
    python -m clip_jax compare runs/a/evaluation-5000 runs/b/evaluation-5000 paper:ViT-B/32
    python -m clip_jax compare runs/mine paper --out=beside_the_paper

Takes workdirs (their latest evaluation and their learning curves), directories that evaluate wrote,
"paper:NAME" for a model of the paper, and "paper" for all nine. Another name to show may stand
before any of them: "ours=runs/a".

Writes to --out:
    compare.html            one table; scores against compute, error as a power of it, prompts,
                            zero-shot against probe, accuracy against images processed
    compare.csv             the scores, with the origin of each model's
"""

import argparse
import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from clip_jax import models
from clip_jax.common import commands, metrics
from clip_jax.common.pages import page
from clip_jax.errors import UserError
from clip_jax.evaluate import comparison
from clip_jax.evaluate.comparison import Compared
from clip_jax.evaluate.results import ALL, About, Evaluation, Result, Score, read_evaluation
from clip_jax.evaluate.sets import registry
from clip_jax.models import flops as model_flops
from clip_jax.storage import locations, writing

_HERE = Path(__file__).parent
_PAPER = "paper"


def main(arguments: list[str]) -> None:
    """Runs the command; ends the process where it must."""
    parser = commands.parser("compare", __doc__)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="runs, evaluations or models of the paper, as above",
    )
    parser.add_argument("--out", default="comparison", metavar="DIR", help="default: comparison")
    options = parser.parse_args(arguments)
    with commands.plain_errors():
        _run(options)


def _run(options: argparse.Namespace) -> None:
    out = locations.reachable(options.out)
    found = [each for name in options.models for each in read(name)]
    twice = [one.name for i, one in enumerate(found) if one.name in [o.name for o in found[:i]]]
    if twice:
        raise UserError(
            f"Two of the models are called {twice[0]!r}: give one another name, as in "
            f'"other={options.models[-1]}".'
        )
    tables = comparison.tables(found)
    panels = comparison.panels(found)
    page.write(
        out / "compare.html",
        _HERE / "compare.html.jinja",
        title=f"Comparison of {len(found)} models",
        models=found,
        tables=tables,
        panels=panels,
        curves=comparison.curve_rows(found),
        published=_provenance() if any(one.published for one in found) else "",
    )
    _write_table(out / "compare.csv", found)
    for table in tables:
        print(comparison.as_text(table), end="\n\n")
    if any(one.published for one in found):
        print(f"Published figures: {_provenance()}\n")
    print(f"Page: {out / 'compare.html'}")


def read(name: str) -> list[Compared]:
    """Reads the models that an argument names.

    Raises:
      UserError: it names neither a run, nor an evaluation, nor a model of the paper.
    """
    label, equals, rest = name.rpartition("=")
    if rest == _PAPER:
        return [_paper(model, model) for model in _published()["zeroshot"]]
    if rest.startswith(f"{_PAPER}:"):
        model = rest.removeprefix(f"{_PAPER}:")
        return [_paper(model, label if equals else f"{model} (paper)")]
    directory = locations.parse(rest)
    there = locations.stat(directory / ALL) is not None
    evaluation = directory if there else _latest(directory)
    history = metrics.read_history(directory if evaluation != directory else directory.parent)
    if evaluation is None and not history:
        raise UserError(
            f"{rest} is neither a workdir with metrics, nor an evaluation. Evaluate a model by "
            f"python -m clip_jax evaluate --checkpoint=RUN, or name a model of the paper, as in "
            f"{_PAPER}:ViT-B/32."
        )
    shown = label if equals else rest.rstrip("/").removeprefix("runs/")
    about = read_evaluation(evaluation) if evaluation is not None else None
    return [Compared(shown, about, _curve(history))]


def _latest(workdir: epath.Path) -> epath.Path | None:
    """Returns the evaluation of a run at its highest step; None: it has none."""
    found = [path.parent for path in workdir.glob(f"evaluation*/{ALL}")]
    steps = {path: path.name.partition("-")[2] for path in found}
    return max(found, key=lambda p: int(steps[p]) if steps[p].isdecimal() else 0, default=None)


def _curve(history: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """Returns images processed and zero-shot accuracy over the course of a run."""
    names = ("eval/images_seen", "zeroshot/top1")
    return [(row[names[0]], row[names[1]]) for row in history if all(n in row for n in names)]


def _provenance() -> str:
    """Returns the source of the published figures, and how far they have been checked."""
    published = _published()
    return f"{published['source']} {published['reliability']}"


def _published() -> dict[str, Any]:
    return json.loads((_HERE / "published.json").read_text())


def _paper(model: str, shown: str) -> Compared:
    """Returns a row of the paper's tables in the form of an evaluation."""
    published = _published()
    if model not in published["zeroshot"]:
        raise UserError(
            f"The paper has no model {model!r}: it has {', '.join(published['zeroshot'])}."
        )
    results = []
    for task, variant in (("zeroshot", "ensemble"), ("linear_probe", "linear probe")):
        for dataset, value in zip(published["datasets"], published[task][model]):
            score = Score(task, dataset, variant, "", value / 100)
            title = registry.get(dataset).title
            results.append(Result(task, dataset, title, "", "", (score,), {}, 0.0))
    size = models.get_size(model)
    about = About(model, published["source"], 0, model_flops.image_flops(size))
    evaluation = Evaluation(about, {}, tuple(results), {}, "")
    return Compared(shown, evaluation, [], published=True)


def _write_table(path: epath.Path, found: Sequence[Compared]) -> None:
    names = ["model", "source", *(field.name for field in dataclasses.fields(Score))]
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for one in found:
        if one.evaluation is None:
            continue
        origin = {"model": one.name, "source": one.evaluation.model.source}
        for score in one.evaluation.scores():
            writer.writerow({**origin, **dataclasses.asdict(score)})
    writing.write(path, file.getvalue())
