"""The evaluator of training with a real model and the embedded data."""

import importlib.resources
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image
from sklearn import metrics as sklearn_metrics

from clip_jax import models, sharding
from clip_jax.configs import default
from clip_jax.data import tokenizer as tokenizers
from clip_jax.data.sources.digits import DigitScenes
from clip_jax.embed.encoder import Encoder
from clip_jax.errors import UserError
from clip_jax.evaluate import confusion
from clip_jax.evaluate.evaluator import Evaluator
from clip_jax.evaluate.results import Result


@pytest.fixture(scope="module")
def tiny():
    """A config and its model with random weights."""
    config = tiny_run.config({"eval.batch_size": 100, "eval.retrieval.max_examples": 150})
    net = models.create("ViT-B/32", size=config.model.size.to_dict())
    images = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    tokens = jnp.zeros((1, 24), jnp.int32)
    variables = jax.jit(net.init)(jax.random.key(3), images, tokens)
    # Far from its initialisation, where all images look alike to it.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (1 if "logit_scale" in jax.tree_util.keystr(path) else 3),
        variables,
    )
    return config, net, variables


def evaluate(config: ConfigDict, net, variables, mesh: Mesh) -> tuple[Evaluator, dict[str, float]]:
    variables = jax.device_put(variables, sharding.replicated(mesh))
    evaluator = Evaluator(config, net, mesh, tokenizers.create("openai", 24))
    return evaluator, evaluator.run(variables)


def of_task(evaluator: Evaluator, task: str) -> Result:
    (result,) = (result for result in evaluator.results if result.task == task)
    return result


def counts(evaluator: Evaluator) -> np.ndarray:
    return confusion.from_json(of_task(evaluator, "zeroshot").details["classes"]).matrix()


@pytest.fixture(scope="module")
def on_eight(tiny, mesh8):
    return evaluate(*tiny, mesh8)


def test_one_device_and_eight(tiny, mesh1, on_eight):
    (one, found1), (eight, found8) = evaluate(*tiny, mesh1), on_eight
    directions = ("image_to_text", "text_to_image")
    assert set(found1) == {"zeroshot/top1", "zeroshot/top5"} | {
        f"retrieval/{way}/recall@{k}" for way in directions for k in (1, 5, 10)
    }
    assert found1 == pytest.approx(found8, abs=0.01)  # a rounding may swap two neighbours
    assert np.abs(counts(one) - counts(eight)).sum() <= 4
    assert counts(one).sum() == of_task(one, "zeroshot").headline.n == 360
    assert found1["zeroshot/top1"] == np.trace(counts(one)) / 360
    assert list(one.headlines()) == [
        "zeroshot/top1",
        *(f"retrieval/{way}/recall@1" for way in reversed(directions)),
    ]


def test_zeroshot_is_the_module_applied_by_hand(tiny, on_eight):
    _, net, variables = tiny
    source, found = DigitScenes("test", 16, seed=0), on_eight[1]
    examples = [source[i] for i in range(len(source))]
    encode_image, encode_text = (
        jax.jit(lambda values, method=method: net.apply(variables, values, method=method))
        for method in ("encode_image", "encode_text")
    )
    images = encode_image(np.stack([example.image for example in examples]))
    tokens = tokenizers.create("openai", 24)
    centres = []
    for names in source.class_names:
        prompts = [t.format(name) for name in names.split("|") for t in source.templates]
        embeds = np.asarray(encode_text(tokens(prompts)), np.float64)
        centres.append(embeds.mean(axis=0))
    classes = np.stack(centres)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    predicted = (np.asarray(images, np.float64) @ classes.T).argmax(axis=1)
    labels = [example.label for example in examples]
    assert len(set(predicted)) > 3
    assert found["zeroshot/top1"] == pytest.approx(
        sklearn_metrics.accuracy_score(labels, predicted), abs=1 / 360
    )


def test_a_config_without_data(tiny, mesh1):
    config, net, variables = tiny
    evaluator, found = evaluate(without_data(config), net, variables, mesh1)
    assert found == {}
    assert not evaluator.results
    assert not evaluator.notes


def without_data(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.eval.zeroshot.source.type = ""
    config.eval.retrieval.source.type = ""
    return config


def test_data_sets_by_name_are_the_same_data(tiny, mesh8, on_eight, monkeypatch):
    """Each image is embedded once for all tasks, each number logged under one name."""
    config, net, variables = tiny
    config = without_data(config)
    config.eval.datasets = "digits,digits_noisy,digits_scenes"
    config.eval.tasks = "zeroshot,retrieval,linear_probe,robustness,few_shot"
    config.eval.shots, config.eval.repeats = (1,), 1
    seen, images = [], Encoder.images

    def count(self, variables, source, features=False):
        seen.append(len(source))
        assert features
        return images(self, variables, source, features)

    monkeypatch.setattr(Encoder, "images", count)
    evaluator, found = evaluate(config, net, variables, mesh8)
    described = on_eight[1]
    assert found["zeroshot/digits/top1"] == described["zeroshot/top1"]
    assert found["zeroshot/digits/top5"] == described["zeroshot/top5"]
    assert sorted(seen) == sorted([360, 360, 1000, 1437 - 144, 144])
    recalls = {name for name in found if name.startswith("retrieval/digits_scenes/")}
    assert len(recalls) == 6
    assert set(found) - recalls == {
        *(f"zeroshot/{name}/top{k}" for name in ("digits", "digits_noisy") for k in (1, 5)),
        "linear_probe/digits/accuracy",
        "few_shot/digits/accuracy",
        "robustness/digits/accuracy",
    }
    assert found["robustness/digits/accuracy"] == found["zeroshot/digits_noisy/top1"]
    assert found["linear_probe/digits/accuracy"] > found["zeroshot/digits/top1"]
    assert not evaluator.notes


def registry_file(name: str) -> str:
    folder = importlib.resources.files("clip_jax.evaluate.sets") / "definitions"
    return (folder / f"{name}.json").read_text()


def test_the_mean_is_over_several_sets_that_are_no_shifts(tiny, mesh8, tmp_path):
    config, net, variables = tiny
    config = without_data(config)
    description = registry_file("digits")
    (tmp_path / "again.json").write_text(description)
    config.eval.datasets = f"digits,digits_noisy,{tmp_path / 'again.json'}"
    config.eval.tasks = "zeroshot,bias"
    evaluator, found = evaluate(config, net, variables, mesh8)
    assert found["zeroshot/mean"] == found["zeroshot/digits/top1"] == found["zeroshot/again/top1"]
    assert evaluator.means == {"zeroshot/mean": found["zeroshot/mean"]}
    assert not evaluator.headlines()  # the mean says it
    (note,) = evaluator.notes
    assert re.match("Task bias is skipped: it takes images with groups", note)


def test_likelihoods_and_labels_alone_need_no_embeddings(tiny, mesh8, monkeypatch):
    """A bag of words: prompts are scored, and images are read once where that is all."""
    config, *_ = tiny
    size = {**config.model.size.to_dict(), "objective": "bag_of_words"}
    net = models.create("ViT-B/32", size=size)
    shapes = jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros((1, 24), jnp.int32)
    variables = jax.jit(net.init)(jax.random.key(3), *shapes)
    monkeypatch.setattr(Encoder, "images", None)
    passes, each = [], Encoder.each

    def count(self, compute, source):
        passes.append(len(source))
        return each(self, compute, source)

    monkeypatch.setattr(Encoder, "each", count)
    config = config.copy_and_resolve_references()
    config.objective = "bag_of_words"
    evaluator, found = evaluate(config, net, variables, mesh8)
    assert set(found) == {"zeroshot/top1", "zeroshot/top5"}
    assert passes == [360, 360]  # which examples are usable, and the scores
    evaluator.run(jax.device_put(variables, sharding.replicated(mesh8)))
    assert passes == [360, 360, 360]
    assert evaluator.notes == [
        "No retrieval evaluation: a model trained for bag_of_words embeds no texts."
    ]


def test_class_names_of_the_config_are_matched_by_name(tiny, mesh8, tmp_path):
    """However folders are named and names are ordered: the same accuracy, or a refusal."""
    config, net, variables = tiny
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    words += ["a_letter", "a_picture"]
    scenes = DigitScenes("test", 16, seed=0)
    for index in range(96):
        label = scenes[index].label + 2 * (index % 2)  # numbers from 0 to 11, so 10 sorts before 2
        for folder in (tmp_path / "named" / words[label], tmp_path / "numbered" / str(label)):
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(np.asarray(scenes[index].image, np.uint8))
            picture.save(folder / f"{index:03}.png")

    def accuracy(folder: str, class_names: Sequence[str]) -> float:
        changed = config.copy_and_resolve_references()
        source = {"type": "folder", "path": str(tmp_path / folder), "split": ""}
        changed.data.source.update(source)
        changed.eval.zeroshot.source.update(source)
        changed.eval.zeroshot.class_names = tuple(class_names)
        changed.eval.retrieval.source.type = ""
        evaluator, found = evaluate(changed, net, variables, mesh8)
        assert not evaluator.notes
        return found["zeroshot/top1"] + found["zeroshot/top5"]

    by_folder = accuracy("named", [])  # with the default template
    assert 0 < by_folder < 2
    words = [word.replace("_", " ") for word in words]
    assert accuracy("named", sorted(words)) == accuracy("named", words[::-1]) == by_folder
    assert accuracy("numbered", words) == by_folder
    with pytest.raises(UserError, match="do not say which of them is the class 'zero'"):
        accuracy("named", [*words[1:], "a cat"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.datasets": "digits", "eval.tasks": "zeroshots"}, "'zeroshots'.*eval.tasks takes"),
        ({"eval.datasets": "digit"}, "'digit'.*digits"),
        ({"eval.datasets": "cifar10"}, "tfds build cifar10"),
    ],
)
def test_wrong_settings_fail_before_training(tiny, mesh1, changes, message):
    config, net, _ = tiny
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        Evaluator(config, net, mesh1, tokenizers.create("openai", 24))


def _folders(root, names: list[str]) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), len(name), np.uint8)).save(root / name / "a.png")
    return str(root)


def test_class_folders_bring_names_and_a_template(tiny, mesh8, tmp_path):
    """They need no more in a config; names there are matched, in any order."""
    config, net, variables = tiny
    config = config.copy_and_resolve_references()
    names = ["2", "10", "1"]
    path = _folders(tmp_path / "numbers", names)
    config.eval.zeroshot.source = default.source(type="folder", path=path)
    config.eval.zeroshot.templates = ()
    evaluator, _ = evaluate(config, net, variables, mesh8)
    details = of_task(evaluator, "zeroshot").details
    assert details["templates"] == ["a photo of a {}."]
    assert details["classes"]["class_names"] == ["1", "2", "10"]
    path = _folders(tmp_path / "words", ["great_dane", "cat"])
    config.eval.zeroshot.source = default.source(type="folder", path=path)
    for given, wanted in (((), (0, 1)), (("great dane", "cat"), (1, 0))):
        config.eval.zeroshot.class_names = given
        evaluator = Evaluator(config, net, mesh8, tokenizers.create("openai", 24))
        ((dataset, _), *_) = evaluator._planned
        source = evaluator._embeddings.source(dataset, "test")
        assert [source[i].label for i in range(2)] == list(wanted)  # of cat and great_dane
        assert dataset.class_names == (given or ("cat", "great dane"))
    config.eval.zeroshot.class_names = ("puss", "dog")
    with pytest.raises(UserError, match=r"class 'cat' of eval.zeroshot.source.*JSON"):
        Evaluator(config, net, mesh8, tokenizers.create("openai", 24))


def test_scores_of_the_embedded_digits_are_told_from_those_of_ones_own_data(tiny, mesh8, tmp_path):
    config, net, _ = tiny
    config = config.copy_and_resolve_references()
    notes = Evaluator(config, net, mesh8, tokenizers.create("openai", 24)).notes
    assert not notes
    config.data.source = default.source(type="folder", path=str(tmp_path))
    made = Evaluator(config, net, mesh8, tokenizers.create("openai", 24))
    (note,) = made.notes
    assert "eval.zeroshot.source and eval.retrieval.source: the embedded digits, not your" in note
    assert {dataset.title for dataset, _ in made._planned} >= {"embedded digits test"}
    config.eval.zeroshot.source.type = ""
    config.eval.retrieval.source.type = ""
    assert not Evaluator(config, net, mesh8, tokenizers.create("openai", 24)).notes
