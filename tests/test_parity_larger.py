"""The forms of the larger models against other codebases: same weights, same batch, same numbers.

Small shapes and random weights; ViT-g/14 in open_clip's PyTorch, SigLIP in transformers'.
"""

import jax
import numpy as np
import pytest
from test_parity import Renamer, linear, open_clip, to_clip_jax, to_numpy, torch  # or skips

from clip_jax import models

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


class SiglipRenamer(Renamer):
    """Of transformers' names."""

    def qkv(self, name: str, heads: int) -> dict:
        parts = [self.dense(f"{name}.{part}_proj", outputs=(heads, -1)) for part in "qkv"]
        return {
            "kernel": np.stack([part["kernel"] for part in parts], axis=1),
            "bias": np.stack([part["bias"] for part in parts]),
        }

    def block(self, name: str, heads: int) -> dict:
        return {
            "ln_1": self.norm(f"{name}.layer_norm1"),
            "qkv": self.qkv(f"{name}.self_attn", heads),
            "attn_out": self.dense(f"{name}.self_attn.out_proj", inputs=(heads, -1)),
            "ln_2": self.norm(f"{name}.layer_norm2"),
            "mlp_in": self.dense(f"{name}.mlp.fc1"),
            "mlp_out": self.dense(f"{name}.mlp.fc2"),
        }

    def blocks(self, name: str, layers: int, heads: int) -> dict:
        blocks = [self.block(f"{name}.encoder.layers.{i}", heads) for i in range(layers)]
        return {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}

    def map_head(self, name: str, heads: int) -> dict:
        weight = np.split(self.take(f"{name}.attention.in_proj_weight"), 3)
        bias = np.split(self.take(f"{name}.attention.in_proj_bias"), 3)
        parts = [linear(w, b, outputs=(heads, -1)) for w, b in zip(weight, bias)]
        return {
            "probe": self.take(f"{name}.probe")[0, 0],
            **dict(zip(("query", "key", "value"), parts)),
            "attn_out": self.dense(f"{name}.attention.out_proj", inputs=(heads, -1)),
            "ln": self.norm(f"{name}.layernorm"),
            "mlp_in": self.dense(f"{name}.mlp.fc1"),
            "mlp_out": self.dense(f"{name}.mlp.fc2"),
        }


def siglip_to_clip_jax(tensors, size: models.Size) -> dict:
    names, image, text = SiglipRenamer(tensors), "vision_model", "text_model"
    patch = f"{image}.embeddings.patch_embedding"
    params = {
        "image": {
            "patch_embed": names.conv(patch) | {"bias": names.take(f"{patch}.bias")},
            "positions": names.take(f"{image}.embeddings.position_embedding.weight"),
            "transformer": names.blocks(image, size.image_layers[0], size.image_heads),
            "ln_post": names.norm(f"{image}.post_layernorm"),
            "map_head": names.map_head(f"{image}.head", size.image_heads),
        },
        "text": {
            "token_embed": {"embedding": names.take(f"{text}.embeddings.token_embedding.weight")},
            "positions": names.take(f"{text}.embeddings.position_embedding.weight"),
            "transformer": names.blocks(text, size.text_layers, size.text_heads),
            "ln_final": names.norm(f"{text}.final_layer_norm"),
            "projection": names.dense(f"{text}.head"),
        },
        "logit_scale": names.take("logit_scale")[0],
        "logit_bias": names.take("logit_bias")[0],
    }
    assert not names.tensors, f"not mapped: {list(names.tensors)}"
    return params


def test_siglip_equals_transformers():
    net, model = models.create("SigLIP-B/16", size=SHAPES), make_siglip()
    images, tokens = make_inputs(net.size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    out = model(input_ids=torch.from_numpy(tokens).long(), pixel_values=pixels)
    params = siglip_to_clip_jax(to_numpy(model.named_parameters()), net.size)
    image, text, scale, bias = jax.jit(net.apply)({"params": params}, images, tokens)
    assert_close(image, out.image_embeds)
    assert_close(text, out.text_embeds)
    assert_close(np.exp(scale) * image @ text.T + bias, out.logits_per_image)
