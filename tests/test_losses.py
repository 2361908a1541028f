"""The sharded loss against NumPy float64, and what it computes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from clip_jax import losses, sharding
from clip_jax.errors import UserError

MESHES = {"plain": None, "1": (1, 1), "8x1": (8, 1), "2x4": (2, 4)}
TEMPERATURES = {"initial": math.log(1 / 0.07), "final": math.log(100)}
BATCH, WIDTH = 48, 40


def make_mesh(name: str) -> jax.sharding.Mesh | None:
    axes = MESHES[name]
    return axes and sharding.make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])


def value_and_grads(mesh, images, texts, logit_scale):
    """Loss and the gradients in all three arguments, on embeddings that lie on the mesh."""
    if mesh is not None:
        images, texts = jax.device_put((images, texts), sharding.batch_sharding(mesh))

    def loss(images, texts, logit_scale):
        return losses.softmax_loss(images, texts, logit_scale, mesh=mesh)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, grads = grad(images, texts, jnp.float32(logit_scale))
    return value, *grads


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("mesh", MESHES)
def test_value_and_gradients_in_float32(mesh: str, temperature: str):
    logit_scale = np.float32(TEMPERATURES[temperature])
    images, texts = reference.pairs(BATCH, WIDTH)
    want = reference.softmax_loss(images, texts, logit_scale)
    assert want[0] > 0.5  # nats: there is something to compare
    got = value_and_grads(make_mesh(mesh), images, texts, logit_scale)
    for name, a, b in zip(("loss", "d_images", "d_texts", "d_logit_scale"), got, want):
        assert a.dtype == jnp.float32
        assert reference.relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("mesh", MESHES)
def test_value_and_gradients_in_bfloat16(mesh: str):
    """bfloat16 has 8 bits: 2^-8 in the gradients' rounding; value and sums stay float32."""
    images, texts = (jnp.asarray(x, jnp.bfloat16) for x in reference.pairs(BATCH, WIDTH))
    logit_scale = np.float32(TEMPERATURES["initial"])
    want = reference.softmax_loss(images, texts, logit_scale)
    got = value_and_grads(make_mesh(mesh), images, texts, logit_scale)
    loss, d_images, d_texts, d_scale = got
    assert loss.dtype == d_scale.dtype == jnp.float32
    assert d_images.dtype == d_texts.dtype == jnp.bfloat16
    # Products of bfloat16 numbers are exact in float32, so the logits are.
    assert reference.relative_error(loss, want[0]) < 1e-5
    assert reference.relative_error(d_scale, want[3]) < 1e-5
    for a, b in zip((d_images, d_texts), want[1:3]):
        assert reference.relative_error(a, b) < 2**-7


def test_reference_by_finite_differences():
    """The gradients that everything is compared with are those of the reference's own loss."""
    images, texts = (x.astype(np.float64) for x in reference.pairs(6, 5))
    scale, step = np.array(2.0), 1e-5
    _, *grads = reference.softmax_loss(images, texts, scale)
    for argument, grad in enumerate(grads):
        for index in np.ndindex(np.shape(grad)):
            ends = []
            for sign in (1, -1):
                moved = [images.copy(), texts.copy(), scale.copy()]
                moved[argument][index] += sign * step
                ends.append(reference.softmax_loss(*moved)[0])
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope == pytest.approx(np.asarray(grad)[index], abs=1e-8)


@pytest.mark.parametrize("mesh", MESHES)
def test_solved_batch_is_finite(mesh: str):
    """At the highest temperature, with every pair told apart by 100 nats."""
    eye = np.eye(BATCH, dtype=np.float32)
    loss, *grads = value_and_grads(make_mesh(mesh), eye, eye, math.log(100))
    assert 0 <= float(loss) < 1e-6
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


def test_gradient_is_scaled():
    """The loss may be one term of a larger one."""
    mesh = make_mesh("2x4")
    images, texts = reference.pairs(BATCH, WIDTH)

    def loss(images):
        return 3 * losses.softmax_loss(images, texts, jnp.float32(1), mesh=mesh)

    want = 3 * reference.softmax_loss(images, texts, 1)[1]
    assert reference.relative_error(jax.jit(jax.grad(loss))(images), want) < 1e-5


# ---- Cost --------------------------------------------------------------------------------------


def products(jaxpr) -> list[tuple[int, str]]:
    """FLOPs (2 per multiply-add) and precision of each matrix product, inner jaxprs included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[d] for d in contracted)
            flops = 2 * depth * equation.outvars[0].aval.size
            found.append((flops, str(equation.params["precision"])))
        for inner in equation.params.values():
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("mesh", ["1", "8x1", "2x4"])
def test_each_logit_is_computed_once(mesh: str):
    """Forward and backward take 3 products of n x B x e per device: the logits, two gradients."""
    mesh_object, batch, width = make_mesh(mesh), 128, 256
    place = sharding.batch_sharding(mesh_object)
    embeds = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=place)
    scale = jax.ShapeDtypeStruct((), jnp.float32)

    def loss(images, texts, logit_scale):
        return losses.softmax_loss(images, texts, logit_scale, mesh=mesh_object)

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    one = 2 * (batch // mesh_object.size) * batch * width
    flops, precisions = zip(*products(jax.make_jaxpr(grad)(embeds, embeds, scale).jaxpr))
    assert flops == (one,) * 3
    # Or accelerators would round the float32 inputs to fewer bits.
    assert all("HIGHEST" in precision for precision in precisions)
    flops = jax.jit(grad).lower(embeds, embeds, scale).compile().cost_analysis()["flops"]
    assert 3 * one <= flops < 3.2 * one  # exponentials and sums are the rest


# ---- Bad input ---------------------------------------------------------------------------------


def test_batch_that_the_mesh_does_not_divide(mesh8):
    embeds = jnp.ones((12, 4))
    with pytest.raises(UserError, match=r"batch of 12 .* 8 devices.*batch_size"):
        losses.softmax_loss(embeds, embeds, jnp.float32(0), mesh=mesh8)


@pytest.mark.parametrize("mesh", ["plain", "2x4"])
def test_unknown_method(mesh: str):
    embeds = jnp.ones((8, 4))
    with pytest.raises(UserError, match=r"loss\.method 'rign'.*all_gather"):
        losses.softmax_loss(embeds, embeds, jnp.float32(0), mesh=make_mesh(mesh), method="rign")


@pytest.mark.parametrize("shape", [(9, 4), (8, 5)])
def test_pairs_of_different_shapes(shape: tuple):
    with pytest.raises(ValueError, match="differ in shape"):
        losses.softmax_loss(jnp.ones((8, 4)), jnp.ones(shape), jnp.float32(0))
