"""The short form of benchmarks/traces.py, and that it names what is wrong."""

import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
from parity import random_weights  # or skips

from clip_jax import models

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
STEPS = 10
PROJECTION = "params/image/projection/kernel"


@pytest.fixture(scope="module")
def traces() -> Any:
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("traces", FOLDER / "traces.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["open_clip", "transformers"])
def follow(request, traces, tmp_path_factory) -> Callable[..., dict]:
    """Function that follows both sides, after a change to the peer's."""
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("traces")
    config = traces.make_config(STEPS, batch_size=16)
    config.model.size.update(image_layers=(1,), image_width=48, text_layers=1, embed_dim=32)
    size = models.get_size(config.model.name, config.model.size.to_dict())
    traces.write(random_weights(size), folder, request.param)

    ours = traces.Ours(config, folder)

    def run(change: Callable[[Any], None] = lambda theirs: None, steps: int = STEPS) -> dict:
        ours.restart()
        theirs = traces.Theirs(request.param, config, folder, ours.size, "float32")
        change(theirs)
        return traces.follow(ours, theirs, steps)

    return run


def test_they_stay_together(traces, follow):
    """Seen: the loss to 1e-7, the gradient norms to 2e-5."""
    result = follow()
    assert len(result["peer"]) == STEPS
    for metric, bound in (("loss", 1e-6), ("grad_norm/image", 1e-4), ("grad_norm/text", 1e-4)):
        found = traces.differences(result["clip_jax"], result["peer"], metric)
        assert found.max() < bound, (metric, found)
    assert result["parted"] == {}


def test_a_wrong_gradient_is_named(follow):
    wrong = {}

    def change(theirs):
        (row,) = [row for row in theirs.table if row.pieces[0].path == PROJECTION]
        theirs.model.get_parameter(row.name).register_hook(lambda grad: 1.01 * grad)
        wrong["tensor"] = row.name

    first = follow(change, steps=1)["parted"]["gradients"]
    assert first["step"] == 1
    assert first["tensor"] == wrong["tensor"]


def test_a_decay_that_is_missing_is_named(follow):
    def change(theirs):
        theirs.optimizer.param_groups[1]["weight_decay"] = 0.0

    assert follow(change, steps=1)["parted"]["parameters"]["step"] == 1
