"""OpenAI's own model code, which PyTorch alone runs: state dicts and archives, there and back."""

import importlib.metadata
import importlib.util
import pathlib
import types

import jax
import numpy as np
import pytest
from parity import (  # or skips
    SHORT_RESNET,
    SHORT_VIT,
    assert_agree,
    assert_same_weights,
    jax_outputs,
    make_batch,
    random_weights,
    to_torch,
    torch,
    torch_outputs,
)

from clip_jax import models, sharding, weights
from clip_jax.weights.model import Tensors, Weights

# The ResNets at full width; the ViTs have that in the tests against transformers.
SIZES = {
    "ViT-B/32": SHORT_VIT | {"image_size": 64, "image_width": 128, "image_heads": 2},
    **dict.fromkeys(("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"), SHORT_RESNET),
}
ARCHIVES = ("ViT-B/32", "RN50")  # TorchScript, as they are published; the rest as state dicts


def openai_code() -> types.ModuleType:
    """Loads OpenAI's own code, whose package does not import without an old setuptools."""
    path = importlib.metadata.distribution("openai-clip").locate_file("clip/model.py")
    spec = importlib.util.spec_from_file_location("clip_model", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def openai_model(state: dict) -> torch.nn.Module:
    return openai_code().build_model(state).float().eval()


def half_weights(size: models.Size) -> Weights:
    """Random weights that fp16, in which OpenAI's are, can hold."""
    ours = random_weights(size)
    half = {k: np.float16(ours.tensors.read(k)).astype(np.float32) for k in ours.tensors.shapes}
    tensors = Tensors(ours.tensors.shapes, half.__getitem__)
    return Weights(size, tensors, ours.tokenizer, ours.origin)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", SIZES)
def test_there_and_back(name: str, tmp_path: pathlib.Path, monkeypatch):
    size = models.get_size(name, SIZES[name])
    ours = half_weights(size)
    weights.save(ours, tmp_path / "ours.pt", "openai")
    model = openai_model(torch.load(tmp_path / "ours.pt", weights_only=True))
    batch = make_batch(size)
    images, tokens = to_torch(batch)
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(tokens)
    assert_agree(jax_outputs(ours, batch), torch_outputs(image, text, model.logit_scale.exp()))

    if name in ARCHIVES:
        traced = torch.jit.trace(model, (images, tokens), check_trace=False)
        torch.jit.save(traced.half(), tmp_path / "theirs.pt")
        theirs = weights.open(tmp_path / "theirs.pt")
    else:
        torch.save(model.half().state_dict(), tmp_path / "theirs.pt")
        monkeypatch.setitem(models.sizes.SIZES, name, size)  # which a state dict does not tell
        theirs = weights.open(tmp_path / "theirs.pt", model=name)
    assert_same_weights(theirs, ours)


INITIAL = {
    "ViT-B/32": {"image_size": 64, "image_width": 128, "image_heads": 2, "image_layers": (2,)},
    "RN50": {"image_size": 96, "image_layers": (1, 1, 1, 1), "image_width": 16, "embed_dim": 128},
}


@pytest.mark.parametrize("name", INITIAL)
def test_weights_begin_as_the_published_code_makes_them(name: str, tmp_path, monkeypatch):
    """Standard deviation and greatest value of every parameter that both draw at random."""
    text = {"text_width": 128, "text_heads": 2, "text_layers": 2, "vocab_size": 500}
    size = models.get_size(name, INITIAL[name] | text)
    torch.manual_seed(0)
    layers = size.image_layers if name == "RN50" else size.image_layers[0]
    model = openai_code().CLIP(
        size.embed_dim,
        size.image_size,
        layers,
        size.image_width,
        size.patch_size,
        size.context_length,
        size.vocab_size,
        size.text_width,
        size.text_heads,
        size.text_layers,
    )
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    monkeypatch.setitem(models.sizes.SIZES, name, size)
    theirs = weights.open(tmp_path / "theirs.pt", model=name).tensors
    images = np.zeros((1, size.image_size, size.image_size, 3), np.float32)
    variables = jax.jit(models.CLIP(size).init)(jax.random.key(0), images, make_batch(size)[1][:1])
    for path, ours in jax.tree.leaves_with_path(variables):
        parameter = sharding.path_name(path)
        ours, wanted = np.asarray(ours, np.float64), np.asarray(theirs.read(parameter), np.float64)
        deviation = wanted.std()
        assert (ours.std() == 0) == (deviation == 0), parameter
        if deviation == 0:
            np.testing.assert_allclose(ours, wanted, rtol=1e-6, err_msg=parameter)
            continue
        # Both are samples: five standard errors of each.
        margin = 5 * deviation / wanted.size**0.5
        assert abs(ours.std() - deviation) < margin, parameter
        assert abs(ours.mean() - wanted.mean()) < 2**0.5 * margin, parameter
        uniform = [
            np.abs(x).max() <= 1.75 * x.std() * (1 + 5 / x.size**0.5) for x in (ours, wanted)
        ]
        assert uniform[0] == uniform[1], parameter
