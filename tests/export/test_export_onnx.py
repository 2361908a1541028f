"""ONNX exports, run by onnxruntime, against the module itself."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_export
from flax import traverse_util

from clip_jax import models
from clip_jax.errors import UserError
from clip_jax.export import programs


@pytest.mark.parametrize("kind", ["vit", "tiles", "resnet", "siglip"])
def test_onnxruntime_agrees(kind, tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    runtime.set_default_logger_severity(3)
    weights = tiny_export.weights(kind)
    programs.write_onnx(weights, tmp_path)
    for tower in tiny_export.TOWERS:
        session = runtime.InferenceSession(str(tmp_path / f"{tower}.onnx"))
        (name,) = [taken.name for taken in session.get_inputs()]
        rows = tiny_export.rows(weights.size, tower, 4)
        wanted = tiny_export.embed(weights, tower, rows)
        for count in (4, 1, 3):
            (found,) = session.run(None, {name: rows[:count]})
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted[:count], atol=1e-5)


def test_nothing_is_logged_on_success(tmp_path):
    """In a process of its own, where jax2onnx loads its plugins."""
    pytest.importorskip("jax2onnx")
    script = (
        "import pathlib, sys, tiny_export\n"
        "from clip_jax.export import programs\n"
        "programs.write_onnx(tiny_export.weights('vit'), pathlib.Path(sys.argv[1]))\n"
    )
    paths = [
        *map(str, pathlib.Path(__file__).parents[1:3]),
        str(pathlib.Path(tiny_export.__file__).parent),
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr
    assert "Skipping" not in done.stderr


def test_what_does_not_depend_on_the_input_is_computed_beforehand():
    weights = tiny_export.weights("vit")
    variables = traverse_util.unflatten_dict(tiny_export.arrays(weights), sep="/")
    net = models.CLIP(weights.size, scan_layers=False)
    spec = programs.input_batch(weights.size, "encode_text")
    traced = jax.make_jaxpr(lambda x: net.apply(variables, x, method="encode_text"))(spec)

    def again(rows: jax.Array) -> jax.Array:
        return programs._evaluate(traced.jaxpr, traced.consts, [rows])[0]

    before, after = str(traced), str(jax.make_jaxpr(again)(spec))
    for operation in (" split[", " remat2[", " jit["):
        assert operation in before
        assert operation not in after
    assert " dot_general[" in after


def test_without_jax2onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    weights = tiny_export.weights("vit")
    with pytest.raises(UserError, match=r"requirements-export\.txt"):
        programs.write_onnx(weights, pathlib.Path("nowhere"))
