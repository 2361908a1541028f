"""The forms of the larger models against other codebases: same weights, same batch, same numbers.

Small shapes and random weights; ViT-g/14 in open_clip's PyTorch, SigLIP in transformers'.
"""

import jax
import numpy as np
import pytest
from test_parity import nest, open_clip, to_clip_jax, to_numpy, torch  # or skips

from clip_jax import models, weights
from clip_jax.convert import huggingface
from clip_jax.convert.mapping import import_tensors

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # relative to the largest entry; seen: 1e-6


def assert_close(ours, theirs: torch.Tensor):
    expected = theirs.detach().numpy()
    assert np.abs(np.asarray(ours) - expected).max() < TOLERANCE * np.abs(expected).max()


def make_inputs(size: models.Size) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images and full captions."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, size.image_size, size.image_size, 3)).astype(np.float32)
    tokens = rng.integers(1, size.vocab_size, (4, size.context_length))
    return images, tokens.astype(np.int32)


def randomise(model: torch.nn.Module):
    """Biases and gains that start at 0 and 1 would hide mistakes."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)


# ---- ViT-g/14 ----------------------------------------------------------------------------------


def test_vit_g14_equals_open_clip():
    shapes = {"image_size": 28, "image_layers": (2,), "text_layers": 2, "context_length": 12}
    size = models.get_size("ViT-g/14", shapes)
    config = open_clip.get_model_config("ViT-g-14")
    config["vision_cfg"] |= {"image_size": size.image_size, "layers": size.image_layers[0]}
    config["text_cfg"] |= {"layers": size.text_layers, "context_length": size.context_length}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config, output_dict=True).eval()

    images, tokens = make_inputs(size)
    out = model(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long())
    params = to_clip_jax(to_numpy(model.named_parameters()), size)
    net = models.create("ViT-g/14", size=shapes)
    image, text, _ = jax.jit(net.apply)({"params": params}, images, tokens)
    assert_close(image, out["image_features"])
    assert_close(text, out["text_features"])


# ---- SigLIP ------------------------------------------------------------------------------------

SHAPES = {
    "embed_dim": 48,
    "image_size": 32,
    "image_layers": (2,),
    "image_width": 48,
    "image_heads": 4,
    "image_mlp": 100,
    "patch_size": 8,
    "text_layers": 2,
    "text_width": 48,
    "text_heads": 4,
    "text_mlp": 100,
    "context_length": 10,
    "vocab_size": 60,
}


def make_siglip() -> torch.nn.Module:
    shared = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 4}
    special = {"pad_token_id": 1, "bos_token_id": 58, "eos_token_id": 59}
    config = transformers.SiglipConfig(
        text_config={**shared, **special, "vocab_size": 60, "max_position_embeddings": 10},
        vision_config={**shared, "image_size": 32, "patch_size": 8},
    )
    model = transformers.SiglipModel(config).eval()
    randomise(model)
    return model


def test_siglip_equals_transformers():
    net, model = models.create("SigLIP-B/16", size=SHAPES), make_siglip()
    images, tokens = make_inputs(net.size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    out = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=pixels)
    tensors = to_numpy(model.named_parameters())
    theirs = weights.Tensors({k: v.shape for k, v in tensors.items()}, tensors.__getitem__)
    shapes = weights.variable_shapes(net.size)
    ours = import_tensors(huggingface.table(net.size), theirs, shapes, "transformers")
    params = nest({path: ours.read(path) for path in shapes})["params"]
    image, text, scale, bias = jax.jit(net.apply)({"params": params}, images, tokens)
    assert_close(image, out.image_embeds)
    assert_close(text, out.text_embeds)
    assert_close(np.exp(scale) * image @ text.T + bias, out.logits_per_image)
