"""Weights of pairs, from every kind of storage to the batch."""

import csv
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from shards import picture, write_tar

from clip_jax.configs import default
from clip_jax.data import mixture, pipeline, rows, tokenizer
from clip_jax.errors import UserError
from clip_jax.training import validation

CONTEXT = 8
WEIGHTS = (0.25, 0, 3, "1e-3", 0.1)


def write(folder, kind: str, weights=WEIGHTS, key: str = "score") -> ConfigDict:
    """Pictures whose shade is their number, and the source that reads them."""
    if kind == "tar":
        members = []
        for number, weight in enumerate(weights):
            record = json.dumps({"caption": f"number {number}", "score": weight})
            members += [(f"{number}.png", picture(number)), (f"{number}.json", record.encode())]
        folder.mkdir()
        write_tar(folder / "0.tar", members)
        return default.source(type="tar", path=str(folder / "0.tar"), weight_key=key)
    folder.mkdir()
    table = [("image", "caption", "score")]
    for number, weight in enumerate(weights):
        (folder / f"{number}.png").write_bytes(picture(number))
        table.append((f"{number}.png", f"number {number}", "" if weight is None else weight))
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    return default.source(type="folder", path=str(folder), weight_key=key)


def take(config: ConfigDict, size: int, **spec):
    """A pipeline, and its first batch."""
    source, order_ = mixture.create(config, 4, 0, batch_size=size, parts=1)
    described = rows.Spec(config, "openai", CONTEXT, image_size=4, seed=0, batch_size=size)
    tokens = tokenizer.create("openai", CONTEXT)
    run = pipeline.TrainPipeline(source, order_, tokens, described)
    return run, next(iter(run))


def settings(source: ConfigDict) -> ConfigDict:
    config = default.get_config().data
    config.source = source
    config.update(order="stored", threads=1)
    return config


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_weights_go_with_their_images(tmp_path, kind):
    _, batch = take(settings(write(tmp_path / "a", kind)), 5)
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch["weight"].dtype == np.float32
    np.testing.assert_array_equal(batch["weight"], np.array(WEIGHTS, np.float32))


def test_without_weights_there_are_none(tmp_path):
    _, batch = take(settings(write(tmp_path / "a", "folder", key="")), 5)
    assert set(batch) == {"image", "tokens"}


def test_sources_without_weights_weigh_one(tmp_path):
    config = default.get_config().data
    config.mixture = default.mixture(
        a=write(tmp_path / "a", "tar"), b=write(tmp_path / "b", "folder", key="")
    )
    config.update(order="stored", threads=1)
    _, batch = take(config, 10)
    np.testing.assert_array_equal(batch["weight"], np.array([*WEIGHTS, 1, 1, 1, 1, 1], np.float32))


@pytest.mark.parametrize("kind", ["tar", "folder"])
@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (None, "no weight"),
        ("good", "unreadable weight"),
        (-0.5, "weight out of range"),
        ("nan", "weight out of range"),
        ("inf", "weight out of range"),
    ],
)
def test_faults_are_skipped_and_counted(tmp_path, kind, weight, reason):
    config = settings(write(tmp_path / "a", kind, (1, weight, 2, 3, 4)))
    config.max_skipped = 1.0
    run, batch = take(config, 5)
    assert run.skipped == {reason: 1}
    assert batch["weight"][[0, 2, 3, 4]].tolist() == [1, 2, 3, 4]
    assert batch["weight"][1] in (1, 2, 3, 4)  # that of the example in its place


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"source\.weight_key\).*scores.*its columns are"):
        take(settings(write(tmp_path / "a", "folder", key="scores")), 5)
    with pytest.raises(UserError, match=r"Hardly any|data\.max_skipped.*no weight"):
        take(settings(write(tmp_path / "b", "tar", key="scores")), 5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "digits", "split": "train"}, r"weight_key is 'score', but digits data have no"),
        ({"type": "tar", "path": "x", "weight_key": "a,b"}, r"weight_key is 'a,b'.*single name"),
    ],
)
def test_sources_that_have_no_weights(source, message):
    config = default.get_config()
    config.data.source = default.source(**{"weight_key": "score", **source})
    with pytest.raises(UserError, match=message):
        validation.validate(config)


@pytest.mark.parametrize("key", ["weight_key", "teacher_keys"])
@pytest.mark.parametrize("evaluation", ["zeroshot", "retrieval"])
def test_evaluation_data_have_neither_weights_nor_teachers(evaluation, key):
    config = default.get_config("")
    config.eval[evaluation].source = default.source(type="tar", path="x", **{key: "score"})
    with pytest.raises(UserError, match=rf"eval\.{evaluation}\.source\.{key} is 'score'.*only tr"):
        validation.validate(config)
