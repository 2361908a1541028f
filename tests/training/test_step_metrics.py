"""Norms by tower, alignment and uniformity, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.spatial import distance

from clip_jax import losses, sharding
from clip_jax.losses import geometry

ONE, FSDP = (1, 1), (2, 4)  # mesh.data, mesh.fsdp


def uniformity(embeds: np.ndarray) -> float:
    """Over the pairs of every k-th example, so that no more than 256 are compared."""
    stride = -(-len(embeds) // 256)
    chosen = embeds[::stride][: len(embeds) // stride].astype(np.float64)
    return np.log(np.mean(np.exp(-2 * distance.pdist(chosen, "sqeuclidean"))))


def norm(leaves: list[np.ndarray]) -> float:
    return np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in leaves))


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(2, "float32"), (16, "bfloat16"), (256, "float32"), (600, "bfloat16"), (1001, "float32")],
)
def test_geometry(batch: int, dtype: str):
    rng = np.random.default_rng(batch)
    made = rng.normal(0.3, 1, (2, batch, 8))
    embeds = made / np.linalg.norm(made, axis=-1, keepdims=True)
    images, texts = jnp.asarray(embeds, dtype)
    rounded = np.asarray(images, float), np.asarray(texts, float)
    want = [np.mean(np.sum((rounded[0] - rounded[1]) ** 2, axis=1)), *map(uniformity, rounded)]
    got = [geometry.alignment(images, texts), *map(geometry.uniformity, (images, texts))]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_only_the_compared_rows_travel():
    """Each of 8 devices sends its part of 256 rows, not of the batch."""
    mesh = tiny.make_mesh(*FSDP)
    place = sharding.batch_sharding(mesh)
    embeds = jax.ShapeDtypeStruct((2048, 32), np.float32, sharding=place)
    program = jax.jit(geometry.uniformity, out_shardings=sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        text = program.lower(embeds).compile().as_text()
    assert "f32[256,32]{1,0} all-gather" in text
    assert "2048" not in text


@functools.cache
def expected() -> dict[str, float]:
    """The metrics of the initial state, by the plain loss on one device and NumPy."""
    net = tiny.make_net("vit")
    state, batch = tiny.init_state(net, tiny.make_mesh(*ONE)), tiny.make_batch(net)

    def loss(params):
        outputs = net.apply({"params": params}, batch["image"], batch["tokens"])
        return losses.softmax_loss(*outputs), outputs

    (_, (images, texts, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    images, texts = (np.asarray(x, np.float64) for x in (images, texts))
    want = {
        "alignment": np.mean(np.sum((images - texts) ** 2, axis=1)),
        "uniformity/image": uniformity(images),
        "uniformity/text": uniformity(texts),
    }
    leaves = tiny.named_leaves(grads)
    for part in ("image", "text"):
        mine = [leaf for name, leaf in leaves.items() if name.startswith(f"{part}/")]
        want[f"grad_norm/{part}"] = norm(mine)
    want["grad_norm/other"] = norm([leaves["logit_scale"]])
    return want


@pytest.mark.parametrize(
    ("axes", "accum_steps"),
    [
        pytest.param(ONE, 1, marks=pytest.mark.slow),
        pytest.param(FSDP, 1, marks=pytest.mark.slow),
        (FSDP, 2),
    ],
)
def test_metrics_of_the_step(axes: tuple[int, int], accum_steps: int):
    net, mesh = tiny.make_net("vit"), tiny.make_mesh(*axes)
    state, batch = tiny.init_state(net, mesh), tiny.put_batch(net, mesh)
    step = tiny.compile_step(net, mesh, state, batch, accum_steps=accum_steps)
    after, metrics = step(state, batch)
    for name, value in expected().items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    for part in ("image", "text"):
        want = norm(list(tiny.named_leaves(after.params[part]).values()))
        assert float(metrics[f"param_norm/{part}"]) == pytest.approx(want, rel=1e-6)
    for name in ("grad_norm", "param_norm"):
        parts = [float(metrics[f"{name}/{part}"]) for part in ("image", "text", "other")]
        assert float(metrics[name]) == pytest.approx(np.linalg.norm(parts), rel=1e-6)
