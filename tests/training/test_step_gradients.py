"""The training step's gradients: one batch's, however it is cut over devices and time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from clip_jax import losses, optim, sharding
from clip_jax.training import objectives

ONE, FSDP = (1, 1), (2, 4)  # mesh.data, mesh.fsdp
DECODERS = {
    "coca": {"text_decoder_layers": 2},
    "mammut": {"text_decoder_layers": 1, "text_decoder_shared": True, "text_causal": False},
}


@functools.cache
def gradients(
    axes: tuple,
    *,
    accum_steps=1,
    patch_dropout=0.0,
    method="all_gather",
    zero1=False,
    objective="contrastive",
    captions=1,
    packed=False,
    weighted=False,
    decoder="",
    views=False,
):
    """Loss and gradients at the initial state, no optimiser to blur them."""
    packing = {"length": 12, "rows": 0.5} if packed else None
    size = {"objective": objective, **DECODERS.get(decoder, {})}
    if views:
        size |= {"views_mlp": 24, "views_embed": 8}
    net = tiny.make_net("vit", size, patch_dropout=patch_dropout, packing=packing)
    mesh = tiny.make_mesh(*axes)
    state, batch = tiny.init_state(net, mesh, zero1=zero1), tiny.put_batch(net, mesh, captions)
    if weighted:
        weights = np.random.default_rng(0).uniform(0, 3, tiny.BATCH).astype(np.float32)
        batch["weight"] = jax.device_put(weights, sharding.batch_sharding(mesh))
    # The gradient is all it keeps: where Adam keeps its first moment.
    keep = optax.GradientTransformation(
        lambda params: {"mu": params},
        lambda updates, _, params=None: (jax.tree.map(jnp.zeros_like, updates), {"mu": updates}),
    )
    tx = optax.chain(keep, optax.scale_by_schedule(lambda count: 1.0))  # the step reads the count
    state = state.replace(opt_state=({"mu": state.opt_state[1].mu}, state.opt_state[-1]))
    optimizer = optim.Optimizer(tx, schedule=lambda count: 1.0)
    settings = {
        "optimizer": optimizer,
        "accum_steps": accum_steps,
        "method": method,
        "zero1": zero1,
    }
    if objective == "near_duplicates":
        scale = jnp.float32(math.log(1 / 0.07))
        pairs = functools.partial(losses.softmax_loss, logit_scale=scale, mesh=mesh, method=method)
        settings["loss_fn"] = objectives.weighted_sum(views=(1.0, objectives.of_views(pairs)))
        settings["augment"] = lambda images, key: {"image": mirrored(images)}
    elif decoder:
        pairs = functools.partial(losses.softmax_loss, mesh=mesh, method=method)
        settings["loss_fn"] = objectives.weighted_sum(
            contrastive=(1.0, objectives.of_pairs(pairs)), captioning=(2.0, objectives.prediction)
        )
    elif views:
        pairs = functools.partial(losses.softmax_loss, mesh=mesh, method=method)
        compare = functools.partial(losses.views_loss, mesh=mesh, method=method)
        settings["loss_fn"] = objectives.weighted_sum(
            contrastive=(1.0, objectives.of_pairs(pairs)),
            views=(0.5, lambda outputs, batch: compare(outputs["views"], jnp.log(10.0))),
        )
        settings["augment"] = lambda images, key: {"image": images, "views": mirrored(images)}
    elif objective != "contrastive":
        settings["loss_fn"] = objectives.weighted_sum(captioning=(1.0, objectives.prediction))
    step = tiny.compile_step(net, mesh, state, batch, **settings)
    after, metrics = step(state, batch)
    return float(metrics["loss"]), tiny.named_leaves(after.opt_state[0]["mu"])


def mirrored(images: jax.Array) -> jax.Array:
    """Returns each image and, as its second view, the same upside down."""
    return jnp.stack([images, images[:, ::-1]], axis=1)


def assert_gradients(got, want) -> None:
    """Sums in another order; seen: 1e-6 of the loss and 5e-6 of a gradient's norm."""
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    whole = math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in want[1].values()))
    for name, leaf in want[1].items():
        # Keys have biases that change nothing, so that their gradients are rounding alone.
        error = np.linalg.norm(got[1][name] - leaf)
        assert error < 3e-5 * np.linalg.norm(leaf) + 1e-7 * whole, name


# ---- Accumulation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "accum_steps", "patch_dropout"),
    [
        pytest.param(ONE, 16, 0.5, marks=pytest.mark.slow),
        ((2, 2, 2), 4, 0.5),
        pytest.param(ONE, 2, 0.0, marks=pytest.mark.slow),
        pytest.param(FSDP, 2, 0.5, marks=pytest.mark.slow),
    ],
)
def test_accumulation_is_exact(axes: tuple, accum_steps: int, patch_dropout: float):
    want = gradients(ONE, patch_dropout=patch_dropout)
    got = gradients(axes, accum_steps=accum_steps, patch_dropout=patch_dropout)
    assert_gradients(got, want)


@pytest.mark.parametrize(
    ("axes", "accum_steps", "method"),
    [((2, 2, 2), 2, "ring"), pytest.param(FSDP, 1, "all_gather", marks=pytest.mark.slow)],
)
def test_several_captions_and_weights_are_exact_too(axes: tuple, accum_steps: int, method: str):
    """Packed, split over devices and in pieces; against rows of their own on one device."""
    want = gradients(ONE, captions=2, weighted=True)
    assert want[0] > math.log(2 * tiny.BATCH) - 1  # a guess among the captions
    settings = {"accum_steps": accum_steps, "method": method, "captions": 2, "packed": True}
    assert_gradients(gradients(axes, weighted=True, **settings), want)
    if axes == FSDP:
        assert gradients(axes, **settings)[0] != pytest.approx(want[0], rel=1e-4)


def test_several_captions_are_embedded_as_each_alone():
    net = tiny.make_net("vit")
    batch = tiny.make_batch(net, captions=3)
    variables = tiny.init_state(net, tiny.make_mesh(*ONE)).variables
    apply = jax.jit(net.apply)
    image, texts, _ = apply(variables, batch["image"], batch["tokens"])
    for place in range(3):
        alone = apply(variables, batch["image"], batch["tokens"][:, place])
        np.testing.assert_allclose(texts[:, place], alone[1], atol=1e-6)
        np.testing.assert_allclose(image, alone[0], atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "axes", "accum_steps"),
    [
        ("captioning", (2, 2, 2), 1),
        ("bag_of_words", FSDP, 2),
        pytest.param("captioning", FSDP, 2, marks=pytest.mark.slow),
        pytest.param("bag_of_words", (2, 2, 2), 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_other_objectives_are_exact_too(objective: str, axes: tuple, accum_steps: int):
    want = gradients(ONE, objective=objective)
    assert abs(want[0] - math.log(64)) < 1  # a guess among the vocabulary
    assert_gradients(gradients(axes, accum_steps=accum_steps, objective=objective), want)


@pytest.mark.parametrize(("decoder", "axes"), [("coca", (2, 2, 2)), ("mammut", FSDP)])
@pytest.mark.slow
def test_captioning_beside_is_exact_too(decoder: str, axes: tuple):
    settings = {"decoder": decoder, "captions": 2, "weighted": True, "patch_dropout": 0.5}
    want = gradients(ONE, **settings)
    without = gradients(ONE, captions=2, weighted=True, patch_dropout=0.5)[0]
    assert abs(want[0] - without - 2 * math.log(64)) < 0.5  # guesses among the vocabulary
    assert_gradients(gradients(axes, accum_steps=2, method="ring", **settings), want)


@pytest.mark.parametrize(("axes", "method"), [((2, 2, 2), "ring"), (FSDP, "all_gather")])
@pytest.mark.slow
def test_views_beside_are_exact_too(axes: tuple, method: str):
    want = gradients(ONE, views=True, patch_dropout=0.5)
    assert np.linalg.norm(want[1]["view_head/layer_1/kernel"]) > 1e-3
    got = gradients(axes, views=True, patch_dropout=0.5, accum_steps=2, method=method)
    assert_gradients(got, want)


@pytest.mark.parametrize(
    ("axes", "accum_steps", "method"),
    [
        ((2, 2, 2), 1, "ring"),
        pytest.param(FSDP, 2, "all_gather", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_views_are_exact_too(axes: tuple, accum_steps: int, method: str):
    """Two views of each image, of which patch dropout makes different ones once more."""
    settings = {"objective": "near_duplicates", "patch_dropout": 0.5}
    want = gradients(ONE, **settings)
    assert "logit_scale" not in want[1]
    assert_gradients(gradients(axes, accum_steps=accum_steps, method=method, **settings), want)


@pytest.mark.slow
def test_patch_dropout_changes_the_loss_and_every_step_draws_anew():
    """Else the test above would compare nothing."""
    net, mesh = tiny.make_net("vit", patch_dropout=0.5), tiny.make_mesh(*ONE)
    state, batch = tiny.init_state(net, mesh), tiny.put_batch(net, mesh)
    step = tiny.compile_step(net, mesh, state, batch)
    starts = [tiny.copy(state).replace(step=jnp.int32(i)) for i in (0, 1, 0)]
    at = [float(step(start, batch)[1]["loss"]) for start in starts]
    assert at[0] == at[2]
    assert abs(at[0] - at[1]) > 1e-4
    assert abs(at[0] - gradients(ONE)[0]) > 1e-4


# ---- More axes ---------------------------------------------------------------------------------


# mesh.data, mesh.fsdp, mesh.tensor, mesh.slices
@pytest.mark.parametrize(
    ("axes", "method"),
    [
        ((4, 1, 2), "all_gather"),
        ((1, 2, 4), "ring"),
        ((2, 2, 1, 2), "ring"),
        ((1, 2, 2, 2), "all_gather"),
    ],
)
def test_every_axis_computes_the_same(axes: tuple, method: str):
    assert_gradients(gradients(axes, method=method), gradients(ONE))


def test_zero1_splits_the_optimiser_over_all_devices():
    state = tiny.init_state(tiny.make_net("vit"), tiny.make_mesh(4, 2), zero1=True)
    for path, leaf in jax.tree.leaves_with_path(state):
        name = sharding.path_name(path)
        if name.endswith("/kernel"):
            shards = 8 if name.startswith("opt_state/") else 2
            assert leaf.addressable_shards[0].data.size == leaf.size // shards, name
    assert_gradients(gradients((4, 2), zero1=True), gradients(ONE))
