"""ModifiedResNet (paper section 2.4): ResNet-D, anti-aliased strides, attention pooling.

And its form for the detector of near-duplicates (appendix C): GELU, and weight normalisation
(Salimans & Kingma 2016, arXiv:1602.07868) instead of BatchNorm, whose statistics would leak which
images of a batch are near-duplicates.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from clip_jax import sharding
from clip_jax.models.layers import (
    ACTIVATIONS,
    Dtype,
    remat_part,
    torch_default_bias_init,
    torch_default_init,
)
from clip_jax.models.sizes import Size

Maps = Float[Array, "batch height width channels"]
NewMaps = Float[Array, "batch new_height new_width new_channels"]

_ACTIVATIONS = {"relu": nn.relu, **ACTIVATIONS}


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


def _average_pool(x: Maps, stride: int) -> NewMaps:
    return nn.avg_pool(x, (stride, stride), strides=(stride, stride)) if stride > 1 else x


def _batch_norm(train: bool, dtype: Dtype):
    """Returns a BatchNorm; under jit the batch is global, so that all devices share statistics."""
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        use_fast_variance=False,
    )


class WeightNormConv(nn.Module):
    """A convolution whose kernels have learned norms, at first `gain`."""

    channels: int
    kernel: int
    stride: int
    gain: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", torch_default_init, shape)
        scale = self.param("scale", nn.initializers.constant(self.gain), (self.channels,))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        kernel = kernel * scale * jax.lax.rsqrt(jnp.sum(kernel**2, axis=(0, 1, 2)))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        padding = ((self.kernel // 2, self.kernel // 2),) * 2
        layout = ("NHWC", "HWIO", "NHWC")
        strides = (self.stride, self.stride)
        y = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)
        return y + bias


def _normed_conv(
    size: Size,
    dtype: Dtype,
    train: bool,
    x: Maps,
    channels: int,
    kernel: int,
    name: str,
    stride: int = 1,
    zero_gain: bool = False,
) -> NewMaps:
    """Applies a convolution and its normalisation, of the kind that the size names.

    Called within a module, whose layers they become: `name` has {} for "conv" or "bn".
    """
    conv, norm = name.format("conv"), name.format("bn")
    if size.resnet_norm == "weight":
        gain = 0.0 if zero_gain else 2**0.5  # halved by the activation, the variance is kept
        return WeightNormConv(channels, kernel, stride, gain, dtype, name=conv)(x)
    gain = nn.initializers.zeros if zero_gain else nn.initializers.ones
    x = _conv(channels, kernel, dtype, conv, stride)(x)
    return _batch_norm(train, dtype)(name=norm, scale_init=gain)(x)


class Bottleneck(nn.Module):
    """Residual block [b, h, w, c] -> [b, h / stride, w / stride, 4 * channels]."""

    size: Size
    channels: int
    stride: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> NewMaps:
        conv = partial(_normed_conv, self.size, self.dtype, train)
        activation = _ACTIVATIONS[self.size.resnet_activation]
        out = 4 * self.channels
        y = activation(conv(x, self.channels, 1, "{}1"))
        y = activation(conv(y, self.channels, 3, "{}2"))
        y = _average_pool(y, self.stride)
        # Zero gain: every block starts as the identity.
        y = conv(y, out, 1, "{}3", zero_gain=True)
        if self.stride > 1 or x.shape[-1] != out:
            x = conv(_average_pool(x, self.stride), out, 1, "shortcut_{}")
        return activation(x + y)


class AttentionPool(nn.Module):
    """Attention pooling whose one query is the mean of the positions."""

    heads: int
    embed_dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "batch embed"]:
        width = x.shape[-1]
        normal, bias = nn.initializers.normal(width**-0.5), torch_default_bias_init(width)
        x = x.reshape(x.shape[0], -1, width)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        x = x + self.param("positions", normal, x.shape[1:]).astype(x.dtype)
        project = partial(
            nn.DenseGeneral,
            (self.heads, width // self.heads),
            dtype=self.dtype,
            kernel_init=normal,
            bias_init=bias,
        )
        x = jax.nn.dot_product_attention(
            project(name="query")(x[:, :1]), project(name="key")(x), project(name="value")(x)
        )
        return nn.DenseGeneral(
            self.embed_dim,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=normal,
            bias_init=bias,
            name="projection",
        )(x)[:, 0]


class ModifiedResNet(nn.Module):
    """Normalised images [b, h, w, 3] -> embeddings [b, embed_dim], not yet L2-normalised.

    Attributes:
      remat: recomputation of the stem and of each block in the backward pass; see
        `layers.remat_layer`.
    """

    size: Size
    dtype: Dtype
    remat: str

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, "batch embed"]:
        size = self.size
        stem = remat_part(ModifiedResNet._stem, self.remat)
        bottleneck = remat_part(Bottleneck, self.remat)
        x = stem(self, sharding.spread_batch(images), train)
        for stage, blocks in enumerate(size.image_layers):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block}"
                layer = bottleneck(size, size.image_width * 2**stage, stride, self.dtype, name=name)
                x = layer(sharding.spread_batch(x), train)
        pool = AttentionPool(size.image_heads, size.embed_dim, self.dtype, name="attention_pool")
        x = pool(x)
        self.sow("intermediates", "features", x)  # features for linear probes
        return x

    def _stem(self, x: Maps, train: bool) -> NewMaps:
        """Maps images to [b, h / 4, w / 4, image_width]."""
        conv = partial(_normed_conv, self.size, self.dtype, train)
        activation, width = _ACTIVATIONS[self.size.resnet_activation], self.size.image_width
        for i, channels in enumerate((width // 2, width // 2, width), start=1):
            x = activation(conv(x, channels, 3, f"stem_{{}}{i}", stride=2 if i == 1 else 1))
        return _average_pool(x, 2)
