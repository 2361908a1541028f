"""FLOPs that a model needs, however it is compiled: the numerator of the MFU."""

from clip_jax import choices
from clip_jax.models.captioner import PREFIX
from clip_jax.models.sizes import Size


def step_flops(size: Size, batch_size: int, captions: int) -> float:
    """Counts the multiplications and additions of one training step.

    Matrix products and convolutions only; forward, and twice as many backward. Nothing is
    recomputed; every caption has its full context, every token passes every layer, read in the end
    or not (the usual convention), attention covers all pairs of tokens, every logit is computed
    once.

    Args:
      size: the model's.
      batch_size: images per step.
      captions: captions of each image.
    """
    logits = 0.0
    if size.objective in ("contrastive", "near_duplicates"):
        logits = captions * 2.0 * batch_size * size.embed_dim  # of each text with all images
    if size.views_mlp:  # of two views with two of each image
        logits += 8.0 * batch_size * size.views_embed
    return 3.0 * batch_size * (pair_flops(size, captions) + logits)


def pair_flops(size: Size, captions: int) -> float:
    """Counts the operations of the forward pass of one image and its captions."""
    total = image_flops(size) + captions * text_flops(size)
    if size.views_mlp:
        hidden = size.views_mlp
        head = hidden * (size.feature_width + hidden + size.views_embed)
        total += 2 * (image_flops(size) + 2.0 * head)
    return total


def image_flops(size: Size) -> float:
    """Counts the operations of the forward pass of one image."""
    if size.is_resnet:
        return _resnet_flops(size)
    assert size.patch_size is not None
    tokens, width = size.image_tokens, size.image_width
    total = 2.0 * size.patches_per_side**2 * size.patch_size**2 * 3 * width
    gated = size.activation in choices.GATED
    total += size.image_layers[0] * _block_flops(tokens, width, size.image_mlp, gated)
    if size.image_pool == "map":
        total += _map_head_flops(tokens, width, size.map_mlp or size.image_mlp, gated)
    return total + 2.0 * width * size.embed_dim * size.image_projection


def text_flops(size: Size) -> float:
    """Counts the operations of the forward pass of one caption, or of an image's second view."""
    if size.objective == "near_duplicates":
        return image_flops(size)
    if size.objective == "bag_of_words":
        return 2.0 * size.embed_dim * size.vocab_size
    gated = (size.text_activation or size.activation) in choices.GATED
    if size.objective == "captioning":
        written = size.context_length - 1
        block = _block_flops(PREFIX + written, size.text_width, size.text_mlp, gated)
        ends = PREFIX * size.embed_dim + written * size.vocab_size
        return size.text_layers * block + 2.0 * size.text_width * ends
    shape = size.context_length, size.text_width, size.text_mlp, gated
    total = size.text_layers * _block_flops(*shape) + _decoder_flops(size, gated)
    if size.text_pool == "map":
        total += _map_head_flops(*shape)
    return total + 2.0 * size.text_width * size.embed_dim * size.text_projection


def _decoder_flops(size: Size, gated: bool) -> float:
    """Counts the operations of the decoder beside a contrastive model, for one caption."""
    if not size.text_decoder_layers:
        return 0.0
    written, width, tokens = size.context_length - 1, size.text_width, size.image_tokens
    own = size.text_layers if size.text_decoder_shared else size.text_decoder_layers
    cross = 4.0 * width * (written * width + tokens * (width + written))
    cross += 2.0 * written * width * (2 + gated) * size.text_mlp
    return (
        own * _block_flops(written, width, size.text_mlp, gated)
        + size.text_decoder_layers * cross
        + 2.0 * tokens * size.image_width * width  # once an image, if it has several captions
        + 2.0 * written * width * size.vocab_size
    )


def _block_flops(tokens: int, width: int, mlp: int, gated: bool) -> float:
    """Counts projections and MLP, then attention: tokens against tokens, twice."""
    return 2.0 * tokens * width * (4 * width + (2 + gated) * mlp) + 4.0 * tokens**2 * width


def _map_head_flops(tokens: int, width: int, mlp: int, gated: bool) -> float:
    """Counts one query over all tokens, and an MLP on the result."""
    return 2.0 * width * (2 * tokens * width + 2 * tokens + 2 * width + (2 + gated) * mlp)


def _resnet_flops(size: Size) -> float:
    """Counts the operations of the ResNet: stem convolutions, bottlenecks, attention pool."""
    width, side = size.image_width, size.image_size // 2
    half = width // 2
    total = 2.0 * side**2 * 9 * (3 * half + half * half + half * width)
    side, inputs = side // 2, width
    for stage, blocks in enumerate(size.image_layers):
        inner = width * 2**stage
        outputs = 4 * inner
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            small = side // stride
            total += 2.0 * side**2 * (inputs * inner + 9 * inner * inner)
            total += 2.0 * small**2 * inner * outputs
            if not block:
                total += 2.0 * small**2 * inputs * outputs  # the shortcut
            side, inputs = small, outputs
    tokens = side**2 + 1  # and their mean, which is the only query
    total += 2.0 * inputs * (inputs + 2 * tokens * inputs + 2 * tokens)
    return total + 2.0 * inputs * size.embed_dim
