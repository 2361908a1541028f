"""The sharded loss against NumPy float64, and what it computes."""

import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import reference
import tiny

from clip_jax import choices, losses, sharding
from clip_jax.errors import UserError

# mesh.data, mesh.fsdp, mesh.tensor, mesh.slices
MESHES = {
    "none": None,
    "1": (1, 1),
    "8x1": (8, 1),
    "2x4": (2, 4),
    "1x2x2x2": (1, 2, 2, 2),
}
METHODS = choices.LOSS_METHODS
REFERENCES = {"softmax": reference.softmax_loss, "sigmoid": reference.sigmoid_loss}
TILE = 3  # of 6 examples per device and more: several tiles everywhere
WEIGHTS = np.float32([3, 0, 1, 0.2, 0, 0.7] * 8)  # for 48 pairs
TEMPERATURES = {"initial": math.log(1 / 0.07), "final": math.log(100)}
BATCH, WIDTH = 48, 40


def make_mesh(name: str) -> jax.sharding.Mesh | None:
    axes = MESHES[name]
    return axes and sharding.make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])


def value_and_grads(mesh, method, images, texts, *scalars, **options):
    """Loss and the gradients in all arguments, on embeddings that lie on the mesh."""
    if mesh is not None:
        images, texts = jax.device_put((images, texts), sharding.batch_sharding(mesh))
    loss_fn = losses.softmax_loss if len(scalars) == 1 else losses.sigmoid_loss
    loss = functools.partial(loss_fn, mesh=mesh, method=method, tile=TILE, **options)
    grad = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(2 + len(scalars)))))
    value, grads = grad(images, texts, *map(jnp.float32, scalars))
    return value, *grads


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_value_and_gradients_in_float32(mesh: str, method: str, temperature: str):
    logit_scale = np.float32(TEMPERATURES[temperature])
    images, texts = reference.pairs(BATCH, WIDTH)
    want = reference.softmax_loss(images, texts, logit_scale)
    assert want[0] > 0.5  # nats: there is something to compare
    got = value_and_grads(make_mesh(mesh), method, images, texts, logit_scale)
    for name, a, b in zip(("loss", "d_images", "d_texts", "d_logit_scale"), got, want):
        assert a.dtype == jnp.float32
        assert reference.relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.slow
def test_value_and_gradients_in_bfloat16(mesh: str, method: str):
    """bfloat16 has 8 bits: 2^-8 in the gradients' rounding; value and sums stay float32."""
    images, texts = (jnp.asarray(x, jnp.bfloat16) for x in reference.pairs(BATCH, WIDTH))
    logit_scale = np.float32(TEMPERATURES["initial"])
    want = reference.softmax_loss(images, texts, logit_scale)
    got = value_and_grads(make_mesh(mesh), method, images, texts, logit_scale)
    loss, d_images, d_texts, d_scale = got
    assert loss.dtype == d_scale.dtype == jnp.float32
    assert d_images.dtype == d_texts.dtype == jnp.bfloat16
    # Products of bfloat16 numbers are exact in float32, so the logits are.
    assert reference.relative_error(loss, want[0]) < 1e-5
    assert reference.relative_error(d_scale, want[3]) < 1e-5
    for a, b in zip((d_images, d_texts), want[1:3]):
        assert reference.relative_error(a, b) < 2**-7


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("name", REFERENCES)
def test_reference_by_finite_differences(name: str, captions: int):
    """The gradients that everything is compared with are those of the reference's own loss."""
    pairs = [x.astype(np.float64) for x in reference.pairs(6, 5, captions=captions)]
    arguments = [*pairs, np.array(2.0), np.array(-3.0)][: 3 if name == "softmax" else 4]
    options = {"smoothing": 0.2} if name == "softmax" else {}
    options["weights"] = WEIGHTS[:6]
    loss, step = functools.partial(REFERENCES[name], **options), 1e-5
    _, *grads = loss(*arguments)
    for argument, grad in enumerate(grads):
        for index in np.ndindex(np.shape(grad)):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in arguments]
                moved[argument][index] += sign * step
                ends.append(loss(*moved)[0])
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope == pytest.approx(np.asarray(grad)[index], abs=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", ["none", "2x4"])
def test_views_are_told_from_all_others_but_themselves(mesh: str, method: str):
    """At SLIP's temperature; a view's similarity to itself would be the largest of all."""
    views = np.stack(reference.pairs(BATCH, WIDTH), axis=1)
    want = reference.views_loss(views, math.log(10), WEIGHTS)
    mesh = make_mesh(mesh)
    if mesh is not None:
        views = jax.device_put(views, sharding.batch_sharding(mesh))
    loss = functools.partial(losses.views_loss, mesh=mesh, method=method, tile=TILE)
    grad = jax.jit(
        jax.value_and_grad(lambda x: loss(x, jnp.log(10.0), weights=jnp.asarray(WEIGHTS)))
    )
    for got, wanted in zip(grad(views), want):
        assert reference.relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_solved_batch_is_finite(mesh: str, method: str):
    """The scale is at its maximum, and every pair is separated by 100 nats."""
    eye = np.eye(BATCH, dtype=np.float32)
    loss, *grads = value_and_grads(make_mesh(mesh), method, eye, eye, math.log(100))
    assert 0 <= float(loss) < 1e-6
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_scaled(method: str):
    """The loss may be one term of a larger one."""
    mesh = make_mesh("2x4")
    images, texts = map(jnp.asarray, reference.pairs(BATCH, WIDTH))

    def loss(images):
        return 3 * losses.softmax_loss(images, texts, jnp.float32(1), mesh=mesh, method=method)

    want = 3 * reference.softmax_loss(images, texts, 1)[1]
    assert reference.relative_error(jax.jit(jax.grad(loss))(images), want) < 1e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_sigmoid_value_and_gradients(mesh: str, method: str, temperature: str):
    logit_scale, logit_bias = np.float32(TEMPERATURES[temperature]), np.float32(-10)
    images, texts = reference.pairs(BATCH, WIDTH)
    want = reference.sigmoid_loss(images, texts, logit_scale, logit_bias)
    assert want[0] > 0.5
    place = make_mesh(mesh)
    got = value_and_grads(place, method, images, texts, logit_scale, logit_bias)
    for name, a, b in zip(("loss", "d_images", "d_texts", "d_scale", "d_bias"), got, want):
        assert reference.relative_error(a, b) < 1e-5, name
    loss = functools.partial(losses.sigmoid_loss, mesh=place, method=method, tile=TILE)
    alone = jax.jit(loss)(images, texts, logit_scale, logit_bias)  # another program than with grads
    assert float(alone) == pytest.approx(float(got[0]), rel=1e-6)


def test_sigmoid_of_a_larger_loss():
    images, texts = map(jnp.asarray, reference.pairs(BATCH, WIDTH))

    def loss(images):
        return 3 * losses.sigmoid_loss(images, texts, jnp.float32(1), jnp.float32(-3), tile=TILE)

    want = 3 * reference.sigmoid_loss(images, texts, 1, -3)[1]
    assert reference.relative_error(jax.jit(jax.grad(loss))(images), want) < 1e-5


# ---- Several captions of an image --------------------------------------------------------------

SCALARS = {"softmax": (2.0,), "sigmoid": (2.0, -3.0)}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_several_captions_of_an_image(mesh: str, method: str, name: str):
    images, texts = reference.pairs(BATCH, WIDTH, captions=3)
    want = REFERENCES[name](images, texts, *SCALARS[name])
    got = value_and_grads(make_mesh(mesh), method, images, texts, *SCALARS[name])
    for part, a, b in zip(("loss", "d_images", "d_texts", "d_scale", "d_bias"), got, want):
        assert a.shape == np.shape(b)
        assert reference.relative_error(a, b) < 1e-5, part


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_caption_several_times(method: str, name: str):
    """Nothing is learned of the copies; softmax spreads the target over them, for log 3 nats."""
    images, texts = reference.pairs(BATCH, WIDTH)
    mesh = make_mesh("2x4")
    one = value_and_grads(mesh, method, images, texts, *SCALARS[name])
    copies = np.repeat(texts[:, None], 3, axis=1)
    more = value_and_grads(mesh, method, images, copies, *SCALARS[name])
    spread = math.log(3) / 2 if name == "softmax" else 0
    assert float(more[0]) == pytest.approx(float(one[0]) + spread, rel=1e-5)
    assert reference.relative_error(more[1], one[1]) < 1e-5
    assert reference.relative_error(more[2].sum(axis=1), one[2]) < 1e-5


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", REFERENCES)
def test_several_captions_on_any_mesh(name: str, method: str, kind: str):
    kinds = (jax.sharding.AxisType[kind],) * 3
    other = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=kinds)
    images, texts = map(jnp.asarray, reference.pairs(BATCH, WIDTH, captions=2))
    options = {"label_smoothing": 0.1} if name == "softmax" else {}
    want = REFERENCES[name](images, texts, *SCALARS[name], *options.values(), weights=WEIGHTS)
    options |= {"weights": jnp.asarray(WEIGHTS), "mesh": other, "batch_axes": ("z", "x")}
    loss = functools.partial(losses.LOSSES[name], method=method, tile=TILE, **options)
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    place = jax.sharding.NamedSharding(other, jax.sharding.PartitionSpec(("z", "x")))
    for embeds in ((images, texts), jax.device_put((images, texts), place)):
        value, grads = grad(*embeds, *map(jnp.float32, SCALARS[name]))
        for a, b in zip((value, *grads), want):
            assert reference.relative_error(a, b) < 1e-5


# ---- Smoothed labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_smoothed_labels(mesh: str, method: str, captions: int):
    images, texts = reference.pairs(BATCH, WIDTH, captions=captions)
    want = reference.softmax_loss(images, texts, 3.0, smoothing=0.2)
    assert want[0] > 1.5 * reference.softmax_loss(images, texts, 3.0)[0]
    got = value_and_grads(make_mesh(mesh), method, images, texts, 3.0, label_smoothing=0.2)
    for part, a, b in zip(("loss", "d_images", "d_texts", "d_scale"), got, want):
        assert reference.relative_error(a, b) < 1e-5, part


# ---- Weights of the pairs ----------------------------------------------------------------------


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_weights_of_pairs(mesh: str, method: str, name: str, captions: int):
    """Some weigh nothing, and are negatives of others all the same."""
    images, texts = reference.pairs(BATCH, WIDTH, captions=captions)
    options = {"label_smoothing": 0.1} if name == "softmax" else {}
    want = REFERENCES[name](
        images, texts, *SCALARS[name], *options.values(), weights=WEIGHTS * 0.37
    )
    assert np.abs(want[1][1]).max() > 1e-3
    weights = jnp.asarray(WEIGHTS)
    got = value_and_grads(
        make_mesh(mesh), method, images, texts, *SCALARS[name], weights=weights, **options
    )
    for part, a, b in zip(("loss", "d_images", "d_texts", "d_scale", "d_bias"), got, want):
        assert reference.relative_error(a, b) < 1e-5, part


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", ["none", "2x4"])
def test_nothing_is_learned_where_all_weights_are_zero(mesh: str, method: str, name: str):
    images, texts = reference.pairs(BATCH, WIDTH, captions=2)
    scalars, weights = SCALARS[name], jnp.zeros(BATCH)
    for part in value_and_grads(make_mesh(mesh), method, images, texts, *scalars, weights=weights):
        assert not np.any(part)


# ---- Other meshes ------------------------------------------------------------------------------

# Shape and names of a mesh, and the axes that split the batch; None: all.
OTHER_MESHES = {
    "1-D": ({"data": 8}, None),
    "1-D, other name": ({"devices": 8}, "devices"),
    "2-D, all axes": ({"replica": 2, "model": 4}, None),
    "2-D, outer axis": ({"replica": 2, "model": 4}, ("replica",)),
    "2-D, inner axis": ({"replica": 4, "model": 2}, "model"),
    "3-D": ({"x": 2, "y": 2, "z": 2}, None),
    "3-D, two axes": ({"x": 2, "y": 2, "z": 2}, ("x", "z")),
    "3-D, two axes, other order": ({"x": 2, "y": 2, "z": 2}, ("z", "x")),
    "2-D, no axis": ({"replica": 2, "model": 4}, ()),
}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", choices.LOSS_NAMES)
@pytest.mark.parametrize("mesh", OTHER_MESHES)
def test_any_mesh(mesh: str, name: str, method: str, kind: str):
    """Meshes that are not ours, with either kind of axes and embeddings that lie anywhere."""
    shape, axes = OTHER_MESHES[mesh]
    kinds = (jax.sharding.AxisType[kind],) * len(shape)
    other = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=kinds)
    images, texts = map(jnp.asarray, reference.pairs(BATCH, WIDTH))
    scalars = [jnp.float32(2), jnp.float32(-10)][: 1 if name == "softmax" else 2]
    want = REFERENCES[name](images, texts, *scalars)
    loss = functools.partial(
        losses.LOSSES[name], mesh=other, batch_axes=axes, method=method, tile=TILE
    )
    grad = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(2 + len(scalars)))))
    split = jax.sharding.PartitionSpec(tuple(shape) if axes is None else axes)
    spread = jax.device_put((images, texts), jax.sharding.NamedSharding(other, split))
    for embeds in ((images, texts), spread):
        value, grads = grad(*embeds, *scalars)
        for a, b in zip((value, *grads), want):
            assert reference.relative_error(a, b) < 1e-5


def test_a_mesh_as_jax_makes_it():
    """A mesh works in and out of a mesh context, with and without jit."""
    mesh = jax.make_mesh((8,), ("data",))
    images, texts = map(jnp.asarray, reference.pairs(BATCH, WIDTH))
    want = reference.softmax_loss(images, texts, 2)
    loss = functools.partial(losses.softmax_loss, mesh=mesh)
    assert float(loss(images, texts, jnp.float32(2))) == pytest.approx(want[0], rel=1e-5)
    with jax.set_mesh(mesh):
        got = jax.grad(loss, argnums=1)(images, texts, jnp.float32(2))
    assert reference.relative_error(got, want[2]) < 1e-5


def test_batch_is_divided_by_its_own_axes_only():
    """12 examples over 4 of 8 devices."""
    mesh = jax.make_mesh((2, 4), ("replica", "data"))
    embeds = jnp.ones((12, 4))
    losses.softmax_loss(embeds, embeds, jnp.float32(0), mesh=mesh, batch_axes="data")
    with pytest.raises(UserError, match=r"batch of 12 .* 8 devices"):
        losses.softmax_loss(embeds, embeds, jnp.float32(0), mesh=mesh)


# ---- Cost --------------------------------------------------------------------------------------


def products(jaxpr, times: int = 1) -> list[tuple[int, str]]:
    """FLOPs (2 per multiply-add, in all iterations) and precision of each matrix product."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[d] for d in contracted)
            flops = 2 * depth * equation.outvars[0].aval.size
            found.append((times * flops, str(equation.params["precision"])))
        iterations = times * equation.params.get("length", 1)
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            found += products(inner, iterations) if hasattr(inner, "eqns") else []
    return found


# Matrix products of n x B x e per device, forward and backward: the logits and two gradients; the
# ring computes the logits once more. The sigmoid needs no second pass.
COSTS = {
    ("softmax", "all_gather"): 3,
    ("softmax", "ring"): 4,
    ("sigmoid", "all_gather"): 3,
    ("sigmoid", "ring"): 3,
}


def abstract_loss(mesh, name: str, method: str, batch: int, width: int, tile: int):
    """Value and gradient of a loss, and shapes to call it with."""
    place = sharding.batch_sharding(mesh)
    embeds = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=place)
    scalars = (1 if name == "softmax" else 2) * (jax.ShapeDtypeStruct((), jnp.float32),)
    loss = functools.partial(losses.LOSSES[name], mesh=mesh, method=method, tile=tile)
    arguments = (embeds, embeds, *scalars)
    return jax.value_and_grad(loss, argnums=tuple(range(len(arguments)))), arguments


@pytest.mark.parametrize("mesh", ["1", "8x1", "2x4"])
@pytest.mark.parametrize(("name", "method"), COSTS)
def test_each_logit_is_computed_once(name: str, method: str, mesh: str):
    mesh_object, batch, width = make_mesh(mesh), 128, 256
    grad, arguments = abstract_loss(mesh_object, name, method, batch, width, tile=16)
    found = products(jax.make_jaxpr(grad)(*arguments).jaxpr)
    # Or accelerators would round the float32 inputs to fewer bits.
    assert all("HIGHEST" in precision for _, precision in found)
    one = 2 * (batch // mesh_object.size) * batch * width
    assert sum(flops for flops, _ in found) == COSTS[name, method] * one
    if method == "all_gather":  # XLA counts a loop's body once
        flops = jax.jit(grad).lower(*arguments).compile().cost_analysis()["flops"]
        assert 3 * one <= flops < 3.2 * one  # exponentials and sums are the rest


@pytest.mark.parametrize("name", losses.LOSSES)
def test_memory_of_a_ring_does_not_grow_with_the_batch_on_more_devices(name: str):
    """Equal examples per device on 1, 2 and 8 devices; the gathered form grows with them."""
    needed = {}
    for method in METHODS:
        for mesh in (tiny.make_mesh(count) for count in (1, 2, 8)):
            grad, arguments = abstract_loss(mesh, name, method, 512 * mesh.size, 64, tile=128)
            compiled = jax.jit(grad).lower(*arguments).compile()
            needed[method, mesh.size] = compiled.memory_analysis().temp_size_in_bytes
    embeds = 512 * 64 * 4  # bytes of one device's images
    assert needed["ring", 8] < needed["ring", 2] * 1.05
    assert needed["ring", 8] < 16 * embeds  # what travels, twice over, and the tile
    assert needed["all_gather", 8] > 6 * needed["all_gather", 1]


def test_a_tile_of_the_ring_is_all_there_is():
    """2,048 logits to a side would take 16 MiB."""
    mesh = tiny.make_mesh(1)
    grad, arguments = abstract_loss(mesh, "softmax", "ring", 2048, 64, tile=128)
    memory = jax.jit(grad).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2**20


# ---- Bad input ---------------------------------------------------------------------------------


def test_batch_that_the_mesh_does_not_divide(mesh8):
    embeds = jnp.ones((12, 4))
    with pytest.raises(UserError, match=r"batch of 12 .* 8 devices.*batch_size"):
        losses.softmax_loss(embeds, embeds, jnp.float32(0), mesh=mesh8)


@pytest.mark.parametrize("mesh", ["none", "2x4"])
def test_unknown_method(mesh: str):
    embeds = jnp.ones((8, 4))
    with pytest.raises(UserError, match=r"loss\.method 'rign'.*all_gather"):
        losses.softmax_loss(embeds, embeds, jnp.float32(0), mesh=make_mesh(mesh), method="rign")


def test_rows_that_no_tile_divides():
    embeds = jnp.ones((2 * 499, 4))
    with pytest.raises(UserError, match=r"998 examples .* tiles of 2 at most.*loss\.tile=100"):
        losses.softmax_loss(embeds, embeds, jnp.float32(0), method="ring", tile=100)


@pytest.mark.parametrize("shape", [(9, 4), (8, 5)])
def test_pairs_of_different_shapes(shape: tuple, monkeypatch):
    """Shapes in signatures are checked in this suite, and named there; a user gets a ValueError."""
    with pytest.raises(jaxtyping.TypeCheckError, match="text_embed"):
        losses.softmax_loss(jnp.ones((8, 4)), jnp.ones(shape), jnp.float32(0))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="differ in shape"):
        losses.softmax_loss(jnp.ones((8, 4)), jnp.ones(shape), jnp.float32(0))


@pytest.mark.parametrize("axes", ["dat", ("data", "dat")])
def test_unknown_batch_axis(axes):
    embeds = jnp.ones((8, 4))
    with pytest.raises(UserError, match=r"mesh axes 'dat': this mesh has 'slice', 'data'"):
        losses.softmax_loss(embeds, embeds, jnp.float32(0), mesh=make_mesh("2x4"), batch_axes=axes)
