"""The evaluators with a real model and the embedded data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import Mesh
from ml_collections import ConfigDict
from sklearn import metrics as sklearn_metrics

from clip_jax import models, sharding
from clip_jax.data import tokenizer as tokenizers
from clip_jax.evaluate.evaluators import Evaluators


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


def run_evaluators(config: ConfigDict, net, variables, mesh: Mesh):
    variables = jax.device_put(variables, sharding.replicated(mesh))
    evaluators = Evaluators(config, net, mesh, tokenizers.create("openai", 24))
    return evaluators, evaluators.run(variables)


@pytest.fixture(scope="module")
def on_eight(tiny, mesh8):
    return run_evaluators(*tiny, mesh8)


def test_evaluators_on_one_device_and_on_eight(tiny, mesh1, on_eight):
    (one, found1), (eight, found8) = run_evaluators(*tiny, mesh1), on_eight
    directions = ("image_to_text", "text_to_image")
    assert set(found1) == {"zeroshot/top1", "zeroshot/top5"} | {
        f"retrieval/{way}/recall@{k}" for way in directions for k in (1, 5, 10)
    }
    assert found1 == pytest.approx(found8, abs=0.01)  # a rounding may swap two neighbours
    assert one.zeroshot.n == eight.zeroshot.n == 360
    assert np.abs(one.zeroshot.confusion - eight.zeroshot.confusion).sum() <= 4
    assert found1["zeroshot/top1"] == one.zeroshot.top1
    assert (
        found1["retrieval/text_to_image/recall@5"]
        == one.retrieval.metrics["text_to_image/recall@5"]
    )


def test_evaluators_agree_with_the_module_applied_by_hand(tiny, on_eight):
    _, net, variables = tiny
    evaluators, found = on_eight
    source = evaluators._zeroshot._source
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


def test_evaluators_that_are_switched_off(tiny, mesh1):
    config, net, variables = tiny
    config = config.copy_and_resolve_references()
    config.eval.zeroshot.source.type = ""
    config.eval.retrieval.source.type = ""
    evaluators, found = run_evaluators(config, net, variables, mesh1)
    assert found == {}
    assert evaluators.zeroshot is evaluators.retrieval is None
