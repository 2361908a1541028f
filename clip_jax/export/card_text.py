"""The text of a model card: the hub's YAML header, and a template filled in."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from clip_jax.common.formatting import format_seconds
from clip_jax.export.programs import ONNX
from clip_jax.export.record import Record, Training
from clip_jax.export.runtime import STABLEHLO, TOWERS
from clip_jax.export.terms import Terms
from clip_jax.storage import locations

_TEMPLATE = pathlib.Path(__file__).with_name("card.md.jinja")
_TASK = "zero-shot-image-classification"
# By the tag that the hub gives a library: a file that only its folders have.
_LIBRARIES = {
    "stablehlo": TOWERS[0] + STABLEHLO,
    "onnx": TOWERS[0] + ONNX,
    "transformers": "preprocessor_config.json",
    "open_clip": "open_clip_config.json",
}


def render(record: Record, terms: Terms, directory: epath.PathLike) -> str:
    """Returns the text of a card.

    Args:
      record: recorded facts of the model.
      terms: entries that its owner adds.
      directory: folder of the card; its files decide how the card says the model is loaded.
    """
    folder = epath.Path(directory)
    stats = locations.stats([folder / file for file in _LIBRARIES.values()])
    kinds = [kind for kind, stat in zip(_LIBRARIES, stats) if stat]
    name, training = terms.name or _title(record), record.training
    scores = training.scores if training else {}
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "percent": lambda fraction: f"{fraction:.1%}",
        "duration": format_seconds,
        "number": lambda value: f"{value:,}",
        "json": lambda value: json.dumps(value, indent=2),
    }
    body = environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        name=name,
        model=record,
        training=training,
        terms=terms,
        kinds=kinds,
        sources=_sources(training.config["data"]) if training else {},
        scored=_evaluated(training) if training else {},
        columns=[name for name in scores if name.endswith(("top1", "recall@1"))],
        score_name=_score_name,
    )
    return f"---\n{_header(record, terms, name, kinds).to_yaml()}\n---\n\n{body}"


def _header(record: Record, terms: Terms, name: str, kinds: list[str]) -> ModelCardData:
    results = _results(record.training) if record.training else []
    foreign = [kind for kind in kinds if kind in ("transformers", "open_clip")]
    return ModelCardData(
        license=terms.license,
        license_name=terms.license_name or None,
        license_link=terms.license_link or None,
        library_name=foreign[0] if foreign else "clip_jax",
        pipeline_tag=_TASK,
        tags=["clip", "jax", *(kind for kind in kinds if kind not in foreign)],
        datasets=list(terms.datasets) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,  # the hub wants both or neither
        eval_results=results or None,
    )


def _title(record: Record) -> str:
    if record.training is None:
        return f"CLIP {record.size}"
    return f"CLIP {record.size}, trained on {' + '.join(_sources(record.training.config['data']))}"


def _sources(data: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the training data by name, without the fields that are not set."""
    # Configs of earlier versions know no mixture.
    named = data.get("mixture") or {
        data["source"]["name"] or data["source"]["type"]: data["source"]
    }
    return {name: {k: v for k, v in source.items() if v} for name, source in named.items()}


def _evaluated(training: Training) -> dict[str, dict[str, Any]]:
    """Returns the data of the scores: "zeroshot" and "retrieval", where there were any."""
    kinds = {name.partition("/")[0] for name in training.scores}
    evals = training.config["eval"]
    return {k: {f: v for f, v in evals[k]["source"].items() if v} for k in sorted(kinds)}


def _results(training: Training) -> list[EvalResult]:
    results = []
    for name, value in training.scores.items():
        kind = name.partition("/")[0]
        source = _evaluated(training)[kind]
        zero_shot = kind == "zeroshot"
        results.append(
            EvalResult(
                task_type=_TASK if zero_shot else "image-text-retrieval",
                dataset_type=source["type"],
                dataset_name=source.get("name") or source["type"],
                dataset_split=source.get("split"),
                metric_type="accuracy" if zero_shot else "recall",
                metric_name=_score_name(name),
                metric_value=round(value, 4),
            )
        )
    return results


def _score_name(name: str) -> str:
    """Returns the words for a metric: "zero-shot top-1 accuracy" for "zeroshot/top1"."""
    kind, _, metric = name.partition("/")
    if kind == "zeroshot":
        return f"zero-shot {metric.replace('top', 'top-')} accuracy"
    return metric.replace("/", " ").replace("_", "-")
