"""Checkpoints: what is kept, what comes back, and what damage looks like to the user."""

import functools
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny

from clip_jax import checkpoint, sharding
from clip_jax import state as train_state
from clip_jax.errors import UserError

# Reads that failed halfway leave futures behind, of which the collector complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

META = {"examples_seen": 96, "seconds": 1.5, "tokenizer": "none", "config": {"a": {"b": [1, ""]}}}
SAVED_ON = (2, 4)  # mesh.data, mesh.fsdp


def abstract(axes: tuple[int, int], name: str = "vit") -> train_state.TrainState:
    net, optimizer = tiny.make_net(name), tiny.make_optimizer()
    return train_state.abstract_state(net, optimizer, tiny.make_mesh(*axes))


@functools.cache
def make_state(name: str = "vit", axes: tuple[int, int] = SAVED_ON) -> train_state.TrainState:
    """Noise in every array, so that none is what an initialisation would give."""
    rng = np.random.default_rng(0)

    def noise(leaf):
        if leaf.dtype == np.int32:
            value = np.int32(rng.integers(1, 1000))
        else:
            value = rng.normal(size=leaf.shape).astype(np.float32)
        return jax.device_put(value, leaf.sharding)

    return jax.tree.map(noise, abstract(axes, name))


def save(workdir: pathlib.Path, steps: dict[int, dict], **settings) -> None:
    """One after the other, as training does; {step: metrics}."""
    with checkpoint.Checkpoints(workdir, **settings) as store:
        for step, metrics in steps.items():
            store.save(make_state(), step, META, metrics)


def kept(workdir: pathlib.Path) -> list[int]:
    return sorted(int(folder.name) for folder in (workdir / checkpoint.DIRECTORY).iterdir())


def assert_same(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
        name = sharding.path_name(path)
        assert a.dtype == b.dtype, name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


# ---- Round trip --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("axes", [SAVED_ON, (1, 1), (8, 1), (4, 2)])
def test_round_trip_onto_any_mesh(tmp_path, name: str, axes: tuple):
    state, like = make_state(name), abstract(axes, name)
    with checkpoint.Checkpoints(tmp_path) as store:
        store.save(state, 7, META, {})
    with checkpoint.Checkpoints(tmp_path) as store:
        restored = store.restore(store.latest_step(), like)
        variables = store.restore_variables(7, like.variables)
    assert_same(restored, state)
    assert_same(variables, state.variables)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(like)):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_meta(tmp_path):
    save(tmp_path, {7: {}})
    with checkpoint.Checkpoints(tmp_path, create=False) as store:
        assert store.read_meta(7) == {"step": 7, **META}


def test_state_may_be_donated_while_it_is_written(tmp_path):
    want = jax.tree.map(np.array, make_state())
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), make_state())
    with checkpoint.Checkpoints(tmp_path) as store:
        store.save(state, 1, META, {})
        overwrite(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        store.finish()
        assert_same(store.restore(1, abstract(SAVED_ON)), want)


# ---- What is kept ------------------------------------------------------------------------------


def test_most_recent_are_kept(tmp_path):
    save(tmp_path, {step: {"zeroshot/top1": 0.5} for step in range(1, 6)}, keep=2)
    assert kept(tmp_path) == [4, 5]


def test_best_is_kept_too_and_outlives_a_resumption(tmp_path):
    settings = {"keep": 2, "best_metric": "zeroshot/top1"}
    scores = {10: 0.2, 20: 0.9, 30: 0.3, 40: 0.4}
    metrics = {step: {"zeroshot/top1": score, "other": step} for step, score in scores.items()}
    save(tmp_path, {**metrics, 50: {}, 60: {"other": 100.0}}, **settings)  # two were not evaluated
    assert kept(tmp_path) == [20, 50, 60]
    save(tmp_path, {70: {"zeroshot/top1": 0.8}, 80: {"zeroshot/top1": 0.7}}, **settings)
    assert kept(tmp_path) == [20, 70, 80]
    save(tmp_path, {90: {"zeroshot/top1": 0.95}, 100: {}, 110: {}}, **settings)
    assert kept(tmp_path) == [90, 100, 110]


def test_an_evaluation_after_the_save_ranks_too(tmp_path):
    settings = {"keep": 1, "best_metric": "zeroshot/top1"}
    save(tmp_path, {10: {"zeroshot/top1": 0.2}, 20: {}}, **settings)
    with checkpoint.Checkpoints(tmp_path, **settings) as store:
        store.rank(20, {"zeroshot/top1": 0.9, "other": 1.0})
        assert not store.improves({"zeroshot/top1": 0.8})
        store.save(make_state(), 30, META, {"zeroshot/top1": 0.8})
    assert kept(tmp_path) == [20, 30]
    save(tmp_path, {40: {}}, **settings)  # a start later too
    assert kept(tmp_path) == [20, 40]
    with checkpoint.Checkpoints(tmp_path, **settings) as store:
        assert_same(store.restore(20, abstract((1, 1))), make_state())


def test_latest_step(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as store:
        assert store.latest_step() is None
    save(tmp_path, {9: {}, 10: {}}, keep=3)
    with checkpoint.Checkpoints(tmp_path) as store:
        assert store.latest_step() == 10


def test_reading_writes_nothing(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "no_run", create=False) as store:
        assert store.latest_step() is None
    assert not (tmp_path / "no_run").exists()
    save(tmp_path, {1: {}, 2: {}, 3: {}}, keep=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with checkpoint.Checkpoints(tmp_path, keep=1, create=False) as store:
        store.restore_variables(3, abstract(SAVED_ON).variables)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ---- Damage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("damaged")
    save(workdir, {1: {}, 2: {}}, keep=2)
    return workdir


def damage(how: str, path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif how == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = [
    ("truncate", "model/**/d/*"),
    ("truncate", "optimizer/**/d/*"),
    ("delete", "model/**/d/*"),
    ("truncate", "optimizer/manifest.ocdbt"),
    ("truncate", "model/_METADATA"),
    ("truncate", "meta/metadata"),
    ("delete", "model"),
    ("delete", "optimizer"),
    ("delete", "meta"),
]


@pytest.mark.parametrize(("how", "pattern"), DAMAGE)
def test_checkpoint_cut_short(tmp_path, two_checkpoints, how: str, pattern: str):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / checkpoint.DIRECTORY / "2"
    # All that match: TensorStore's data files hold nodes of its index that are no longer in use.
    victims = list(folder.glob(pattern))
    assert victims
    for victim in victims:
        damage(how, victim)

    def resume() -> int:
        with checkpoint.Checkpoints(tmp_path) as store:
            step = store.latest_step()
            store.read_meta(step)
            assert_same(store.restore(step, abstract((1, 1))), make_state())
        return step

    with pytest.raises(UserError) as error:
        resume()
    message = str(error.value)
    assert str(folder) in message
    assert "To resume from step 1, delete that folder and run the same command again." in message
    assert len(message.splitlines()) == 1
    shutil.rmtree(folder)  # as it says
    assert resume() == 1


def test_only_checkpoint_cut_short(tmp_path):
    save(tmp_path, {5: {}})
    (tmp_path / checkpoint.DIRECTORY / "5/model/manifest.ocdbt").unlink()
    with (
        checkpoint.Checkpoints(tmp_path) as store,
        pytest.raises(UserError, match="To start afresh, delete that folder"),
    ):
        store.restore(5, abstract(SAVED_ON))


def widened(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    shape = (*leaf.shape[:-1], 2 * leaf.shape[-1]) if leaf.shape else ()
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)


@pytest.mark.parametrize("text", ['{"score": 0.', "[0.5]", '{"score": "much"}', "\xff"])
def test_metrics_damaged(tmp_path, text: str, monkeypatch):
    """They are read when the directory is opened, and rank a checkpoint, no more."""
    said: list[str] = []  # caplog depends on what other tests have done to absl's handler
    warn = "clip_jax.checkpoint.store.logging.warning"
    monkeypatch.setattr(warn, lambda text, *values: said.append(text % values))
    save(tmp_path, {4: {"score": 0.9}, 5: {"score": 0.5}}, best_metric="score", keep=2)
    path = tmp_path / checkpoint.DIRECTORY / "4/metrics/metrics"
    path.write_bytes(text.encode("latin-1"))
    with checkpoint.Checkpoints(tmp_path, best_metric="score", keep=2) as store:
        assert store.steps() == [4, 5]
        assert store.improves({"score": 0.6})
        assert_same(store.restore(4, abstract((1, 1))), make_state())
    assert any("checkpoints/4 are damaged: it does not count as the best" in one for one in said)


def test_the_best_of_discarded_checkpoints_no_longer_counts(tmp_path):
    scores = {3: {"score": 0.5}, 4: {"score": 0.9}}
    with checkpoint.Checkpoints(tmp_path, best_metric="score", keep=2) as store:
        for step, metrics in scores.items():
            store.save(make_state(), step, META, metrics)
        store.discard_after(3)
        assert store.steps() == [3]
        assert store.improves({"score": 0.6})
        assert not store.improves({"score": 0.4})


@pytest.mark.parametrize("name", ["resnet", "wider"])
def test_checkpoint_of_another_model(tmp_path, name: str):
    save(tmp_path, {3: {}})
    like = abstract(SAVED_ON, "resnet" if name == "resnet" else "vit")
    if name == "wider":
        like = jax.tree.map(widened, like)
    with (
        checkpoint.Checkpoints(tmp_path) as store,
        pytest.raises(UserError, match=r"checkpoints/3 cannot be read: .*of another model"),
    ):
        store.restore(3, like)


def test_checkpoint_being_written_at_a_kill_is_ignored(tmp_path, two_checkpoints):
    """Orbax writes into a folder of a temporary name and renames it at the end."""
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / checkpoint.DIRECTORY
    unfinished = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", unfinished)
    shutil.rmtree(unfinished / "optimizer")
    with checkpoint.Checkpoints(tmp_path, keep=2) as store:
        assert store.latest_step() == 2
        assert_same(store.restore(2, abstract(SAVED_ON)), make_state())
        store.save(make_state(), 3, META, {})
        store.finish()
        assert store.latest_step() == 3
        assert_same(store.restore(3, abstract(SAVED_ON)), make_state())
    assert kept(tmp_path) == [2, 3]


# ---- Precision ---------------------------------------------------------------------------------

HALF = {"bf16_params": "^text/", "moment_dtype": "bfloat16"}


def half_state() -> train_state.TrainState:
    return tiny.init_state(tiny.make_net("vit"), tiny.make_mesh(*SAVED_ON), **HALF)


@pytest.mark.slow
def test_16_bit_state_comes_back_as_it_was(tmp_path):
    state = half_state()
    with checkpoint.Checkpoints(tmp_path) as store:
        store.save(state, 7, META, {})
        store.finish()
        assert_same(store.restore(7, jax.tree.map(as_shape, state)), state)
        # Inference wants float32, which holds every bfloat16.
        variables = store.restore_variables(7, abstract(SAVED_ON).variables)
    for (path, got), want in zip(
        jax.tree.leaves_with_path(variables), jax.tree.leaves(state.variables)
    ):
        assert got.dtype == np.float32, path
        np.testing.assert_array_equal(got, np.asarray(want, np.float32))


def as_shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@pytest.mark.parametrize("saved_half", [True, False])
@pytest.mark.slow
def test_state_of_another_precision(tmp_path, saved_half: bool):
    states = [make_state(), half_state()]
    saved, wanted = states[saved_half], states[not saved_half]
    with checkpoint.Checkpoints(tmp_path) as store:
        store.save(saved, 7, META, {})
        store.finish()
        with pytest.raises(UserError, match=r"another precision.* params/text/.*moment_dtype"):
            store.restore(7, jax.tree.map(as_shape, wanted))
