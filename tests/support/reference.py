"""The losses in NumPy float64, derived by hand, and embeddings to try them on."""

import numpy as np


def softmax_loss(
    images, texts, logit_scale, smoothing: float = 0.0, weights=None
) -> tuple[float, np.ndarray, np.ndarray, float]:
    """Loss and its gradients in images [B, e], texts [B, (c,) e] and logit_scale, all float64.

    Two cross-entropies: of the distributions over texts by image, and over images by text.
    """
    images, texts, log_scale = (np.asarray(x, np.float64) for x in (images, texts, logit_scale))
    shape, texts, own = texts.shape, texts.reshape(-1, texts.shape[-1]), _own(images, texts)
    scale, batch, captions = np.exp(log_scale), *own.shape
    logits = scale * images @ texts.T
    by_row, row_lse = _softmax(logits, axis=1)
    by_column, column_lse = _softmax(logits, axis=0)
    row_target = (1 - smoothing) * own / own.sum(axis=1, keepdims=True) + smoothing / captions
    column_target = (1 - smoothing) * own + smoothing / batch
    row_losses = (row_target * (row_lse[:, None] - logits)).sum(axis=1)
    column_losses = (column_target * (column_lse - logits)).sum(axis=0)
    of_rows, of_columns = _shares(weights, batch, captions)
    loss = (of_rows @ row_losses + of_columns @ column_losses) / 2
    d_logits = of_rows[:, None] * (by_row - row_target) + of_columns * (by_column - column_target)
    d_logits /= 2
    d_images, d_texts = scale * d_logits @ texts, scale * d_logits.T @ images
    return float(loss), d_images, d_texts.reshape(shape), float(np.sum(d_logits * logits))


def sigmoid_loss(images, texts, logit_scale, logit_bias, weights=None):
    """Loss and its gradients in all four arguments, all float64."""
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    shape, texts, own = texts.shape, texts.reshape(-1, texts.shape[-1]), _own(images, texts)
    products = images @ texts.T
    of_rows, of_columns = _shares(weights, *own.shape)
    of_pairs = (len(images) * of_rows[:, None] + len(texts) * of_columns) / 2 / len(texts)
    scale = np.exp(np.float64(logit_scale))
    signs = 2 * own - 1
    wrong = -signs * (scale * products + np.float64(logit_bias))
    d_logits = -signs / (1 + np.exp(-wrong)) * of_pairs
    loss = np.sum(np.logaddexp(0, wrong) * of_pairs)
    d_images, d_texts = scale * d_logits @ texts, scale * d_logits.T @ images
    d_texts = d_texts.reshape(shape)
    return loss, d_images, d_texts, np.sum(d_logits * scale * products), d_logits.sum()


def distillation_loss(images, texts, logit_scale, teachers, weights=None):
    """Loss and its gradients in images, texts [B, (c,) e] and logit_scale, all float64."""
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    shape, texts = texts.shape, texts.reshape(-1, texts.shape[-1])
    scale = np.exp(np.float64(logit_scale))
    logits = scale * images @ texts.T
    of_rows, of_columns = _shares(weights, *logits.shape)
    loss, d_logits = 0.0, np.zeros_like(logits)
    for their_images, their_texts, their_scale in teachers:
        their_texts = np.asarray(their_texts, np.float64).reshape(len(texts), -1)
        theirs = np.exp(np.float64(their_scale)) * np.float64(their_images) @ their_texts.T
        for axis, share in ((1, of_rows[:, None]), (0, of_columns[None])):
            (p, p_lse), (q, q_lse) = (_softmax(x, axis) for x in (theirs, logits))
            log_p, log_q = (
                theirs - np.expand_dims(p_lse, axis),
                logits - np.expand_dims(q_lse, axis),
            )
            loss += np.sum(share * p * (log_p - log_q)) / 2 / len(teachers)
            d_logits += share * (q - p) / 2 / len(teachers)
    d_images, d_texts = scale * d_logits @ texts, scale * d_logits.T @ images
    return float(loss), d_images, d_texts.reshape(shape), float(np.sum(d_logits * logits))


def _shares(weights, batch: int, captions: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each image, and of each caption; both sum to 1."""
    rows = np.asarray(np.ones(batch) if weights is None else weights, np.float64)
    columns = np.repeat(rows, captions // batch)
    return rows / rows.sum(), columns / columns.sum()


def _own(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """1 for an image and a caption of its own, [B, B x c]."""
    captions = texts.size // images.size
    return np.kron(np.eye(len(images)), np.ones((1, captions)))


def _softmax(logits: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    top = logits.max(axis=axis, keepdims=True)
    odds = np.exp(logits - top)
    total = odds.sum(axis=axis, keepdims=True)
    return odds / total, (top + np.log(total)).squeeze(axis)


def pairs(
    batch: int, width: int, seed: int = 0, captions: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors float32 [batch, width], each text somewhere near its image.

    With several captions an image, the texts are [batch, captions, width].

    Some pairs are close and some are far, so that at any temperature some examples are solved and
    others not, and neither loss nor gradients vanish.
    """
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, width))
    closeness = rng.uniform(0, 1.5, (batch, captions, 1))
    texts = closeness * images[:, None] + rng.normal(size=(batch, captions, width))
    return _unit(images), _unit(texts if captions > 1 else texts[:, 0])


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def relative_error(got, want) -> float:
    """Largest difference, relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Keys' cubic (a = -1/2) from `old` to `new` >= `old` samples, float64 [new, old]."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    x = np.abs(centres[:, None] - np.arange(old))
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)  # what lies beyond the edge is left out


def resized(positions: np.ndarray, new: int) -> np.ndarray:
    """Reference of `resize_positions`: [1 + old * old, w] -> [1 + new * new, w]."""
    old = round((len(positions) - 1) ** 0.5)
    grid = np.asarray(positions[1:], np.float64).reshape(old, old, -1)
    weights = cubic_weights(old, new)
    grid = np.einsum("ai,bj,ijw->abw", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([positions[:1], grid])


def views_loss(views, logit_scale, weights=None) -> tuple[float, np.ndarray]:
    """NT-Xent of two views of each image [B, 2, e] and its gradient, a view at a time, float64."""
    flat = np.asarray(views, np.float64).reshape(-1, views.shape[-1])
    scale, grads = np.exp(np.float64(logit_scale)), np.zeros(flat.shape)
    shares = np.repeat(np.ones(len(views)) if weights is None else weights, 2).astype(np.float64)
    loss = 0.0
    for i, share in enumerate(shares / shares.sum()):
        others = [j for j in range(len(flat)) if j != i]
        logits = scale * flat[others] @ flat[i]
        odds = np.exp(logits - logits.max())
        target = np.array([j == i ^ 1 for j in others], float)
        loss -= share * (target @ logits - logits.max() - np.log(odds.sum()))
        d_logits = share * scale * (odds / odds.sum() - target)
        grads[i] += d_logits @ flat[others]
        grads[others] += d_logits[:, None] * flat[i]
    return loss, grads.reshape(views.shape)
