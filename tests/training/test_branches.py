"""Runs made longer, or cooled down from a checkpoint: the curves of runs planned so at once."""

import json

import pytest
import tiny_run

from clip_jax.errors import UserError
from clip_jax.training import train

CONSTANT = {"optim.schedule": "constant", "eval.every": "12 steps"}
COOLED = CONSTANT | {"optim.cooldown": "4 steps"}


def run(workdir, **changes):
    with tiny_run.compile_once():
        train.train(tiny_run.config(changes), workdir)
    return tiny_run.learned(workdir)


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("constant") / "run"
    run(workdir, **CONSTANT, duration="8 steps")
    return workdir


@pytest.fixture(scope="module")
def cooled(tmp_path_factory):
    """The curve of a run that cools down at once, as planned."""
    return run(tmp_path_factory.mktemp("cooled") / "run", **COOLED)


def test_a_run_made_longer_is_the_long_run(constant, cooled, capsys):
    """The very steps that an uninterrupted run takes, cooldown included."""
    capsys.readouterr()
    with pytest.raises(UserError, match=r"optim.cooldown was '0 steps', now '6 steps'"):
        run(constant, **CONSTANT | {"optim.cooldown": "6 steps"})  # it would have begun at step 6
    found = run(constant, **COOLED)
    assert f"Resuming {constant} from step 8" in capsys.readouterr().out
    assert {key: value for key, value in found.items() if key[0] != 8} == {
        key: value for key, value in cooled.items() if key[0] != 8
    }  # the short run was evaluated at its end
    assert all(found[key] == value for key, value in cooled.items())


def test_a_branch_cools_down_from_a_checkpoint(constant, cooled, tmp_path, capsys):
    """The run itself stays as it is, and the same command resumes the branch."""
    before = sorted(path.name for path in (constant / "checkpoints").iterdir())
    changes = COOLED | {"branch_from": str(constant / "checkpoints" / "4")}
    found = run(tmp_path / "branch", **changes)
    assert f"Resuming {constant} from step 4" in capsys.readouterr().out
    assert min(step for step, _ in found) == 5
    assert found == {key: value for key, value in cooled.items() if key[0] > 4}
    assert sorted(path.name for path in (constant / "checkpoints").iterdir()) == before
    assert run(tmp_path / "branch", **changes) == found


def test_branches_that_cannot_be(constant, tmp_path):
    for place in (tmp_path / "nothing", constant / "checkpoints" / "7"):
        with pytest.raises(UserError, match=r"branch_from .* is no run with a checkpoint"):
            run(tmp_path / "new", branch_from=str(place), **CONSTANT)
    with pytest.raises(UserError, match=r"optim.learning_rate was"):
        run(
            tmp_path / "new",
            **CONSTANT | {"optim.learning_rate": 0.5, "branch_from": str(constant)},
        )


@pytest.mark.slow
def test_a_cosine_cannot_be_made_longer(tmp_path):
    run(tmp_path / "run", duration="8 steps")
    # The config of a version that had no schedules to choose from.
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    for name in ("name", "schedule", "cooldown", "timescale", "factors"):
        del stored["optim"][name]
    path.write_text(json.dumps(stored))
    run(tmp_path / "run", duration="8 steps")
    with pytest.raises(UserError, match="other settings: duration was '8 steps', now '12 steps'"):
        run(tmp_path / "run")
