"""The Vision Transformer image tower (paper section 2.4), with a LayerNorm before the blocks."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Dtype, Transformer, layer_norm, torch_default_init


class VisionTransformer(nn.Module):
    """Normalised images [b, h, w, 3] -> embeddings [b, embed_dim], not yet L2-normalised."""

    size: Size
    dtype: Dtype
    scan_layers: bool
    remat: str

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        del train  # no layer behaves differently in training
        size, width = self.size, self.size.image_width
        assert size.patch_size is not None  # else it is a ResNet
        patch = (size.patch_size, size.patch_size)
        x = nn.Conv(
            width,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=torch_default_init,
            name="patch_embed",
        )(images)
        x = x.reshape(x.shape[0], -1, width)

        normal = nn.initializers.normal(width**-0.5)
        class_token = self.param("class_token", normal, (width,)).astype(x.dtype)
        class_token = jnp.broadcast_to(class_token, (x.shape[0], 1, width))
        x = jnp.concatenate([class_token, x], axis=1)
        x = x + self.param("positions", normal, x.shape[1:]).astype(x.dtype)

        x = layer_norm(self.dtype, "ln_pre")(x)
        x = Transformer(
            layers=size.image_layers[0],
            heads=size.image_heads,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            causal=False,
            paper_init=False,
            name="transformer",
        )(x)
        x = layer_norm(self.dtype, "ln_post")(x[:, 0])
        return nn.Dense(
            size.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=normal, name="projection"
        )(x)
