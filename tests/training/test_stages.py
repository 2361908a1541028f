"""Stages: one command trains them all, each from the one before, and goes on where it ended."""

import contextlib
import itertools
import shutil

import jax
import numpy as np
import pytest
import tiny_run

from clip_jax import checkpoint
from clip_jax.configs import default, vit_b32
from clip_jax.errors import UserError
from clip_jax.training import run as training_run
from clip_jax.training import stages, train, validation

QUICK = {"eval.zeroshot.source.type": "", "eval.retrieval.source.type": ""}
QUICK |= {"checkpoint.best_metric": "", "log.tensorboard": False}
FIRST = {"duration": "4 steps", "batch_size": 32, "model.size.context_length": 12}
SECOND = {"duration": "6 steps", "model.size.image_size": 32, "optim.learning_rate": 2e-4}


def staged(*settings):
    config = tiny_run.config(QUICK)
    config.unlock()
    config.stages = default.stages(*settings)
    config.lock()
    validation.validate(config)
    return config


def run(config, workdir):
    with tiny_run.compile_once():
        stages.train_all(config, workdir, "python main.py")


def test_stages_are_runs_one_after_the_other(tmp_path, capsys):
    run(staged(FIRST, SECOND), tmp_path / "staged")
    with tiny_run.compile_once():  # the same by hand
        alone = tiny_run.config(QUICK | FIRST)
        train.train(alone, tmp_path / "first")
        alone = tiny_run.config(QUICK | SECOND | {"init_from": str(tmp_path / "first")})
        train.train(alone, tmp_path / "second")
    for stage, by_hand in (("stage1", "first"), ("stage2", "second")):
        found = tiny_run.learned(tmp_path / "staged" / stage)
        assert found == tiny_run.learned(tmp_path / by_hand)
        assert len(found) > 20
    # Again: the first stage is left alone, the last one only gets its report.
    capsys.readouterr()
    run(staged(FIRST, SECOND), tmp_path / "staged")
    said = capsys.readouterr().out
    assert "Stage 1 of 2 is finished" in said
    assert said.count("is evaluated once more") == 1
    # A stage that was broken off goes on.
    (tmp_path / "staged" / "stage1" / "report.html").unlink()
    run(staged(FIRST, SECOND), tmp_path / "staged")
    assert "stage1 is finished, at step 4" in capsys.readouterr().out
    # Other settings of a finished stage are not passed over.
    with pytest.raises(UserError, match=r"stage1 holds .* duration was '4 steps', now '5 steps'"):
        run(staged(FIRST | {"duration": "5 steps"}, SECOND), tmp_path / "staged")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"duration": "0 steps"}, r"stages.stage2.duration is '0 steps'"),
        ({"model.size.image_width": 64}, r"stage2 has another model .* by image_width"),
        ({"model.size.text_layers": 2}, r"stage2 has another model .* by text_layers"),
        ({"optim.rate": 1.0}, r"stages.stage2 cannot be applied.*rate"),
        ({"batch_size": "many"}, r"stages.stage2 cannot be applied"),
        ({"optim.name": "sgd"}, r"optim.name is 'sgd'"),
        ({"duration": "soon"}, r"'soon' is not a duration"),
    ],
)
def test_stages_that_cannot_be(second, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(staged({"duration": "4 steps"}, second), tmp_path)
    assert not list(tmp_path.iterdir())


def test_smoke_shrinks_the_stages():
    config = vit_b32.get_config()
    with config.unlocked():
        config.stages = default.stages(
            {"model.size.image_size": 84, "batch_size": 65_536, "duration": "12.8e9 examples"},
            {"model.size.image_size": 224, "duration": "512e6 examples"},
        )
    config = default.finish(config, "smoke")
    sizes = [default.of_stage(config, name).model.size.image_size for name in config.stages]
    assert sizes == [16, 32]
    assert {default.of_stage(config, name).duration for name in config.stages} == {"10 steps"}
    assert {default.of_stage(config, name).batch_size for name in config.stages} == {32}


# ---- A ramp of the batch -----------------------------------------------------------------------

STEADY = {"optim.schedule": "constant", "optim.warmup": "2 steps", "optim.ema_decay": 0.9}
RAMP = [
    STEADY | {"batch_size": 16, "duration": "3 steps"},
    STEADY | {"batch_size": 32, "duration": "6 steps", "branch_from": "stage1"},
]


def by_hand(settings, workdir):
    """Takes the steps of both batch sizes; returns the state and the keys of examples."""
    keys, seen, step, state = [], 0, 0, None
    for own in settings:
        own = {name: value for name, value in own.items() if name != "branch_from"}
        made = training_run.prepare(tiny_run.config(QUICK | own), workdir)
        with tiny_run.compile_once():
            compiled = made.program.lower().compile()
        state = made.program.init() if state is None else state
        data = training_run.open_data(made, seen)
        with contextlib.closing(iter(data)) as batches:
            for batch in itertools.islice(batches, made.total_steps - step):
                keys += data.reread(seen)["key"].tolist()
                like = made.program.batch
                placed = {k: jax.device_put(x.copy(), like[k].sharding) for k, x in batch.items()}
                state, _ = compiled(state, placed)
                seen += own["batch_size"]
        step = made.total_steps
    return state, keys


def assert_ends_as(workdir, state):
    with checkpoint.Checkpoints(workdir, create=False) as store:
        found = store.restore(6, state)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.slow
def test_a_ramp_takes_the_steps_of_both_batches(tmp_path, capsys):
    run(staged(*RAMP), tmp_path)
    state, keys = by_hand(RAMP, tmp_path / "hand")
    assert len(set(keys)) == len(keys) == 3 * 16 + 3 * 32
    last = tmp_path / "stage2"
    assert_ends_as(last, state)
    # Broken off within the second stage, it goes on there.
    (last / "report.html").unlink()
    shutil.rmtree(last / "checkpoints" / "6")
    capsys.readouterr()
    run(staged(*RAMP), tmp_path)
    said = capsys.readouterr().out
    assert f"Resuming {last} from step 4" in said
    assert "6 steps of 32 pairs, those before included" in said
    assert_ends_as(last, state)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"duration": "3 steps"}, r"'3 steps'.* which ends after 3 steps"),
        ({"duration": "160 examples"}, r"batch_size was 16, now 32, .*write it in steps"),
        ({"data.order": "windowed"}, r"stage1', whose optimiser .*data.order"),
        ({"optim.learning_rate": 1e-4}, r"optim.learning_rate \(0.001, now 0.0001\)"),
        ({"model.size.image_size": 16 * 2}, r"model.size.image_size \(16, now 32\)"),
        ({"optim.warmup": "50 percent"}, r"a warm-up in steps"),
        ({"optim.warmup": "1 epoch"}, r"a warm-up in steps"),
        ({"branch_from": "stage3"}, r"branch_from is 'stage3': it takes .* stage, stage1"),
    ],
)
def test_ramps_that_cannot_be(second, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(staged(RAMP[0], RAMP[1] | second), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("both", "message"),
    [
        ({"data.order": "windowed"}, r"interleaves 16 streams .* 32 in those"),
        ({"optim.schedule": "cosine", "optim.warmup": "1 step"}, r"take optim.schedule=constant"),
    ],
)
def test_ramps_that_would_change_what_was_before(both, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(staged(*(own | both for own in RAMP)), tmp_path)
    assert not list(tmp_path.iterdir())
