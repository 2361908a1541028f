"""OpenAI's own model code, which PyTorch alone runs: state dicts and archives, there and back."""

import importlib.metadata
import importlib.util
import pathlib

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

from clip_jax import models, weights
from clip_jax.weights.model import Tensors, Weights

# The ResNets at full width; the ViTs have that in the tests against transformers.
SIZES = {
    "ViT-B/32": SHORT_VIT | {"image_size": 64, "image_width": 128, "image_heads": 2},
    **dict.fromkeys(("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"), SHORT_RESNET),
}
ARCHIVES = ("ViT-B/32", "RN50")  # TorchScript, as they are published; the rest as state dicts


def openai_model(state: dict) -> torch.nn.Module:
    """Loads OpenAI's own code, whose package does not import without an old setuptools."""
    path = importlib.metadata.distribution("openai-clip").locate_file("clip/model.py")
    spec = importlib.util.spec_from_file_location("clip_model", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_model(state).float().eval()


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
