"""Weights of transformers, converted there and back through folders: same weights, same numbers.

Random weights; it loads what is written here, and gives the same embeddings and loss.
"""

import pathlib

import numpy as np
import pytest
from parity import (  # or skips
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

transformers = pytest.importorskip("transformers")

LACKING = ("RN", "CLIPA", "PE")  # towers that it does not have
NAMES = [name for name in models.available_models() if not name.startswith(LACKING)]
# The largest SigLIP 2 has another width for captions.
SIGLIP_2 = {"image_width": 1536, "image_mlp": 6144, "image_heads": 16, "embed_dim": 1536}
SIGLIP_2 |= {"text_width": 1152, "text_mlp": 4304, "text_heads": 16, "text_activation": "gelu"}
# All layers, so that their numbers have two digits, and OpenAI's vocabulary, but narrow.
DEEP = {"image_width": 128, "image_heads": 2, "text_width": 128, "text_heads": 2}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        *((name, SHORT_VIT) for name in NAMES),
        ("ViT-B/32", DEEP),
        ("SigLIP-B/16", SHORT_VIT | SIGLIP_2),
    ],
)
def test_there_and_back(name: str, shapes: dict, tmp_path: pathlib.Path):
    """Ours loaded there; then saved there, and loaded here."""
    size = models.get_size(name, shapes)
    ours = random_weights(size)
    weights.save(ours, tmp_path / "ours", "huggingface")
    model = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert type(model).__name__.startswith("MetaClip2") == (size.end_token == 2)
    batch = make_batch(size)
    images, tokens = to_torch(batch)
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=images)
    bias = model.logit_bias if size.logit_bias else None
    theirs = torch_outputs(out.image_embeds, out.text_embeds, model.logit_scale.exp(), bias)
    assert_agree(jax_outputs(ours, batch), theirs)

    model.save_pretrained(tmp_path / "theirs", max_shard_size="200MB")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "theirs")
    assert_same_weights(weights.open(tmp_path / "theirs"), ours)


def test_tokenizer_and_processor(tmp_path: pathlib.Path):
    """Captions and pictures become the same numbers there."""
    short = {"image_layers": (1,), "text_layers": 1, "image_width": 64, "image_heads": 1}
    ours = random_weights(models.get_size("ViT-B/32", short))
    weights.save(ours, tmp_path / "ours", "huggingface")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    captions = ["a photo of a cat", "It's 2 dogs, isn't it?", "naïve café"]
    found = processor(text=captions, padding="max_length", return_tensors="np")["input_ids"]
    wanted = ours.tokenizer.create(77)(captions)
    ends = (wanted == 49_407).argmax(axis=1)
    for row, expected, end in zip(found, wanted, ends):
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    pixels = processor(images=[picture], return_tensors="np")["pixel_values"][0]
    expected = (picture / 255 - np.array(ours.size.image_mean)) / np.array(ours.size.image_std)
    np.testing.assert_allclose(pixels.transpose(1, 2, 0), expected, atol=1e-5)
