"""The training step: the same on every mesh, pure, and what it reports."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from clip_jax import losses, sharding
from clip_jax import state as train_state

ONE, DATA, FSDP = (1, 1), (8, 1), (2, 4)  # mesh.data, mesh.fsdp
STEPS = 5


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """XLA without its optimisations: compiling takes nearly all of the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def compiled(name: str, axes: tuple[int, int]):
    net, mesh = tiny.make_net(name), tiny.make_mesh(*axes)
    return tiny.compile_step(net, mesh, initial(name, axes), tiny.put_batch(net, mesh))


@functools.cache
def initial(name: str, axes: tuple[int, int]) -> train_state.TrainState:
    mesh = tiny.make_mesh(*axes)
    if name == "vit" or axes == ONE:
        return tiny.init_state(tiny.make_net(name), mesh)
    state = initial(name, ONE)  # a ResNet takes long to compile, its initialisation too
    return jax.device_put(state, sharding.tree_shardings(state, mesh))


def copy(state):
    """For a step to donate."""
    return jax.tree.map(jnp.copy, state)


def take_steps(name: str, axes: tuple[int, int], steps: int = STEPS):
    """From the initial state on, on one batch: the last state, the metrics of each step."""
    batch = tiny.put_batch(tiny.make_net(name), tiny.make_mesh(*axes))
    state, history = copy(initial(name, axes)), []
    for _ in range(steps):
        state, metrics = compiled(name, axes)(state, batch)
        history.append(jax.tree.map(float, metrics))
    return state, history


trained = functools.cache(take_steps)


def named_leaves(tree) -> dict[str, np.ndarray]:
    return {sharding.path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


# ---- Every mesh computes the same --------------------------------------------------------------


@pytest.mark.parametrize("axes", [DATA, FSDP])
def test_initial_state_is_equal_on_every_mesh(axes: tuple):
    want = named_leaves(initial("vit", ONE))
    for name, leaf in named_leaves(initial("vit", axes)).items():
        assert np.array_equal(leaf, want[name]), name


@pytest.mark.parametrize(("name", "axes"), [("vit", DATA), ("vit", FSDP), ("resnet", FSDP)])
def test_metrics_agree_with_one_device(name: str, axes: tuple):
    """Sums in another order: losses within 1e-5 (seen: 1e-6), the rest within 1e-4."""
    (_, one), (_, many) = trained(name, ONE), trained(name, axes)
    assert one[-1]["loss"] < one[0]["loss"] - 0.5  # nats: the model moved
    for a, b in zip(one, many):
        for metric, value in a.items():
            tolerance = 1e-5 if metric == "loss" else 1e-4
            assert b[metric] == pytest.approx(value, rel=tolerance), metric


def test_batch_norm_is_synchronised():
    """Each of 8 devices sees 2 of 16 images: running statistics of its own would be far off."""
    want = named_leaves(trained("resnet", ONE)[0].batch_stats)
    got = named_leaves(trained("resnet", FSDP)[0].batch_stats)
    start = named_leaves(initial("resnet", ONE).batch_stats)
    assert want.keys() == got.keys()
    for name, leaf in want.items():
        assert np.abs(leaf - start[name]).max() > 1e-3, name
        np.testing.assert_allclose(got[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name)


def test_state_keeps_its_shardings():
    state, _ = trained("vit", FSDP)
    for (path, before), after in zip(
        jax.tree.leaves_with_path(initial("vit", FSDP)), jax.tree.leaves(state)
    ):
        name = sharding.path_name(path)
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim), name


def test_fsdp_holds_a_share_of_parameters_and_moments():
    """A quarter of every matrix, on 4 devices, and of both its moments."""
    state, _ = trained("vit", FSDP)
    split = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        name = sharding.path_name(path)
        sizes = {shard.data.size for shard in leaf.addressable_shards}
        if name.endswith(("kernel", "embedding", "positions", "class_token")):
            assert sizes == {leaf.size // 4}, name
            split += 1
        else:
            assert sizes == {leaf.size}, name
    matrices = sum(leaf.endswith("kernel") for leaf in named_leaves(state.params))
    assert split == 3 * (matrices + 4)  # positions of both towers, class token, embedding


# ---- A pure function ---------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [ONE, FSDP])
def test_same_inputs_give_the_same_bits(axes: tuple):
    first, second = take_steps("vit", axes, 2), take_steps("vit", axes, 2)
    want = named_leaves(first)
    for name, leaf in named_leaves(second).items():
        assert leaf.tobytes() == want[name].tobytes(), name


def test_state_is_donated_and_batch_is_not():
    net, mesh = tiny.make_net("vit"), tiny.make_mesh(*FSDP)
    state, batch = copy(initial("vit", FSDP)), tiny.put_batch(net, mesh)
    compiled("vit", FSDP)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))


def test_step_counts():
    assert int(trained("vit", ONE)[0].step) == STEPS


# ---- What is reported --------------------------------------------------------------------------


@functools.cache
def plain_gradient(name: str):
    """Loss and gradients at the initial state on one device, by jax.grad of the plain loss."""
    net, state = tiny.make_net(name), initial(name, ONE)
    batch = tiny.make_batch(net)

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        embeds = net.apply(variables, batch["image"], batch["tokens"])
        return losses.softmax_loss(*embeds)

    return jax.jit(jax.value_and_grad(loss))(state.params)


def test_loss_and_gradient_norm_are_those_of_the_plain_loss():
    loss, grads = plain_gradient("vit")
    squares = [np.sum(leaf.astype(np.float64) ** 2) for leaf in named_leaves(grads).values()]
    for axes in (ONE, DATA, FSDP):
        metrics = trained("vit", axes)[1][0]
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_other_metrics():
    """param_norm and logit_scale are of the new parameters, learning_rate is of this step."""
    state, history = trained("vit", FSDP)
    squares = [np.sum(leaf.astype(np.float64) ** 2) for leaf in named_leaves(state.params).values()]
    assert history[-1]["param_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    multiplier = math.exp(float(state.params["logit_scale"]))
    assert history[-1]["logit_scale"] == pytest.approx(multiplier, rel=1e-6)
    for step, metrics in enumerate(history):
        cosine = tiny.LEARNING_RATE * (1 + math.cos(math.pi * step / tiny.STEPS)) / 2
        assert metrics["learning_rate"] == pytest.approx(cosine, rel=1e-5)


@pytest.mark.parametrize("start", [math.log(100) + 1, math.log(100) + 1e-4])
def test_logit_scale_is_bounded(start: float):
    state = copy(initial("vit", FSDP))
    params = {**state.params, "logit_scale": jnp.full_like(state.params["logit_scale"], start)}
    net, mesh = tiny.make_net("vit"), tiny.make_mesh(*FSDP)
    step, batch = compiled("vit", FSDP), tiny.put_batch(net, mesh)
    state, metrics = step(state.replace(params=params), batch)
    assert np.asarray(state.params["logit_scale"]) <= np.float32(math.log(100))
    assert float(metrics["logit_scale"]) == pytest.approx(100, rel=1e-6 if start > 5 else 2e-3)


def test_logit_scale_below_its_bound_is_left_alone():
    """Adam's first step moves every parameter by the learning rate, against its gradient."""
    _, grads = plain_gradient("vit")
    start = float(initial("vit", ONE).params["logit_scale"])
    want = start - tiny.LEARNING_RATE * float(np.sign(grads["logit_scale"]))
    assert trained("vit", ONE)[1][0]["logit_scale"] == pytest.approx(math.exp(want), rel=1e-6)
