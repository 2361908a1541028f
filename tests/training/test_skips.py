"""Skipped steps: nothing of them remains, they are counted and saved, and too many roll back."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal

import html_page
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_run
from several_hosts import endings, flags, launch

from clip_jax import checkpoint
from clip_jax.common import goodput, starts
from clip_jax.data import rows
from clip_jax.errors import ExitCode, Stopped, UserError
from clip_jax.training import augment, loop, skips, train, validation
from clip_jax.training import run as runs

BATCH = 16


def poison(images: jax.Array, key: jax.Array, config=None) -> jax.Array:
    """Makes NaN of images that are white all over, as no image of these tests is by itself."""
    del key, config
    white = (images == 255).all((1, 2, 3))[:, None, None, None]
    return jnp.where(white, jnp.nan, images / 128.0 - 1.0)


# ---- The step ----------------------------------------------------------------------------------

# Axes of the mesh (data, fsdp), then the settings of state and step.
PLAIN = ((1, 1), {})
SHARDED = (
    (2, 4),
    {"zero1": True, "bf16_params": "^text/", "moment_dtype": "bfloat16", "ema_decay": 0.9},
)


def batch_of(net, seed: int, bad: bool = False) -> dict[str, np.ndarray]:
    batch = tiny.make_batch(net, seed)
    if bad:
        batch["image"][5] = 255
    return batch


@functools.cache
def compiled(name: str, axes: tuple[int, int], skip_above: float | None, settings: tuple):
    net, mesh, kwargs = tiny.make_net(name), tiny.make_mesh(*axes), dict(settings)
    accum_steps = kwargs.pop("accum_steps", 1)
    zero1 = kwargs.pop("zero1", False)
    state = tiny.init_state(net, mesh, zero1=zero1, **kwargs)
    step = tiny.compile_step(
        net, mesh, state, tiny.put_batch(net, mesh), optim=kwargs, zero1=zero1,
        accum_steps=accum_steps, skip_above=skip_above,
        augment=lambda images, key: {"image": poison(images, key)},
    )  # fmt: skip
    return net, step, state


def take(name: str, case: tuple, seeds: str, skip_above: float | None = np.inf):
    """Takes a step for each letter: a batch of its own, none for "-", a bad one for a capital."""
    axes, settings = case
    net, step, first = compiled(name, axes, skip_above, tuple(settings.items()))
    state, history = tiny.copy(first), []
    for letter in seeds:
        if letter == "-":  # randomness is folded from the number of the step
            state = state.replace(step=state.step + 1)
            continue
        batch = batch_of(net, ord(letter.lower()), letter.isupper())
        sharding = step.input_shardings[0][1]
        state, metrics = step(state, jax.device_put(batch, sharding))
        history.append(jax.tree.map(float, metrics))
    return state, history


def assert_same_bits(one, other) -> None:
    want = tiny.named_leaves(one)
    for name, leaf in tiny.named_leaves(other).items():
        assert leaf.tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("vit", PLAIN),
        pytest.param("vit", SHARDED, marks=pytest.mark.slow),
        pytest.param("vit", ((8, 1), {"zero1": True, "accum_steps": 2}), marks=pytest.mark.slow),
        pytest.param("resnet", PLAIN, marks=pytest.mark.slow),
    ],
)
def test_nothing_of_a_skipped_step_remains(name: str, case: tuple):
    skipped, history = take(name, case, "aBc")
    assert [metrics["skipped"] for metrics in history] == [0, 1, 0]
    assert np.isnan(history[1]["grad_norm"])
    # XLA's CPU programs may take NaN for 0 in a ReLU, after which the loss is finite.
    assert np.isnan(history[1]["loss"]) or name == "resnet"
    for metric in ("param_norm", "logit_scale"):  # of the model, which is as before
        assert history[1][metric] == history[0][metric]
    left_out, _ = take(name, case, "a-c")
    assert_same_bits(left_out, skipped)
    # By the program that skips nothing. It may round otherwise.
    reference, metrics = take(name, case, "a-c", skip_above=None)
    assert "skipped" not in metrics[0]
    assert history[2]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-5)
    assert history[2]["learning_rate"] == metrics[1]["learning_rate"] < history[0]["learning_rate"]
    if case is PLAIN:
        want = tiny.named_leaves(reference.params)
        for leaf, value in tiny.named_leaves(skipped.params).items():
            np.testing.assert_allclose(value, want[leaf], rtol=1e-4, atol=1e-5, err_msg=leaf)


def test_spikes_are_skipped_by_their_gradient_norm():
    """The bound lies between the norms of two batches; both losses are finite."""
    norms = [take("vit", PLAIN, letter)[1][0]["grad_norm"] for letter in "ac"]
    bound = float(np.mean(norms))
    spike, calm = ("a", "c") if norms[0] > norms[1] else ("c", "a")
    state, history = take("vit", PLAIN, spike + calm, skip_above=bound)
    assert [metrics["skipped"] for metrics in history] == [1, 0]
    assert history[0]["grad_norm"] == max(norms)
    assert_same_bits(take("vit", PLAIN, "-" + calm, skip_above=bound)[0], state)


def test_all_meshes_skip_the_same_steps():
    one, many = (take("vit", case, "aBcD")[1] for case in (PLAIN, ((2, 4), {})))
    assert [m["skipped"] for m in one] == [m["skipped"] for m in many] == [0, 1, 0, 1]
    assert many[2]["loss"] == pytest.approx(one[2]["loss"], rel=1e-5)


def test_a_program_that_stops_pays_nothing():
    """It has no selection; and skipping takes no more memory, nor more operations."""
    programs = [compiled("vit", (1, 1), above, ())[1] for above in (None, np.inf)]
    stop, skip = programs
    assert "conditional" not in stop.as_text()
    assert "conditional" in skip.as_text()
    size = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert size[1] <= 1.02 * size[0]
    work = [program.cost_analysis()["flops"] for program in programs]
    assert work[1] <= 1.02 * work[0]


# ---- Runs --------------------------------------------------------------------------------------

SETTINGS = {"step.nonfinite": "skip", "eval.every": "12 steps", "log.tensorboard": False}


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    with tiny_run.compile_once():
        yield


@pytest.fixture
def bad_steps(monkeypatch):
    """Makes the batches at some places of the data bad, counted as steps of a run without fault."""
    return functools.partial(_make_bad, monkeypatch)


def _make_bad(patch: pytest.MonkeyPatch, steps) -> None:
    finish = rows.Rows._finish

    def whiten(self, position, index, read):
        row, stats = finish(self, position, index, read)
        step, place = divmod(position, BATCH)
        if step + 1 in steps and place == 3:
            row = {**row, "image": np.full_like(row["image"], 255)}
        return row, stats

    patch.setattr(rows.Rows, "_finish", whiten)
    patch.setattr(augment, "augment", poison)


def run(directory: pathlib.Path, **changes) -> dict[str, float]:
    return train.train(tiny_run.config({**SETTINGS, **changes}), directory)


def meta(workdir: pathlib.Path, step: int) -> dict:
    return json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())


def assert_same_run(one: pathlib.Path, other: pathlib.Path, step: int) -> None:
    assert tiny_run.learned(one) == tiny_run.learned(other)
    tiny_run.assert_same_checkpoint(one, other, step)
    for field in ("examples_seen", "skipped_steps", "skipped_in_a_row", "rollbacks"):
        assert meta(one, step)[field] == meta(other, step)[field]


def without(workdir: pathlib.Path, copy: pathlib.Path, *steps: int) -> pathlib.Path:
    """Copies a workdir, as of a process that was killed before it saved some checkpoints."""
    shutil.copytree(workdir, copy)
    for step in steps:
        shutil.rmtree(copy / "checkpoints" / str(step))
    return copy


def test_a_run_skips_and_saves_bad_batches_and_resumes_to_the_bit(tmp_path, bad_steps, capsys):
    bad_steps({3, 8, 9})
    whole = tmp_path / "whole"
    run(whole, **{"step.saved_batches": 2})
    found = tiny_run.read_metrics(whole)
    total = [found[step, "train/skipped_steps"] for step in range(1, 13)]
    assert total == [0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3]
    assert np.isnan([found[step, "train/loss"] for step in (3, 8, 9)]).all()
    assert np.isfinite([found[step, "train/loss"] for step in (1, 2, 4, 5, 6, 7, 10, 11, 12)]).all()
    assert meta(whole, 8)["skipped_steps"] == {"non-finite step": 2}
    assert (meta(whole, 8)["skipped_in_a_row"], meta(whole, 12)["skipped_in_a_row"]) == (1, 0)
    assert meta(whole, 12)["skipped_steps"] == {"non-finite step": 3}
    assert meta(whole, 12)["examples_seen"] == 12 * BATCH
    said = capsys.readouterr().out
    assert re.search(
        r"Skipped: step 3 \(loss nan, gradient norm nan\); its batch is in .*npz", said
    )
    assert "Skipped steps: 3 x non-finite step." in html_page.text_of(
        (whole / "report.html").read_text()
    )
    events = json.loads((whole / "starts/0001.json").read_text())["events"]
    assert [event["step"] for event in events] == [3, 8, 9]
    names = sorted(path.name for path in (whole / "skipped").iterdir())
    assert names == ["step_0000003.npz", "step_0000008.npz"]
    assert_saved_with_its_keys(whole)
    # Resumed in the middle of a row.
    copy = without(whole, tmp_path / "copy", 12)
    shutil.rmtree(copy / "skipped")
    run(copy, **{"step.saved_batches": 2})
    assert_same_run(whole, copy, 12)


def assert_saved_with_its_keys(workdir: pathlib.Path) -> None:
    """The batch of step 3."""
    saved = np.load(workdir / "skipped/step_0000003.npz")
    assert saved["position"].tolist() == list(range(2 * BATCH, 3 * BATCH))
    assert (saved["image"] == 255).all((1, 2, 3)).tolist() == [i == 3 for i in range(BATCH)]
    assert not saved["replaced"].any()
    prepared = runs.prepare(tiny_run.config(SETTINGS), workdir)
    for position, key, tokens in zip(saved["position"], saved["key"], saved["tokens"]):
        example = prepared.source[prepared.order[int(position)]]
        assert key == example.key
        assert tokens.tolist() in [
            prepared.tokenizer.encode(text)[0].tolist() for text in example.captions.texts
        ]


def test_a_run_goes_back_past_bad_batches(tmp_path, bad_steps, capsys):
    bad_steps({6, 7, 8})
    whole = tmp_path / "whole"
    run(whole, **{"step.max_skipped": 2})
    said = capsys.readouterr().out
    assert "Steps 6 to 8 were skipped" in said
    assert "back to step 4, and on from there with the examples from 128 on" in said
    rollbacks = [{"from_step": 8, "to_step": 4, "examples_seen": 8 * BATCH}]
    assert meta(whole, 4)["rollbacks"] == []
    for step in (8, 12):
        assert meta(whole, step)["rollbacks"] == rollbacks
        assert meta(whole, step)["examples_seen"] == (step + 4) * BATCH
        assert meta(whole, step)["skipped_steps"] == {"non-finite step": 3}
    found = tiny_run.read_metrics(whole)  # no step twice
    assert [step for step, name in found if name == "train/loss"] == list(range(1, 13))
    assert np.isfinite([found[step, "train/loss"] for step in range(1, 13)]).all()
    said = html_page.text_of((whole / "report.html").read_text())
    assert "Gone back from step 8 to 4." in said
    (start,), _ = starts.read(whole)
    assert (start.from_step, start.rollbacks, start.step) == (0, [(8, 4)], 12)
    assert goodput.account([start]).lost == {1: 4}


RARELY = {
    "log.every": "1000 steps",
    "checkpoint.every": "10 steps",
    "duration": "24 steps",
    "eval.every": "24 steps",
    "step.max_skipped": 2,
}


@pytest.mark.slow
def test_the_bound_holds_however_seldom_the_run_logs(tmp_path, bad_steps, monkeypatch):
    """A few steps are under way when the one too many is found, not those of a whole interval."""
    bad_steps({12, 13, 14})
    taken: list[int] = []
    record = skips.Skips.record
    monkeypatch.setattr(
        skips.Skips,
        "record",
        lambda self, step, *rest: taken.append(step) or record(self, step, *rest),
    )
    run(tmp_path, **RARELY)
    back = next(place for place in range(1, len(taken)) if taken[place] < taken[place - 1])
    assert (taken[back - 1], taken[back]) == (14 + skips._LAG, 11)
    (rollback,) = meta(tmp_path, 24)["rollbacks"]
    assert rollback == {"from_step": 14, "to_step": 10, "examples_seen": 14 * BATCH}
    events = json.loads((tmp_path / "starts/0001.json").read_text())["events"]
    assert [event["step"] for event in events] == [14, 14]  # the skipped ones, and the roll-back


HOST = """
import sys
import pytest
sys.path[:0] = ["tests/support", "tests/training"]
import test_skips
test_skips._make_bad(pytest.MonkeyPatch(), {4, 12, 13, 14})
from clip_jax.training import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_hosts_skip_and_go_back_together(tmp_path, bad_steps):
    """One of them alone has the bad rows. Both take the steps that one host takes."""
    given = {**tiny_run.SETTINGS, **SETTINGS, **RARELY}
    command = ["-c", HOST, "--config=configs/vit_b32.py:smoke", f"--workdir={tmp_path}/two"]
    command += [f"--config.{name}={value}" for name, value in given.items()]
    ended = endings([launch([*command, *own], devices=1) for own in flags(2)])
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    bad_steps({4, 12, 13, 14})
    run(tmp_path / "one", **RARELY)
    for field in ("examples_seen", "skipped_steps", "skipped_in_a_row", "rollbacks"):
        assert meta(tmp_path / "two", 24)[field] == meta(tmp_path / "one", 24)[field]
    assert len(meta(tmp_path / "two", 24)["rollbacks"]) == 1
    losses = [tiny_run.read_metrics(tmp_path / name)[24, "train/loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    saved = sorted(path.name for path in (tmp_path / "two/skipped").iterdir())
    assert saved == [
        f"step_{step:07d}.part{part:04d}.npz" for step in (4, 12, 13) for part in (0, 1)
    ]


def test_a_damaged_checkpoint_is_passed_over_by_a_roll_back(
    tmp_path, bad_steps, capsys, monkeypatch
):
    """The one before is taken, as at a start, and both are told."""
    bad_steps({6, 7, 8})
    choose = skips.choose_checkpoint

    def damage(*args) -> int | None:
        chosen = choose(*args)
        shutil.rmtree(tmp_path / f"checkpoints/{chosen}/optimizer")
        return chosen

    monkeypatch.setattr(skips, "choose_checkpoint", damage)
    run(tmp_path, **{"step.max_skipped": 2, "checkpoint.every": "2 steps", "checkpoint.keep": 9})
    said = capsys.readouterr().out
    assert "The checkpoint of step 4 cannot be read: " in said
    assert "back to step 2, and on from there with the examples from 128 on" in said
    assert (tmp_path / "damaged/4").is_dir()
    for step in (4, 12):  # 4 is saved again
        rollbacks = [{"from_step": 8, "to_step": 2, "examples_seen": 8 * BATCH}]
        assert meta(tmp_path, step)["rollbacks"] == rollbacks
    found = tiny_run.read_metrics(tmp_path)
    assert [step for step, name in found if name == "train/loss"] == list(range(1, 13))
    (start,), _ = starts.read(tmp_path)
    assert start.rollbacks == [(8, 2)]


@pytest.mark.slow
def test_a_signal_during_a_roll_back(tmp_path, bad_steps, monkeypatch):
    """It ends the start at once; the next one goes back again, and the run is as without it."""
    bad_steps({6, 7, 8})
    run(tmp_path / "whole", **{"step.max_skipped": 2})
    restore = checkpoint.Checkpoints.restore_latest

    def restore_and_ask(self, like, last=None):
        found = restore(self, like, last)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "restore_latest", restore_and_ask)
        with pytest.raises(Stopped, match=r"^SIGTERM, and no step is under way") as stopped:
            run(tmp_path / "asked", **{"step.max_skipped": 2})
    assert stopped.value.exit_code == ExitCode.RESUME
    run(tmp_path / "asked", **{"step.max_skipped": 2})
    assert_same_run(tmp_path / "whole", tmp_path / "asked", 12)


@pytest.mark.slow
def test_trackers_are_told_of_a_roll_back(tmp_path, bad_steps, monkeypatch):
    bad_steps({6, 7, 8})
    told: list[tuple[int, bool]] = []

    class Fake:
        def __init__(self, names, *, start_step, went_back, **_):
            told.append((start_step, went_back))

        def write(self, step, row): ...

        def close(self): ...

    monkeypatch.setattr(loop.trackers, "parse", lambda names: ["wandb"])
    monkeypatch.setattr(loop.trackers, "Trackers", Fake)
    run(tmp_path, **{"step.max_skipped": 2})
    shutil.rmtree(tmp_path / "checkpoints/12")
    run(tmp_path, **{"step.max_skipped": 2})
    assert told == [(0, False), (4, True), (8, False)]


@pytest.mark.slow
def test_steps_after_a_roll_back_are_those_taken_by_hand_and_resume_to_the_bit(
    tmp_path, bad_steps, capsys
):
    """The step, from the state of step 4, on the data that come after the bad ones."""
    bad_steps({6, 7, 8})
    whole = tmp_path / "whole"
    run(whole, **{"step.max_skipped": 2})
    found = tiny_run.read_metrics(whole)
    capsys.readouterr()
    config = tiny_run.config(SETTINGS)
    prepared = runs.prepare(config, tmp_path)
    with checkpoint.Checkpoints(without(whole, tmp_path / "by_hand", 8, 12)) as store:
        state = store.restore(4, prepared.program.state)
    step_fn = prepared.program.lower().compile()
    batches = iter(runs.open_data(prepared, 8 * BATCH))
    for step, batch in zip(range(5, 13), batches):
        state, metrics = step_fn(state, jax.device_put(batch, step_fn.input_shardings[0][1]))
        assert float(metrics["loss"]) == found[step, "train/loss"]
    batches.close()
    want = {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)}
    assert want <= {leaf.tobytes() for leaf in tiny_run.read_checkpoint(whole, 12).values()}
    # Killed after the next checkpoint, and before it: then it goes back once more.
    for lost in ((12,), (8, 12)):
        copy = without(whole, tmp_path / f"without_{len(lost)}", *lost)
        run(copy, **{"step.max_skipped": 2})
        assert ("Steps 6 to 8 were skipped" in capsys.readouterr().out) == (8 in lost)
        assert_same_run(whole, copy, 12)


def test_a_run_that_only_skips_ends_with_an_error(tmp_path, bad_steps):
    """It goes further back each time, and at last names all that happened."""
    bad_steps(range(6, 1000))
    settings = {"step.max_skipped": 1, "step.max_rollbacks": 2, "checkpoint.every": "2 steps"}
    with pytest.raises(UserError) as caught:
        run(tmp_path, **settings)
    said = str(caught.value)
    for part in (
        "Steps 3 to 4 were skipped",
        "step.max_skipped = 1",
        "step.max_rollbacks = 2",
        "gone back from step 7 to 4, from step 6 to 2",
        "6 x non-finite step",
        str(tmp_path / "skipped"),
        "--config.optim.learning_rate",
        "--config.step.max_rollbacks=5",
    ):
        assert part in said, part
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    record = json.loads((tmp_path / "starts/0001.json").read_text())
    assert sum("back to step" in event["text"] for event in record["events"]) == 2


@pytest.mark.slow
def test_a_run_that_never_took_a_step_has_nowhere_to_go_back_to(tmp_path, bad_steps):
    bad_steps(range(1, 1000))
    with pytest.raises(UserError, match=r"Steps 1 to 2 .* there is no checkpoint to go back to"):
        run(tmp_path, **{"step.max_skipped": 1})


@pytest.mark.slow
def test_a_run_that_stops_names_the_remedy_which_resumes_it(tmp_path, bad_steps):
    bad_steps({6})
    with pytest.raises(UserError, match=r"is nan at step 6.*--config\.step\.nonfinite=skip"):
        run(tmp_path, **{"step.nonfinite": "stop"})
    run(tmp_path)
    assert meta(tmp_path, 12)["skipped_steps"] == {"non-finite step": 1}


@pytest.mark.slow
def test_a_batch_that_cannot_be_saved_does_not_end_the_run(tmp_path, bad_steps, capsys):
    (tmp_path / "skipped").write_text("a file where a folder should be")
    bad_steps({3})
    run(tmp_path)
    assert re.search(r"Skipped: step 3 .*could not be saved: .*skipped", capsys.readouterr().out)


# ---- Parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "first", "rollbacks", "chosen"),
    [
        ([], 3, [], None),
        ([2, 4, 6], 5, [], 4),
        ([2, 4, 6], 7, [], 6),
        ([2, 4], 5, [4], 2),  # the one that was tried before leads to the same end
        ([2, 4, 6], 7, [4], 6),  # there is a newer one
        ([4], 5, [4], 4),  # there is no other
        ([6, 8], 5, [], 6),  # saved within the row, the ones before it are deleted
    ],
)
def test_checkpoint_to_go_back_to(steps, first, rollbacks, chosen):
    past = [{"from_step": 9, "to_step": step, "examples_seen": 0} for step in rollbacks]
    assert skips.choose_checkpoint(steps, first, past) == chosen


@pytest.mark.parametrize("together", [1, 3, 20])
def test_rows_are_counted_however_seldom_they_are_read(together: int):
    """Good steps after the bound was passed do not hide that it was."""
    flags = [0, 1, 0, 1, 1, 1, 0, 0, 0]
    noted: list[str] = []
    seen = skips.Skips(
        2,
        1,
        counts={"spike": 1},
        in_a_row=0,
        note=lambda step, text: noted.append(text),
        save=lambda step: pytest.fail("one was saved before"),
    )

    def train_on() -> None:
        for step, flag in enumerate(flags, 1):
            loss, norm = jnp.float32(np.nan if flag else 1), jnp.float32(7)
            seen.record(step, {"skipped": jnp.float32(flag), "loss": loss, "grad_norm": norm})
            if step % together == 0 or step == len(flags):
                seen.read(step)

    with pytest.raises(skips.RollBack) as caught:
        train_on()
    assert (caught.value.first, caught.value.last) == (4, 6)
    assert seen.counts == {"spike": 1, "non-finite step": 4}
    assert "step 2 (loss nan, gradient norm 7)" in noted[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step.nonfinite": "ignore"}, r"step\.nonfinite is 'ignore'.*stop, skip"),
        ({"step.max_grad_norm": 2.0}, r"step\.max_grad_norm is 2\.0.*step\.nonfinite=skip"),
        ({"step.max_grad_norm": float("nan")}, r"step\.max_grad_norm is nan.*at least 0"),
        ({"step.max_skipped": -1}, r"step\.max_skipped is -1.*at least 0"),
    ],
)
def test_wrong_settings(changes, message):
    config = tiny_run.config(changes)
    with pytest.raises(UserError, match=message):
        validation.validate(config)
