"""Damage of stored checkpoints, bit by bit, and checksums against NumPy."""

import pathlib

import jax
import numpy as np
import pytest
from test_checkpoint import META, abstract, assert_same, kept, make_state, save

from clip_jax import checkpoint, checksums
from clip_jax.checkpoint import reading
from clip_jax.errors import UserError

FLIPS = 40


def numpy_checksum(x: np.ndarray) -> int:
    bits = x.astype(np.float32).view(np.uint32) if x.dtype.kind in "fV" else x
    weights = 2 * np.arange(x.size, dtype=object) + 1
    return int(sum(bits.ravel().astype(object) * weights)) % 2**32


@pytest.mark.parametrize("axes", [(1, 1), (2, 4), (8, 1)])
def test_checksums_are_numpys_on_every_mesh(axes):
    state = make_state(axes=axes)
    leaves = jax.tree.leaves_with_path(state)
    found = checksums.inspect(state)
    assert not found.not_finite
    assert list(found.checksums.values()) == [numpy_checksum(np.asarray(x)) for _, x in leaves]
    half = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), state.params)
    wide = jax.tree.map(lambda x: x.astype(np.float32), half)
    assert checksums.inspect(half) == checksums.inspect(wide)


def test_every_single_bit_counts():
    """Flips every bit of a small array, and lets two rows change places."""
    values = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    own = checksums.inspect({"a": values}).checksums["a"]
    for place in range(values.size):
        for bit in range(32):
            flipped = values.copy()
            flipped.view(np.uint32).ravel()[place] ^= np.uint32(1 << bit)
            assert numpy_checksum(flipped) != own
    assert numpy_checksum(values[::-1]) != own
    assert numpy_checksum(values) == own


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("stored")
    save(workdir, {5: {}, 10: {}}, keep=2)
    return workdir


def test_a_flipped_bit_is_never_read_silently(stored):
    """In any file of the checkpoint: an error that names it, or the very state that was saved."""
    rng = np.random.default_rng(0)
    folder = stored / checkpoint.DIRECTORY / "10"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.array([path.stat().st_size for path in files])
    chances = (sizes / sizes.sum() + 1 / len(files)) / 2  # small ones too
    like, refused = abstract((1, 1)), 0
    for _ in range(FLIPS):
        path = files[rng.choice(len(files), p=chances)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            with checkpoint.Checkpoints(stored, keep=2) as store:
                meta, state = store.read_meta(10), store.restore(10, like)
        except UserError as error:
            refused += "checkpoints" in str(error)
        else:
            assert_same(state, make_state())
            assert {name: meta[name] for name in META} == META
        finally:
            path.write_bytes(whole)
    assert refused > FLIPS / 4


def test_damage_of_the_weights_is_named(stored):
    """In the stored arrays: what is damaged, and the checkpoint to go back to."""
    folder = stored / checkpoint.DIRECTORY / "10" / "model"
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    whole = path.read_bytes()
    seen = set()
    # Not near the end: of orbax's index there, parts may have been written twice, and one not read.
    for place in np.linspace(0, 0.75 * len(whole), 10).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with (
            checkpoint.Checkpoints(stored, keep=2) as store,
            pytest.raises(UserError, match="To resume from step 5, delete that folder") as caught,
        ):
            store.restore_variables(10, abstract((2, 4)).variables)
        seen.add("arrays are not what was saved, such as model/params/" in str(caught.value))
    path.write_bytes(whole)
    assert True in seen


def test_checkpoints_without_checksums_are_read(tmp_path, monkeypatch):
    """Those of versions that wrote none."""
    monkeypatch.setattr(reading, "OWN", "other")
    save(tmp_path, {5: {}})
    monkeypatch.undo()
    with checkpoint.Checkpoints(tmp_path) as store:
        assert_same(store.restore(5, abstract((1, 1))), make_state())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_poisoned_state_is_not_saved(tmp_path, value):
    save(tmp_path, {5: {}})
    state = make_state()
    poisoned = {**state.params, "logit_scale": state.params["logit_scale"] * value}
    with (
        checkpoint.Checkpoints(tmp_path) as store,
        pytest.raises(UserError, match=r"logit_scale.*last good checkpoint is that of step 5"),
    ):
        store.save(state.replace(params=poisoned), 10, META, {})
    assert kept(tmp_path) == [5]
    with checkpoint.Checkpoints(tmp_path) as store:
        assert store.latest_step() == 5
