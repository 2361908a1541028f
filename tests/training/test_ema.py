"""The moving average of the parameters: against NumPy, on meshes, saved, evaluated and loaded."""

import jax
import numpy as np
import pytest
import tiny
import tiny_run

import clip_jax
from clip_jax.errors import UserError
from clip_jax.training import train

DECAY = 0.6  # from the fourth update on; before, (1 + n) / (10 + n) is less


def average(history: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """In float64, from the parameters after each update, the initial ones first."""
    found = {name: value.astype(np.float64) for name, value in history[0].items()}
    for n, params in enumerate(history[1:]):
        decay = min(DECAY, (1 + n) / (10 + n))
        found = {name: decay * found[name] + (1 - decay) * value for name, value in params.items()}
    return found


@pytest.mark.parametrize("axes", [(1, 1), (2, 2)])
@pytest.mark.parametrize("factors", ["", pytest.param("^image/=0", marks=pytest.mark.slow)])
def test_average(axes, factors):
    optim = {"ema_decay": DECAY, "factors": factors}
    net, mesh, zero1 = tiny.make_net("vit"), tiny.make_mesh(*axes), axes != (1, 1)
    state = tiny.init_state(net, mesh, zero1=zero1, **optim)
    batch = tiny.put_batch(net, mesh)
    step = tiny.compile_step(net, mesh, state, batch, zero1=zero1, optim=optim, skip_above=1e9)
    history = [tiny.named_leaves(state.params)]
    for _ in range(12):
        state, _ = step(state, batch)
        history.append(tiny.named_leaves(state.params))
    found, expected = tiny.named_leaves(state.ema["params"]), average(history)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in tiny.named_leaves(state.averaged_variables["params"]).items():
        np.testing.assert_array_equal(value, found[name])
    if zero1:  # held in parts
        kernel = state.ema["params"]["text"]["transformer"]["blocks"]["mlp_in"]["kernel"]
        assert kernel.addressable_shards[0].data.size < kernel.size / 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was stopped after 8 of its 12 steps, and resumed."""
    changes = {"optim.ema_decay": DECAY, "optim.schedule": "constant"}
    workdir = tmp_path_factory.mktemp("ema") / "run"
    with tiny_run.compile_once():
        train.train(tiny_run.config(changes | {"duration": "8 steps"}), workdir)
        changes["checkpoint.best_metric"] = "ema/zeroshot/top1"
        train.train(tiny_run.config(changes), workdir)
    return workdir


def test_a_run_evaluates_and_saves_both(run):
    metrics = tiny_run.read_metrics(run)
    for step in (6, 8, 12):
        assert (step, "zeroshot/top1") in metrics
        assert (step, "ema/zeroshot/top1") in metrics
    arrays = tiny_run.read_checkpoint(run, 12)
    net, average = clip_jax.load(run), clip_jax.load(run / "ema")
    named = clip_jax.load(run / "checkpoints" / "12" / "ema")
    for model, key in ((net, "params"), (average, "ema"), (named, "ema")):
        want = read_item(run, key)
        for name, value in tiny.named_leaves(model.variables["params"]).items():
            np.testing.assert_array_equal(value, want[name], err_msg=name)
    assert len(arrays) > 50


def read_item(run, key: str) -> dict[str, np.ndarray]:
    """The parameters or their average in the last checkpoint, by orbax alone."""
    import orbax.checkpoint as ocp

    item = {"params": "model", "ema": "ema"}[key]
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.restore(run / "checkpoints" / "12" / item)["params"]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_a_run_without_an_average_says_so():
    with pytest.raises(UserError, match=r"keeps no moving average.*optim.ema_decay"):
        clip_jax.load(tiny_run.finished() / "ema")
