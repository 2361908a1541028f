"""ModifiedResNet (paper section 2.4): ResNet-D, anti-aliased strides, attention pooling."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from clip_jax import sharding
from clip_jax.models.sizes import Size
from clip_jax.models.transformer import Dtype, torch_default_init


def _conv(channels: int, kernel: int, dtype: Dtype, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=torch_default_init,
        name=name,
    )


def _average_pool(x: jax.Array, stride: int) -> jax.Array:
    return nn.avg_pool(x, (stride, stride), strides=(stride, stride)) if stride > 1 else x


def _batch_norm(train: bool, dtype: Dtype):
    """Under jit the batch is the global one, so statistics are synchronised over all devices."""
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        use_fast_variance=False,
    )


class Bottleneck(nn.Module):
    """Residual block [b, h, w, c] -> [b, h / stride, w / stride, 4 * channels]."""

    channels: int
    stride: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = _batch_norm(train, self.dtype)
        out = 4 * self.channels
        y = nn.relu(norm(name="bn1")(_conv(self.channels, 1, self.dtype, "conv1")(x)))
        y = nn.relu(norm(name="bn2")(_conv(self.channels, 3, self.dtype, "conv2")(y)))
        y = _average_pool(y, self.stride)
        y = _conv(out, 1, self.dtype, "conv3")(y)
        # Zero gain: every block starts as the identity.
        y = norm(name="bn3", scale_init=nn.initializers.zeros)(y)
        if self.stride > 1 or x.shape[-1] != out:
            x = _average_pool(x, self.stride)
            x = _conv(out, 1, self.dtype, "shortcut_conv")(x)
            x = norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """[b, h, w, c] -> [b, embed_dim]: attention whose one query is the mean of the positions."""

    heads: int
    embed_dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        normal = nn.initializers.normal(width**-0.5)
        x = x.reshape(x.shape[0], -1, width)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        x = x + self.param("positions", normal, x.shape[1:]).astype(x.dtype)
        project = partial(
            nn.DenseGeneral,
            (self.heads, width // self.heads),
            dtype=self.dtype,
            kernel_init=normal,
        )
        x = jax.nn.dot_product_attention(
            project(name="query")(x[:, :1]), project(name="key")(x), project(name="value")(x)
        )
        return nn.DenseGeneral(
            self.embed_dim, axis=(-2, -1), dtype=self.dtype, kernel_init=normal, name="projection"
        )(x)[:, 0]


class ModifiedResNet(nn.Module):
    """Normalised images [b, h, w, 3] -> embeddings [b, embed_dim], not yet L2-normalised."""

    size: Size
    dtype: Dtype

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        size, width = self.size, self.size.image_width
        norm = _batch_norm(train, self.dtype)
        x = sharding.spread_batch(images)
        for i, channels in enumerate((width // 2, width // 2, width), start=1):
            stride = 2 if i == 1 else 1
            x = _conv(channels, 3, self.dtype, f"stem_conv{i}", stride)(x)
            x = nn.relu(norm(name=f"stem_bn{i}")(x))
        x = _average_pool(x, 2)
        for stage, blocks in enumerate(size.image_layers):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(
                    width * 2**stage, stride, self.dtype, name=f"stage{stage + 1}_block{block}"
                )(sharding.spread_batch(x), train)
        pool = AttentionPool(size.image_heads, size.embed_dim, self.dtype, name="attention_pool")
        x = pool(x)
        self.sow("intermediates", "features", x)  # what linear probes read
        return x
