"""StableHLO exports, run by a process that has only JAX and NumPy, against the module itself."""

import dataclasses
import io
import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import tiny_export
import tiny_run
import xla_flags
from PIL import Image

import clip_jax
from clip_jax import api
from clip_jax import export as exports
from clip_jax.errors import UserError
from clip_jax.export import cli, programs
from clip_jax.export.folder import describe_preprocessing
from clip_jax.weights.model import TokenizerFile

ROOT = pathlib.Path(__file__).parents[2]
LICENSE = "--license=apache-2.0"
COUNTS = (1, 3)

# Runs an export where nothing else can be imported; reads and writes .npz.
ALONE = """
import io, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FOREIGN or name.startswith(OURS):
            raise ImportError(f"{name} is not installed here")

FOREIGN = {"flax", "safetensors", "orbax", "tensorflow", "PIL", "etils", "optax"}
OURS = ("clip_jax.models", "clip_jax.api", "clip_jax.weights", "clip_jax.data")
sys.meta_path.insert(0, Nothing())

import clip_jax.export
import numpy as np

batches = np.load(io.BytesIO(sys.stdin.buffer.read()))
model = clip_jax.export.load(sys.argv[1])
found = {name: getattr(model, name[:-2])(rows) for name, rows in batches.items()}
assert not {name.split(".")[0] for name in sys.modules} & FOREIGN
np.savez(sys.stdout.buffer, **found)
"""


@pytest.fixture(scope="module")
def model() -> api.Model:
    return clip_jax.load(tiny_run.finished())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("exports") / "exported"
    cli.main([f"--model={tiny_run.finished()}", f"--out={out}", LICENSE])
    return out


def batches(model: api.Model) -> dict[str, np.ndarray]:
    """Makes batches by tower and number of rows, such as "encode_text_3"."""
    size = model.net.size
    return {f"{t}_{n}": tiny_export.rows(size, t, n) for t in tiny_export.TOWERS for n in COUNTS}


def test_a_process_with_jax_and_numpy_alone(folder, model):
    file = io.BytesIO()
    np.savez(file, **batches(model))
    command = [sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=xla_flags.environment(1),
        input=file.getvalue(),
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = np.load(io.BytesIO(done.stdout))
    assert set(found) == set(batches(model))
    for name, rows in batches(model).items():
        wanted = model.net.apply(model.variables, rows, method=name[:-2])
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], wanted, atol=1e-5)
    assert np.ptp(found["encode_image_3"], axis=0).max() > 0.01  # not a comparison of constants


@pytest.mark.parametrize(
    ("kind", "tower"),
    [
        *(("vit", "encode_text"), ("siglip", "encode_text")),
        *((kind, "encode_image") for kind in ("vit", "tiles", "resnet", "siglip")),
    ],
)
@pytest.mark.slow
def test_every_kind_of_model(kind, tower):
    weights = tiny_export.weights(kind)
    program = jax.export.deserialize(programs.export_tower(weights.size, tower).serialize())
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    rows = tiny_export.rows(weights.size, tower, 4)
    wanted = tiny_export.embed(weights, tower, rows)
    for count in (4, 1):
        found = program.call(tiny_export.arrays(weights), rows[:count])
        np.testing.assert_allclose(found, wanted[:count], atol=1e-5)


def test_preprocess_is_enough(folder, model, tmp_path):
    """Pictures and texts prepared by what preprocess.json says give what the model gives."""
    exported = exports.load(folder)
    image, text = exported.preprocess["image"], exported.preprocess["text"]
    assert image["crop"] == "center"
    side = image["size"]
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    picture = Image.fromarray(noise)
    small = picture.resize((int(side * 50 / 40), side), Image.Resampling.BICUBIC)
    left = round((small.width - side) / 2)
    pixels = np.asarray(small.crop((left, 0, left + side, side)))[None]
    np.testing.assert_allclose(
        exported.encode_image(pixels), model.encode_image(picture), atol=1e-5
    )
    assert text["tokenizer"] == "openai-bpe"
    assert len(text["sha256"]) == 64
    row = np.full((1, text["context_length"]), text["padding"], np.int32)
    row[0, :3] = text["start_token"], 3156, text["end_token"]
    words = model.tokenizer.decode(row[0])
    np.testing.assert_allclose(exported.encode_text(row), model.encode_text(words), atol=1e-5)
    scale = float(model.variables["params"]["logit_scale"])
    assert exported.preprocess["similarity"]["scale"] == pytest.approx(math.exp(scale))


def test_it_is_a_model_of_clip_jax_too(folder, model):
    again = clip_jax.load(folder)
    texts = ["a seven", "the digit 3"]
    np.testing.assert_array_equal(again.encode_text(texts), model.encode_text(texts))


def test_preprocess_of_a_siglip():
    weights = tiny_export.weights("siglip")
    found = json.loads(json.dumps(describe_preprocessing(weights)))
    assert found["image"]["crop"] == "none"
    assert found["image"]["mean"] == [0.5, 0.5, 0.5]
    assert found["similarity"]["probabilities"] == "sigmoid"
    bias = float(weights.tensors.read("params/logit_bias"))
    assert bias != 0
    assert found["similarity"]["bias"] == pytest.approx(bias)
    unknown = dataclasses.replace(weights, tokenizer=TokenizerFile("", ""))
    with pytest.raises(UserError, match="--tokenizer"):
        describe_preprocessing(unknown)


def test_no_rows(folder):
    model = exports.load(folder)
    size = model.preprocess["image"]["size"]
    assert model.encode_image(np.zeros((0, size, size, 3), np.uint8)).shape == (0, 16)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), "uint8.*float32"),
        (np.zeros((16, 16, 3), np.uint8), r"\[16, 16, 3\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\[2, 8, 8, 3\]"),
    ],
    ids=["dtype", "no batch", "size"],
)
def test_other_pixels(folder, rows, message):
    with pytest.raises(UserError, match=message):
        exports.load(folder).encode_image(rows)


@pytest.mark.parametrize("name", ["preprocess.json", "encode_text.stablehlo", "model.safetensors"])
def test_a_file_is_missing_or_cut_short(folder, tmp_path, name):
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    (spoilt / name).write_bytes((spoilt / name).read_bytes()[:50])
    with pytest.raises(UserError, match="no complete StableHLO export"):
        exports.load(spoilt)
    (spoilt / name).unlink()
    with pytest.raises(UserError, match=name):
        exports.load(spoilt)


def test_an_address_is_refused():
    with pytest.raises(UserError, match="https:// is not read"):
        exports.load("https://example.org/exported")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=new"], "names the licence.*--license=apache-2.0"),
        (["--out=new", "--license=other"], "--license_name"),
        (["--out=here", LICENSE], "there already"),
        (["--out=https://example.org/new", LICENSE], "https:// is not read"),
        (["--out=new", LICENSE, "--model=nowhere"], "nowhere"),
    ],
    ids=["no licence", "another licence", "out is there", "out is a URL", "no model"],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(SystemExit, match="2"):
        cli.main([f"--model={tiny_run.finished()}", *arguments])
    told = " ".join(capsys.readouterr().err.split())
    assert message.partition(".*")[0] in told
    assert message.rpartition(".*")[2] in told
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
