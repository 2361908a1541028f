"""Helpers of the parity tests: random weights, a batch, and both sides' embeddings and loss.

Tests that import this are skipped where PyTorch is not installed.
"""

import math

import jax
import numpy as np
import pytest

from clip_jax import losses, models
from clip_jax.weights.convert import tokens
from clip_jax.weights.model import Tensors, Weights, variable_shapes

torch = pytest.importorskip("torch")

TOLERANCE = 1e-5  # relative to the largest entry; the loss to itself. Seen: 3e-6
# Full width and little of what repeats itself; a vocabulary that is quickly written and read.
SHORT_VIT = {"image_layers": (1,), "text_layers": 1, "vocab_size": 1000}
SHORT_RESNET = SHORT_VIT | {"image_layers": (1, 2, 1, 1), "image_size": 64}


def random_weights(size: models.Size) -> Weights:
    """Gains and statistics away from 0 and 1, which would hide mistakes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in variable_shapes(size).items():
        if name.endswith("logit_scale"):
            value = np.full((), math.log(20))
        elif name.endswith("logit_bias"):
            value = np.full((), -3.0)
        elif name.endswith(("scale", "var")):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith(("bias", "mean", "positions", "embedding", "class_token", "probe")):
            value = 0.1 * rng.standard_normal(shape, np.float32)
        else:
            fan_in = math.prod(shape[:-1]) if "blocks" not in name else math.prod(shape[1:-1])
            value = fan_in**-0.5 * rng.standard_normal(shape, np.float32)
        arrays[name] = np.asarray(value, np.float32)
    shapes = {name: value.shape for name, value in arrays.items()}
    tensors = Tensors(shapes, arrays.__getitem__)
    known = size.vocab_size == tokens.bpe.VOCABULARY_SIZE
    tokenizer = tokens.OPENAI if known else tokens.UNKNOWN
    return Weights(size, tensors, tokenizer, {"source": "random", "format": "clip_jax"})


def make_batch(size: models.Size) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images, and captions that end at different places."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(3, size.image_size, size.image_size, 3)).astype(np.float32)
    tokens = rng.integers(3, size.vocab_size - 2, (3, size.context_length)).astype(np.int32)
    if size.text_pool == "end":
        for row, length in zip(tokens, (4, 9, size.context_length)):
            row[length - 1 :] = 0
            end = size.vocab_size - 1 if size.end_token is None else size.end_token
            row[0], row[length - 1] = size.vocab_size - 2, end
    return images, tokens


def to_torch(batch) -> tuple[torch.Tensor, torch.Tensor]:
    images, tokens = (torch.from_numpy(part) for part in batch)
    return images.permute(0, 3, 1, 2), tokens.long()


def jax_outputs(ours: Weights, batch) -> dict:
    mesh = jax.make_mesh((1, 1, 1, 1), ("slice", "data", "fsdp", "tensor"))
    variables = ours.variables(mesh)
    image, text, *scalars = jax.jit(models.CLIP(ours.size).apply)(variables, *batch)
    loss_fn = losses.sigmoid_loss if ours.size.logit_bias else losses.softmax_loss
    return {"image": image, "text": text, "loss": loss_fn(image, text, *scalars)}


def torch_outputs(image, text, scale, bias=None) -> dict:
    """Computes outputs from embeddings of any norm; `scale` is the multiplier."""
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    logits = scale * image @ text.T
    if bias is not None:
        signs = 2 * torch.eye(len(logits)) - 1
        loss = -torch.nn.functional.logsigmoid(signs * (logits + bias)).sum() / len(logits)
    else:
        labels = torch.arange(len(logits))
        cross = torch.nn.functional.cross_entropy
        loss = (cross(logits, labels) + cross(logits.T, labels)) / 2
    return {"image": image, "text": text, "loss": loss}


def assert_agree(ours: dict, theirs: dict):
    for name in ("image", "text", "loss"):
        expected = theirs[name].detach().numpy()
        difference = np.abs(np.asarray(ours[name]) - expected).max() / np.abs(expected).max()
        assert difference < TOLERANCE, f"{name}: {difference:.1e}"


def assert_same_weights(actual: Weights, expected: Weights):
    """Bit for bit, and everything that travels with them."""
    assert actual.size == expected.size
    assert actual.tensors.shapes == expected.tensors.shapes
    for name in expected.tensors.shapes:
        ours = actual.tensors.read(name)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, expected.tensors.read(name), err_msg=name)
