"""Model cards: what the run recorded, in the form that huggingface_hub reads."""

import dataclasses
import json
import re

import pytest
import tiny_export
import tiny_run
from huggingface_hub import ModelCard

from clip_jax import weights
from clip_jax.common import metrics
from clip_jax.export import card, card_text, record
from clip_jax.export.terms import Terms

TERMS = Terms("mit", "", "", ("org/pairs",), "Small", "")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("card") / "README.md"
    card.main(
        [
            *(f"--model={tiny_run.finished()}", f"--out={out}", "--license=apache-2.0"),
            *("--dataset=org/first", "--dataset=org/second", "--hardware=8 x TPU v5e"),
        ]
    )
    return out.read_text()


@pytest.fixture(scope="module")
def history() -> list[dict[str, float]]:
    return metrics.read_history(tiny_run.finished())


def test_header(text):
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.license == "apache-2.0"
    assert data.library_name == "clip_jax"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert data.datasets == ["org/first", "org/second"]
    assert {"clip", "jax"} <= set(data.tags)
    assert data.metrics == ["accuracy", "recall"]


def test_scores_are_those_of_the_last_evaluation(text, history):
    results = ModelCard(text).data.eval_results
    last = [row for row in history if "zeroshot/top1" in row][-1]
    wanted = {name: v for name, v in last.items() if name.startswith(("zeroshot/", "retrieval/"))}
    assert len(wanted) > 3
    assert sorted(r.metric_value for r in results) == sorted(round(v, 4) for v in wanted.values())
    (top1,) = [r for r in results if r.metric_name == "zero-shot top-1 accuracy"]
    assert top1.metric_value == round(last["zeroshot/top1"], 4)
    assert (top1.dataset_name, top1.dataset_split) == ("digits", "test")
    assert f"| zero-shot top-1 accuracy | {last['zeroshot/top1']:.1%} |" in text
    recall = last["retrieval/text_to_image/recall@1"]
    assert f"| text-to-image recall@1 | {recall:.1%} |" in text


def test_config_and_compute(text):
    config = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1))
    stored = json.loads((tiny_run.finished() / "config.json").read_text())
    assert config == stored
    assert "| devices | 8 x TPU v5e |" in text
    assert "| images seen | 192 |" in text  # 12 steps of 16
    assert "| steps | 12 of 16 pairs |" in text


def test_curve_has_the_losses_of_the_run(text, history):
    losses = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert len(rows) == 8
    assert rows[0][0] == "1"
    assert rows[-1][0] == "12"
    for step, images, loss in rows:
        assert int(images) == 16 * int(step)
        assert loss == f"{losses[int(step)]:.3f}"


def test_an_earlier_checkpoint_has_its_own_scores(history):
    found = record.read(weights.open(tiny_run.finished() / "checkpoints" / "8"))
    assert found.training.step == 8
    assert found.training.scored_at == 6
    at_6 = next(row for row in history if row["step"] == 6 and "zeroshot/top1" in row)
    assert found.training.scores["zeroshot/top1"] == at_6["zeroshot/top1"]
    assert max(row["step"] for row in found.training.curve) == 8


def training(**changes) -> record.Record:
    found = record.read(weights.open(tiny_run.finished()))
    return dataclasses.replace(found, training=dataclasses.replace(found.training, **changes))


def test_skipped_examples_by_reason(tmp_path):
    found = training(skipped={"empty caption": 1, "unreadable image": 2345}, pairs=400_000)
    text = card_text.render(found, TERMS, tmp_path)
    assert "2,345 x unreadable image, 1 x empty caption." in text
    assert "400,000 pairs" in text
    assert "# Small\n" in text


def test_nothing_is_claimed_that_was_not_measured(tmp_path):
    found = training(scores={}, scored_at=0, hardware="", seconds=3600.0)
    text = card_text.render(found, TERMS, tmp_path)
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.eval_results is None
    assert data.metrics is None
    assert "None were measured." in text
    assert "| devices | not recorded |" in text
    assert "| time | 1h 00m |" in text


@pytest.mark.parametrize(
    ("file", "library", "says"),
    [
        ("encode_image.stablehlo", "clip_jax", "jax.export.deserialize"),
        ("encode_image.onnx", "clip_jax", "onnxruntime.InferenceSession"),
        ("preprocessor_config.json", "transformers", "from transformers import"),
        ("open_clip_config.json", "open_clip", "open_clip.create_model_and_transforms"),
        ("clip_jax.json", "clip_jax", 'clip_jax.load(".")'),
    ],
)
def test_how_to_load_it_depends_on_the_files(tmp_path, file, library, says):
    (tmp_path / file).write_text("{}")
    text = card_text.render(record.read(tiny_export.weights("siglip")), TERMS, tmp_path)
    assert ModelCard(text, ignore_metadata_errors=False).data.library_name == library
    assert says in text
    assert "is not recorded with them" in text
    assert "Sigmoid Loss" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "names the licence of the model"),
        (["--license=Apache License 2"], "identifier"),
        (["--license=other", "--license_name=mine"], "--license_link"),
        (["--license=mit", "--out=no/README.md"], "no folder"),
        (["--license=mit", "--out=https://example.org/README.md"], "https:// is not read"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        card.main([f"--model={tiny_run.finished()}", "--out=README.md", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_another_licence(tmp_path):
    terms = Terms("other", "ours", "LICENSE", (), "", "")
    text = card_text.render(record.read(tiny_export.weights("vit")), terms, tmp_path)
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert (data.license, data.license_name, data.license_link) == ("other", "ours", "LICENSE")
    assert "[ours](LICENSE)" in text
