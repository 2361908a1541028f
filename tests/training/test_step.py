"""The training step: the same on every mesh, pure, and what it reports."""

import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import xla_flags

from clip_jax import losses, sharding
from clip_jax import state as train_state

ONE, DATA, FSDP = (1, 1), (8, 1), (2, 4)  # mesh.data, mesh.fsdp
STEPS = 5


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


def take_steps(name: str, axes: tuple[int, int], steps: int = STEPS):
    """Trains on one batch from the initial state; returns the last state and all metrics."""
    batch = tiny.put_batch(tiny.make_net(name), tiny.make_mesh(*axes))
    state, history = tiny.copy(initial(name, axes)), []
    for _ in range(steps):
        state, metrics = compiled(name, axes)(state, batch)
        history.append(jax.tree.map(float, metrics))
    return state, history


trained = functools.cache(take_steps)


# ---- Every mesh computes the same --------------------------------------------------------------


@pytest.mark.parametrize("axes", [DATA, FSDP])
def test_initial_state_is_equal_on_every_mesh(axes: tuple):
    want = tiny.named_leaves(initial("vit", ONE))
    for name, leaf in tiny.named_leaves(initial("vit", axes)).items():
        assert np.array_equal(leaf, want[name]), name


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param("vit", DATA, marks=pytest.mark.slow),
        ("vit", FSDP),
        pytest.param("resnet", FSDP, marks=pytest.mark.slow),
    ],
)
def test_metrics_agree_with_one_device(name: str, axes: tuple):
    """Sums in another order: losses within 1e-5 (seen: 1e-6), the rest within 1e-4."""
    (_, one), (_, many) = trained(name, ONE), trained(name, axes)
    assert one[-1]["loss"] < one[0]["loss"] - 0.5  # nats: the model moved
    for a, b in zip(one, many):
        for metric, value in a.items():
            tolerance = 1e-5 if metric == "loss" else 1e-4
            assert b[metric] == pytest.approx(value, rel=tolerance), metric


@pytest.mark.slow
def test_batch_norm_is_synchronised():
    """Each of 8 devices sees 2 of 16 images: running statistics of its own would be far off."""
    want = tiny.named_leaves(trained("resnet", ONE)[0].batch_stats)
    got = tiny.named_leaves(trained("resnet", FSDP)[0].batch_stats)
    start = tiny.named_leaves(initial("resnet", ONE).batch_stats)
    assert want.keys() == got.keys()
    for name, leaf in want.items():
        assert np.abs(leaf - start[name]).max() > 1e-3, name
        np.testing.assert_allclose(got[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_resnet_uses_the_tensor_axis_for_examples():
    want = trained("resnet", ONE)[1][0]
    mesh = tiny.make_mesh(2, 1, 2)
    state = initial("resnet", ONE)
    # A copy: the step donates its state, and device_put may share buffers with the cached one.
    state = tiny.copy(jax.device_put(state, sharding.tree_shardings(state, mesh)))
    net, batch = tiny.make_net("resnet"), tiny.put_batch(tiny.make_net("resnet"), mesh)
    program = tiny.compile_step(net, mesh, state, batch)
    _, metrics = program(state, batch)
    assert float(metrics["loss"]) == pytest.approx(want["loss"], rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(want["grad_norm"], rel=1e-4)
    assert "f32[4,16,16,4]" in program.as_text()  # 16 images over 4 devices, after the stem


def test_state_keeps_its_shardings():
    state, _ = trained("vit", FSDP)
    for (path, before), after in zip(
        jax.tree.leaves_with_path(initial("vit", FSDP)), jax.tree.leaves(state)
    ):
        name = sharding.path_name(path)
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim), name


def test_fsdp_shards_parameters_and_moments():
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
    matrices = sum(leaf.endswith("kernel") for leaf in tiny.named_leaves(state.params))
    assert split == 3 * (matrices + 4)  # positions of both towers, class token, embedding


# ---- A pure function ---------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [ONE, FSDP])
def test_same_inputs_give_the_same_bits(axes: tuple):
    first, second = take_steps("vit", axes, 2), take_steps("vit", axes, 2)
    want = tiny.named_leaves(first)
    for name, leaf in tiny.named_leaves(second).items():
        assert leaf.tobytes() == want[name].tobytes(), name


def test_state_is_donated_and_batch_is_not():
    net, mesh = tiny.make_net("vit"), tiny.make_mesh(*FSDP)
    state, batch = tiny.copy(initial("vit", FSDP)), tiny.put_batch(net, mesh)
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


@pytest.mark.slow
def test_loss_and_gradient_norm_are_those_of_the_plain_loss():
    loss, grads = plain_gradient("vit")
    squares = [np.sum(leaf.astype(np.float64) ** 2) for leaf in tiny.named_leaves(grads).values()]
    for axes in (ONE, DATA, FSDP):
        metrics = trained("vit", axes)[1][0]
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_other_metrics():
    """param_norm and logit_scale are of the new parameters, learning_rate is of this step."""
    state, history = trained("vit", FSDP)
    squares = [
        np.sum(leaf.astype(np.float64) ** 2) for leaf in tiny.named_leaves(state.params).values()
    ]
    assert history[-1]["param_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    multiplier = math.exp(float(state.params["logit_scale"]))
    assert history[-1]["logit_scale"] == pytest.approx(multiplier, rel=1e-6)
    for step, metrics in enumerate(history):
        cosine = tiny.LEARNING_RATE * (1 + math.cos(math.pi * step / tiny.STEPS)) / 2
        assert metrics["learning_rate"] == pytest.approx(cosine, rel=1e-5)


@pytest.mark.parametrize("start", [math.log(100) + 1, math.log(100) + 1e-4])
def test_logit_scale_is_bounded(start: float):
    state = tiny.copy(initial("vit", FSDP))
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


# ---- bfloat16 ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_16_bit_moments_and_weights():
    """They are what is stored, and a step with them is nearly the step without."""
    want = trained("vit", ONE)[1][0]
    mesh = tiny.make_mesh(*FSDP)
    half = {"moment_dtype": "bfloat16", "bf16_params": "^text/"}
    net = tiny.make_net("vit")
    state = tiny.init_state(net, mesh, **half)
    dtypes = {sharding.path_name(path): x.dtype for path, x in jax.tree.leaves_with_path(state)}
    for name, dtype in dtypes.items():
        in_bf16 = "/mu/" in name or "/nu/" in name or name.startswith("params/text/")
        assert dtype == (
            jnp.bfloat16 if in_bf16 else jnp.int32 if dtype == jnp.int32 else jnp.float32
        )
    batch = tiny.put_batch(net, mesh)
    step = tiny.compile_step(net, mesh, state, batch, optim=half)
    state, metrics = step(state, batch)
    after = {sharding.path_name(path): x.dtype for path, x in jax.tree.leaves_with_path(state)}
    assert after == dtypes
    assert float(metrics["loss"]) == pytest.approx(want["loss"], rel=2e-3)
    assert float(metrics["grad_norm"]) == pytest.approx(want["grad_norm"], rel=2e-2)
    for _ in range(STEPS):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < want["loss"] - 0.5


# ---- Accumulation ------------------------------------------------------------------------------


@pytest.mark.slow
def test_accumulated_batch_norm_takes_the_mean_of_the_micro_batches():
    """Computed here by the model alone, micro-batch by micro-batch."""
    net, mesh = tiny.make_net("resnet"), tiny.make_mesh(*ONE)
    state, batch = tiny.copy(initial("resnet", ONE)), tiny.put_batch(net, mesh)
    apply = jax.jit(functools.partial(net.apply, train=True, mutable=["batch_stats"]))
    parts = [apply(state.variables, *(batch[k][i::2] for k in ("image", "tokens"))) for i in (0, 1)]
    want = jax.tree.map(lambda a, b: (a + b) / 2, *(part[1]["batch_stats"] for part in parts))
    images, texts = (jnp.stack([p[0][i] for p in parts], 1).reshape(16, -1) for i in (0, 1))
    loss = losses.softmax_loss(images, texts, parts[0][0][2])
    after, metrics = tiny.compile_step(net, mesh, state, batch, accum_steps=2)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    want, got = tiny.named_leaves(want), tiny.named_leaves(after.batch_stats)
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_accumulation_saves_activations():
    """The compiler accounts for the activations of one micro-batch only."""
    environment = xla_flags.environment(1, quick="")
    ran = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    *found, gradients = json.loads(ran.stdout)
    # The sum of the gradients is there at every number of micro-batches above one.
    temporary = {steps: size - gradients * (steps > 1) for steps, size in found}
    assert temporary[4] < 0.4 * temporary[1]
    assert temporary[16] < 0.15 * temporary[1]


def print_temporaries() -> None:
    """Prints pairs of micro-batches and bytes, then the bytes of the gradients."""
    net, mesh = tiny.make_net("vit"), tiny.make_mesh(*ONE)
    state = tiny.init_state(net, mesh)
    batch = {k: v.repeat(64, axis=0) for k, v in tiny.make_batch(net).items()}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    found = []
    for steps in (1, 4, 16):
        program = tiny.compile_step(net, mesh, state, batch, accum_steps=steps, method="ring")
        found.append((steps, program.memory_analysis().temp_size_in_bytes))
    print(json.dumps([*found, sum(x.nbytes for x in jax.tree.leaves(state.params))]))


if __name__ == "__main__":
    print_temporaries()
