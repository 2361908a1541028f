"""The forward passes written out once more, in NumPy and float64, to test the models against."""

import math

import jax
import numpy as np

ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


def layer_norm(x, p, eps: float = 1e-5):
    if "bias" in p:  # else an RMSNorm
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p.get("bias", 0)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def mlp(x, p, activation: str):
    kernel, bias = p["mlp_in"]["kernel"], p["mlp_in"]["bias"]
    if activation == "swiglu":
        gate, up = (x @ kernel[:, i] + bias[i] for i in range(2))
        x = gate / (1 + np.exp(-gate)) * up
    else:
        x = ACTIVATIONS[activation](x @ kernel + bias)
    return x @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]


def block(x, p, causal: bool, activation: str = "quick_gelu", eps: float = 1e-5, rope=None):
    y = layer_norm(x, p["ln_1"], eps)
    qkv = np.einsum("bsw,wthd->tbhsd", y, p["qkv"]["kernel"])
    q, k, v = qkv + p["qkv"]["bias"][:, None, :, None]
    if "ln_q" in p:
        q, k = layer_norm(q, p["ln_q"], eps), layer_norm(k, p["ln_k"], eps)
    q, k = (part if rope is None else rotated(part, *rope) for part in (q, k))
    logits = np.einsum("bhsd,bhtd->bhst", q, k) / np.sqrt(q.shape[-1])
    if causal:
        logits = np.where(np.tri(x.shape[1], dtype=bool), logits, -np.inf)
    y = np.einsum("bhst,bhtd->bshd", softmax(logits), v)
    y = np.einsum("bshd,hdw->bsw", y, p["attn_out"]["kernel"]) + p["attn_out"]["bias"]
    x = x + y * p.get("attn_scale", 1)
    return x + mlp(layer_norm(x, p["ln_2"], eps), p, activation) * p.get("mlp_scale", 1)


def rotated(x, tokens: int, side: int, places):
    """Axial RoPE by complex numbers, a pair of channels each; [b, heads, places, channels]."""
    count = x.shape[-1] // 4
    turns = np.ones((tokens + side * side, 2 * count), complex)
    for patch in range(side * side):
        for i in range(count):
            for start, at in ((0, patch % side), (count, patch // side)):
                angle = (at + bool(tokens)) / 10_000 ** (i / count)
                turns[tokens + patch, start + i] = complex(math.cos(angle), math.sin(angle))
    y = (x[..., ::2] + 1j * x[..., 1::2]) * turns[places]
    return np.stack([y.real, y.imag], axis=-1).reshape(x.shape)


def transformer(x, blocks, causal: bool, **form):
    for layer in range(len(blocks["ln_1"]["scale"])):
        x = block(x, jax.tree.map(lambda leaf, i=layer: leaf[i], blocks), causal, **form)
    return x


def pixels(images):
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    return (images / 255 - mean) / np.array([0.26862954, 0.26130258, 0.27577711])


def patches(images, p, side: int):
    b, h, w, _ = images.shape
    x = pixels(images).reshape(b, h // side, side, w // side, side, 3)
    x = np.einsum("byixjc,ijcw->byxw", x, p["kernel"]) + p.get("bias", 0)
    return x.reshape(b, h * w // side**2, -1)


def vit_tokens(images, p, patch: int, **form):
    x = patches(images, p["patch_embed"], patch)
    if "class_token" in p:
        x = np.concatenate([np.broadcast_to(p["class_token"], (len(x), 1, x.shape[2])), x], axis=1)
    x = layer_norm(x + p["positions"], p["ln_pre"])
    return transformer(x, p["transformer"]["blocks"], causal=False, **form)


def vit(images, p, patch: int, **form):
    x = vit_tokens(images, p, patch, **form)
    return unit(layer_norm(x[:, 0], p["ln_post"]) @ p["projection"]["kernel"])


SIGLIP = {"activation": "gelu_tanh", "eps": 1e-6}


def siglip_vit(images, p, patch: int):
    x = patches(images, p["patch_embed"], patch) + p["positions"]
    x = transformer(x, p["transformer"]["blocks"], causal=False, **SIGLIP)
    x = map_head(layer_norm(x, p["ln_post"], 1e-6), p["map_head"], **SIGLIP)
    return unit(x @ p["projection"]["kernel"] if "projection" in p else x)


def map_head(x, head, activation: str, eps: float = 1e-5):
    query, key, value = (head[name] for name in ("query", "key", "value"))
    q = np.einsum("w,whd->hd", head["probe"], query["kernel"]) + query["bias"]
    k, v = (np.einsum("bsw,whd->bshd", x, part["kernel"]) + part["bias"] for part in (key, value))
    weights = softmax(np.einsum("hd,bshd->bhs", q, k) / np.sqrt(q.shape[-1]))
    y = np.einsum("bhs,bshd->bhd", weights, v)
    x = np.einsum("bhd,hdw->bw", y, head["attn_out"]["kernel"]) + head["attn_out"]["bias"]
    return x + mlp(layer_norm(x, head["ln"], eps), head, activation)


def siglip_text(tokens, p):
    x = p["token_embed"]["embedding"][tokens] + p["positions"]
    x = transformer(x, p["transformer"]["blocks"], causal=False, **SIGLIP)
    x = layer_norm(x[:, -1], p["ln_final"], 1e-6)
    return unit(x @ p["projection"]["kernel"] + p["projection"]["bias"])


def sincos(side: int, width: int):
    """The positions of MoCo v3 a number at a time."""
    table = np.zeros((side * side, width))
    quarter = width // 4
    for patch in range(side * side):
        for i in range(quarter):
            for start, at in ((0, patch % side), (2 * quarter, patch // side)):
                angle = at / 10_000 ** (i / quarter)
                table[patch, start + i] = math.sin(angle)
                table[patch, start + quarter + i] = math.cos(angle)
    return table


def pooled_vit(images, p, size, kept=None):
    """A ViT with any pooling, from its size; `kept`: only these patches."""
    x = patches(images, p["patch_embed"], size.patch_size)
    count = x.shape[1]
    for name in ("register_embedding", "class_token"):
        if name in p:
            tokens = np.atleast_2d(p[name])
            x = np.concatenate([np.broadcast_to(tokens, (len(x), *tokens.shape)), x], axis=1)
    fixed = sincos(math.isqrt(count), x.shape[2])
    fixed = np.pad(fixed, ((x.shape[1] - count, 0), (0, 0)))
    x = x + p.get("positions", fixed)
    tokens = x.shape[1] - count
    rope = (tokens, math.isqrt(count), slice(None)) if size.image_rope else None
    if kept is not None:
        places = [*range(tokens), *(tokens + patch for patch in kept)]
        x, count = x[:, places], len(kept)
        rope = (*rope[:2], places) if rope else None
    x = layer_norm(x, p["ln_pre"]) if "ln_pre" in p else x
    x = transformer(
        x, p["transformer"]["blocks"], causal=False, activation=size.activation, rope=rope
    )
    if size.image_pool == "class":
        x = layer_norm(x, p["ln_post"])[:, 0]
    elif size.image_pool == "map":
        x = map_head(layer_norm(x, p["ln_post"]), p["map_head"], size.activation)
    elif size.norm_after_pool:
        x = layer_norm(x[:, -count:].mean(1), p["ln_post"])
    else:
        x = layer_norm(x, p["ln_post"])[:, -count:].mean(1)
    return unit(x @ p["projection"]["kernel"] + p["projection"].get("bias", 0))


def pooled_text(tokens, p, size):
    """A text tower that is not causal, with any pooling, from its size."""
    activation = size.text_activation or size.activation
    x = p["token_embed"]["embedding"][tokens] + p["positions"]
    x = transformer(x, p["transformer"]["blocks"], causal=False, activation=activation)
    x = layer_norm(x, p["ln_final"])
    if size.text_pool == "map":
        x = map_head(x, p["map_head"], activation)
    else:
        x = {"first": x[:, 0], "last": x[:, -1], "avg": x.mean(1)}[size.text_pool]
    return unit(x @ p["projection"]["kernel"] if "projection" in p else x)


def text(tokens, p, **form):
    rows = []
    for row in tokens:  # one caption at a time, cut behind its end token
        row = row[: list(row).index(max(row)) + 1]
        x = (p["token_embed"]["embedding"][row] + p["positions"][: len(row)])[None]
        x = transformer(x, p["transformer"]["blocks"], causal=True, **form)
        rows.append(layer_norm(x[0, -1], p["ln_final"]) @ p["projection"]["kernel"])
    return unit(np.stack(rows))


def conv(x, p, stride: int = 1):
    kernel = p["kernel"]
    pad = kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    x = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("byxcij,ijco->byxo", x[:, ::stride, ::stride], kernel)


def pool(x, stride: int):
    b, h, w, c = x.shape
    return x.reshape(b, h // stride, stride, w // stride, stride, c).mean((2, 4))


def batch_norm(x, params, running: dict | None):
    """Normalises with `running` statistics, or with those of the batch."""
    mean = running["mean"] if running else x.mean((0, 1, 2))
    var = running["var"] if running else x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def resnet(images, p, running: dict | None, activation=lambda x: np.maximum(x, 0)):
    def norm(x, *path):
        stats, params = running, p
        for key in path:
            stats, params = stats and stats[key], params[key]
        return batch_norm(x, params, stats)

    x = pixels(images)
    for i in "123":
        x = conv(x, p[f"stem_conv{i}"], stride=2 if i == "1" else 1)
        x = activation(norm(x, f"stem_bn{i}"))
    x = pool(x, 2)
    for name in sorted(key for key in p if key.startswith("stage")):
        b = p[name]
        stride = 2 if name.endswith("block0") and not name.startswith("stage1") else 1
        y = activation(norm(conv(x, b["conv1"]), name, "bn1"))
        y = activation(norm(conv(y, b["conv2"]), name, "bn2"))
        y = norm(conv(pool(y, stride), b["conv3"]), name, "bn3")
        if "shortcut_conv" in b:
            x = conv(pool(x, stride), b["shortcut_conv"])
            x = norm(x, name, "shortcut_bn")
        x = activation(x + y)
    return unit(attention_pool(x, p["attention_pool"]))


def attention_pool(x, p):
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = np.concatenate([x.mean(1, keepdims=True), x], axis=1) + p["positions"]
    q, k, v = (
        np.einsum("bsw,whd->bhsd", x, p[n]["kernel"]) + p[n]["bias"][:, None]
        for n in ("query", "key", "value")
    )
    weights = softmax(np.einsum("bhd,bhtd->bht", q[:, :, 0], k) / np.sqrt(q.shape[-1]))
    y = np.einsum("bht,bhtd->bhd", weights, v)
    return np.einsum("bhd,hde->be", y, p["projection"]["kernel"]) + p["projection"]["bias"]
