"""python -m clip_jax evaluate, end to end on the embedded digits and sets made of them."""

import csv
import functools
import json
import pathlib
import re
import shutil

import html_page
import numpy as np
import pytest
import several_hosts
import tiny_run
import tiny_sets
from PIL import Image
from several_hosts import launch, outputs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

import clip_jax
from clip_jax.data.sources.digits import DigitScenes
from clip_jax.embed.encoder import Encoder
from clip_jax.errors import StorageError
from clip_jax.evaluate import cli, tasks
from clip_jax.evaluate.results import Folder, read_evaluation
from clip_jax.evaluate.sets import registry

SIDE = 16


@functools.cache
def model() -> clip_jax.Model:
    return clip_jax.load(tiny_run.finished())


def run(out: pathlib.Path, *arguments: str) -> None:
    with tiny_run.compile_once():
        cli.main([f"--checkpoint={tiny_run.finished()}", f"--out={out}", *arguments])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> pathlib.Path:
    """Everything at once: all tasks that the embedded sets allow, and overlap."""
    out = tmp_path_factory.mktemp("evaluated")
    testbed = out / "testbed.csv"
    rows = [f"model {i},digits_blurred,0.{i},0.{i - 1}5" for i in range(2, 9)]
    testbed.write_text("\n".join(["model,dataset,reference,shifted", *rows]))
    run(
        out,
        "--datasets=embedded",
        "--shots=1,2",
        "--repeats=2",
        f"--testbed={testbed}",
        "--train_data=digits:test",  # each image has its duplicate, drawn larger
        "--overlap_threshold=0.5,digits_inverted=0.955",
    )
    return out


def scores(out: pathlib.Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of results.csv by task, data set, variant and metric."""
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        tuple(row[name] for name in ("task", "dataset", "variant", "metric")): row for row in rows
    }


def embedded(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, h, w, 3] and digits of a split of the embedded set."""
    examples = list(DigitScenes(split, SIDE, seed=0))
    return np.stack([each.image for each in examples]), np.array([e.label for e in examples])


def features(images: np.ndarray) -> np.ndarray:
    """Computes pre-projection features."""
    net, variables = model().net, model().variables
    both, _ = net.apply(variables, images, method="encode_with_features", mutable=["intermediates"])
    return np.asarray(both[1], np.float64)


def test_zeroshot_is_what_the_model_says_by_hand(evaluated):
    images, digits = embedded("test")
    dataset = registry.get("digits")
    variants = {
        "ensemble": dataset.prompts["own"],
        "one prompt": ("a photo of a {}.",),
        "bare names": ("{}",),
    }
    found = scores(evaluated)
    for variant, templates in variants.items():
        probabilities = model().zero_shot(images, dataset.class_names, templates)
        row = found["zeroshot", "digits", variant, "accuracy"]
        assert float(row["value"]) == pytest.approx(
            accuracy_score(digits, probabilities.argmax(axis=1))
        )
        assert float(row["low"]) < float(row["value"]) < float(row["high"])
        assert (row["n"], float(row["chance"])) == ("360", 0.1)


def test_the_probe_is_scikit_learns(evaluated):
    (result,) = read_evaluation(evaluated).of("linear_probe")
    train, test = embedded("train_scans"), embedded("test")
    # The features are far from round, which L-BFGS there takes thousands of steps for.
    probe = LogisticRegression(C=1 / result.details["strength"], solver="newton-cholesky", tol=1e-8)
    probe.fit(features(train[0]), train[1])
    wanted = probe.score(features(test[0]), test[1])
    assert result.headline.value == pytest.approx(wanted, abs=1.01 / 360)
    assert result.details["train"] + result.details["validation"] == len(train[1])
    assert result.details["validation_score"] == max(p[1] for p in result.details["points"])


def test_robustness_compares_the_same_classes(evaluated):
    found = scores(evaluated)
    for shift in registry.collections()["embedded_shifts"]:
        zero = found["zeroshot", shift, "ensemble", "accuracy"]["value"]
        assert found["robustness", shift, "zero-shot", "accuracy"]["value"] == zero
        reference = found["robustness", shift, "zero-shot, reference", "accuracy"]["value"]
        assert reference == found["zeroshot", "digits", "ensemble", "accuracy"]["value"]
    (result,) = read_evaluation(evaluated).of("robustness")
    effective = {row["name"]: row["effective"] for row in result.details["rows"]}
    assert [name for name, value in effective.items() if value is not None] == ["digits_blurred"]


def test_images_overlap_with_themselves(evaluated):
    found = scores(evaluated)
    same = found["overlap", "digits", "overlap", "share of images"]
    assert float(same["value"]) == 1
    assert found["overlap", "digits", "clean", "accuracy"]["n"] == "0"
    # The similarity by hand, at the set's own threshold.
    shifted = model().encode_image(embedded("test_inverted")[0])
    # As other data are read that draw themselves: at 64 pixels.
    clean = model().encode_image([each.image for each in DigitScenes("test", 64, seed=0)])
    near = (shifted @ clean.T).max(axis=1) >= 0.955
    wanted = found["overlap", "digits_inverted", "overlap", "share of images"]
    assert 0.1 < near.mean() < 0.9
    assert float(wanted["value"]) == pytest.approx(near.mean(), abs=1.01 / 360)


def test_retrieval_agrees_with_the_run_itself(evaluated):
    images, _ = embedded("test_scenes")
    captions = [each.text for each in DigitScenes("test_scenes", SIDE, seed=0)]
    texts = list(dict.fromkeys(captions))
    own = np.array([texts.index(caption) for caption in captions])
    cosines = model().encode_image(images) @ model().encode_text(texts).T
    right = cosines[np.arange(len(images)), own]
    wanted = np.mean([(row >= value).sum() - 1 < 5 for row, value in zip(cosines, right)])
    row = scores(evaluated)["retrieval", "digits_scenes", "captions", "image_to_text/recall@5"]
    assert float(row["value"]) == pytest.approx(wanted, abs=1.01 / len(images))


def test_few_shot_lies_beside_zero_shot(evaluated):
    (result,) = read_evaluation(evaluated).of("few_shot")
    details = result.details
    assert details["shots"] == [1, 2]
    zero = scores(evaluated)["zeroshot", "digits", "ensemble", "accuracy"]
    assert details["zero_shot"] == float(zero["value"])
    assert 0.1 < details["mean"][0] < details["mean"][1] < 1


def test_the_report_shows_every_score(evaluated):
    page = html_page.check((evaluated / "report.html").read_text())
    sections = [section["attrs"]["id"] for section in page.find("section")]
    assert sections == [
        "scores",
        *(n for n in tasks.NAMES if n not in ("bias", "near_duplicates")),
        "settings",
    ]
    evaluation = read_evaluation(evaluated)
    titles = [row[0] for row in page.rows("summary")]
    assert titles == [result.title for result in evaluation.of("zeroshot")]
    shown = {row[0]: row[1].split(" %")[0] for row in page.rows("summary")}
    for result in evaluation.of("zeroshot"):
        assert float(shown[result.title]) == pytest.approx(100 * result.headline.value, abs=0.051)
    assert len(page.rows("overlaps")) == 5
    assert len([p for p in page.find("svg") if p["attrs"].get("class") == "plot"]) >= 4
    pairs = html_page.check((evaluated / "overlap-digits.html").read_text())
    assert 2 * 45 < len(pairs.find("img")) <= 2 * 60


def test_a_second_time_nothing_is_computed(evaluated, monkeypatch, capsys):
    before = (evaluated / "results.csv").read_text()
    for name in ("images", "texts", "scores"):
        monkeypatch.setattr(Encoder, name, None)
    run(
        evaluated,
        "--datasets=embedded",
        "--shots=1,2",
        "--repeats=2",
        f"--testbed={evaluated / 'testbed.csv'}",
        "--train_data=digits:test",
        "--overlap_threshold=0.5,digits_inverted=0.955",
    )
    assert (evaluated / "results.csv").read_text() == before
    lines = capsys.readouterr().out.splitlines()
    assert sum("(done before)" in line for line in lines) == len(read_evaluation(evaluated).results)


def test_a_killed_evaluation_resumes(evaluated, tmp_path, monkeypatch):
    """A lost result and a lost part of the embeddings are all that is computed again."""
    out = tmp_path / "killed"
    shutil.copytree(evaluated, out)
    (out / "results" / "zeroshot-digits_noisy.json").unlink()
    (part,) = (out / "features" / "digits_noisy-test").glob("part-*.parquet")
    part.unlink()
    seen, images = [], Encoder.images

    def count(self, variables, source, *rest, **settings):
        seen.append(len(source))
        return images(self, variables, source, *rest, **settings)

    monkeypatch.setattr(Encoder, "images", count)
    run(out, "--datasets=digits_noisy,digits", "--tasks=zeroshot")
    assert seen == [360]
    name = "results/zeroshot-digits_noisy.json"
    again, first = (json.loads((folder / name).read_text()) for folder in (out, evaluated))
    assert again["scores"] == first["scores"]


def test_a_result_that_cannot_be_written_is_no_missing_set(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise StorageError("The bucket is gone.")

    monkeypatch.setattr(Folder, "write", fail)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "out", "--datasets=digits", "--tasks=zeroshot")
    assert "The bucket is gone." in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


def test_own_sets_and_those_that_are_missing(tmp_path, capsys):
    """A folder of class-named folders, a multi-label set, and one that is not on disk."""
    for i, (image, digit) in enumerate(tiny_sets.digits(40)):
        folder = tmp_path / "mine" / f"digit_{digit % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    labels = [
        [float(digit == c or digit % 2 == c) for c in range(4)] for _, digit in tiny_sets.digits(40)
    ]
    files = [("npy", tiny_sets.npy(row)) for row in labels]
    tiny_sets.write_benchmark(
        tmp_path / "many",
        "test",
        files,
        classnames="zero\none\ntwo\nthree",
        zeroshot_classification_templates="the digit {c}",
        dataset_type="multilabel",
    )
    names = f"{tmp_path / 'mine'},{tmp_path / 'many'},cifar10"
    run(tmp_path / "out", f"--datasets={names}", f"--data_dir={tmp_path}")
    evaluation = read_evaluation(tmp_path / "out")
    assert [r.headline.metric for r in evaluation.of("zeroshot")] == ["accuracy", "map_11_point"]
    assert list(evaluation.missing) == ["cifar10"]
    assert "tfds build cifar10" in evaluation.missing["cifar10"]
    assert "CIFAR-10" in capsys.readouterr().out
    page = html_page.check((tmp_path / "out" / "report.html").read_text())
    assert "tfds build cifar10" in page.find("section", None)[-2]["text"]
    assert "digit 2" in page.find("table", "zeroshot")[-1]["text"] or page.rows("classes-mine")


MISTAKES = {
    "no model": ([], r"--checkpoint=runs/quickstart"),
    "no such model": (["--checkpoint=nowhere"], r"nowhere"),
    "no such task": (["--checkpoint={run}", "--tasks=zeroshots"], r"'zeroshots'.*zeroshot"),
    "no such set": (["--checkpoint={run}", "--datasets=digit"], r"'digit'.*digits"),
    "bad shots": (["--checkpoint={run}", "--shots=one"], r"--shots=1,2,4"),
    "nothing there": (["--checkpoint={run}", "--datasets=cifar10"], r"--datasets=digits"),
    "bad testbed": (
        [
            "--checkpoint={run}",
            "--datasets=embedded",
            "--tasks=robustness",
            "--testbed=/dev/null/x",
        ],
        r"testbed.*columns",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_paragraph(name, tmp_path, capsys):
    arguments, wanted = MISTAKES[name]
    filled = [argument.format(run=tiny_run.finished()) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        cli.main([*filled, f"--out={tmp_path / 'out'}"])
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(said) > 30
    assert re.search(wanted, said), said


def test_all_sets_are_listed(capsys):
    cli.main(["--list"])
    listed = capsys.readouterr().out
    for name in registry.names():
        assert f"\n{name} " in listed


@pytest.mark.slow
def test_hosts_share_an_evaluation(tmp_path):
    """Two processes joined by a coordinator; the scores are those of one."""
    common = ["--datasets=digits", "--tasks=zeroshot"]
    command = ["-m", "clip_jax", "evaluate", *common, f"--checkpoint={tiny_run.finished()}"]
    command += [f"--out={tmp_path / 'both'}"]
    outputs([launch([*command, *flags], 2, quick="") for flags in several_hosts.flags(2)])
    run(tmp_path / "alone", *common)
    both, alone = (scores(tmp_path / name) for name in ("both", "alone"))
    assert both.keys() == alone.keys()
    for key, row in alone.items():
        assert float(both[key]["value"]) == pytest.approx(float(row["value"]), abs=1e-6), key


def test_other_data_under_the_same_name_is_not_taken_for_the_old(tmp_path, monkeypatch, capsys):
    """Other images, as many as before: the embeddings are not reused, and the message says so."""
    monkeypatch.chdir(tmp_path)
    for name, shade in (("cat", 10), ("dog", 200)):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (shade, 0, 0)).save(tmp_path / "set" / name / "a.png")
    asked = (f"--datasets={tmp_path / 'set'}", "--tasks=zeroshot")
    run(tmp_path / "out", *asked)
    capsys.readouterr()
    run(tmp_path / "out", *asked)
    assert "done before" in capsys.readouterr().out
    Image.new("RGB", (16, 16), (0, 99, 0)).save(tmp_path / "set" / "dog" / "a.png")
    with pytest.raises(SystemExit):
        run(tmp_path / "out", *asked)
    printed = "".join(capsys.readouterr())
    assert "done before" not in printed
    assert "sample" in printed
