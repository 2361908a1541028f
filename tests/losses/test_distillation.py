"""The distillation loss against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from clip_jax import choices, losses, sharding
from clip_jax.errors import UserError

BATCH, WIDTH = 48, 16
STUDENT_SCALE = np.float32(np.log(20))
TEACHER_WIDTHS = {12: np.log(100), 24: np.log(30)}  # widths, and their logit_scale
WEIGHTS = np.float32([3, 0, 1, 0.2, 0, 0.7] * 8)


def embeds(captions: int = 1):
    """Pairs of the student, and teachers who see them differently."""
    teachers = [
        (*reference.pairs(BATCH, width, seed=width, captions=captions), np.float32(scale))
        for width, scale in TEACHER_WIDTHS.items()
    ]
    return *reference.pairs(BATCH, WIDTH, captions=captions), teachers


def value_and_grads(images, texts, teachers, devices: int = 1, **options):
    loss = functools.partial(losses.distillation_loss, tile=3, **options)
    if devices > 1:
        mesh = tiny.make_mesh(devices)
        split = sharding.batch_sharding(mesh)
        images, texts = jax.device_put((images, texts), split)
        teachers = [(*jax.device_put(pair[:2], split), pair[2]) for pair in teachers]
        loss = functools.partial(loss, mesh=mesh)
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, grads = grad(images, texts, STUDENT_SCALE, teachers)
    return value, *grads


def check(got, want):
    for name, a, b in zip(("loss", "d_images", "d_texts", "d_logit_scale"), got, want):
        assert a.dtype == jnp.float32
        assert reference.relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("method", choices.LOSS_METHODS)
def test_value_and_gradients(method, devices, captions):
    images, texts, teachers = embeds(captions)
    weights = jnp.asarray(WEIGHTS) if captions == 2 else None
    want = reference.distillation_loss(images, texts, STUDENT_SCALE, teachers, weights)
    assert want[0] > 0.5  # nats: there is something to compare
    check(value_and_grads(images, texts, teachers, devices, method=method, weights=weights), want)


def test_reference_by_finite_differences():
    images, texts, teachers = (embeds(2)[0][:6], embeds(2)[1][:6], embeds(2)[2][:1])
    teachers = [(a[:6], b[:6], scale) for a, b, scale in teachers]
    arguments = [images.astype(np.float64), texts.astype(np.float64), np.array(2.0)]
    loss, step = functools.partial(reference.distillation_loss, weights=WEIGHTS[:6]), 1e-5
    _, *grads = loss(*arguments, teachers)
    for argument, grad in enumerate(grads):
        for index in np.ndindex(np.shape(grad)):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in arguments]
                moved[argument][index] += sign * step
                ends.append(loss(*moved, teachers)[0])
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope == pytest.approx(np.asarray(grad)[index], abs=1e-8)


@pytest.mark.parametrize("method", choices.LOSS_METHODS)
def test_a_student_like_its_teacher_has_nothing_to_learn(method):
    images, texts, _ = embeds()
    for part in value_and_grads(images, texts, [(images, texts, STUDENT_SCALE)], method=method):
        assert np.abs(part).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("axes", [None, ("z", "x"), "y"])
@pytest.mark.parametrize("method", choices.LOSS_METHODS)
def test_any_mesh(method, axes, kind):
    kinds = (jax.sharding.AxisType[kind],) * 3
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=kinds)
    images, texts, teachers = jax.tree.map(jnp.asarray, embeds(2))
    want = reference.distillation_loss(images, texts, STUDENT_SCALE, teachers, WEIGHTS)
    loss = functools.partial(
        losses.distillation_loss, mesh=mesh, batch_axes=axes, method=method, tile=3
    )
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, grads = grad(images, texts, STUDENT_SCALE, teachers, weights=jnp.asarray(WEIGHTS))
    check((value, *grads), want)
    alone = jax.jit(loss)(images, texts, STUDENT_SCALE, teachers, weights=jnp.asarray(WEIGHTS))
    assert float(alone) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.slow
def test_memory_of_the_ring_does_not_grow_with_the_devices():
    needed = {}
    for method in choices.LOSS_METHODS:
        for devices in (2, 8):
            mesh = tiny.make_mesh(devices)
            split = sharding.batch_sharding(mesh)
            like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=split)
            pair, scale = [like((512 * devices, 64))] * 2, jax.ShapeDtypeStruct((), jnp.float32)
            loss = functools.partial(losses.distillation_loss, mesh=mesh, method=method, tile=128)
            grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            compiled = grad.lower(*pair, scale, [(*pair, scale)]).compile()
            needed[method, devices] = compiled.memory_analysis().temp_size_in_bytes
    assert needed["ring", 8] < needed["ring", 2] * 1.05
    assert needed["all_gather", 8] > 3 * needed["all_gather", 2]


def test_a_batch_that_the_mesh_does_not_divide():
    pair = jnp.ones((12, 4)), jnp.ones((12, 4)), jnp.float32(0)
    with pytest.raises(UserError, match=r"batch of 12 .* 8 devices"):
        losses.distillation_loss(*pair, [pair], mesh=tiny.make_mesh(8))
