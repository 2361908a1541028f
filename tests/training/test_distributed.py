"""Several processes on 127.0.0.1, eight devices in all: the loss, whole runs, a resumption."""

import functools
import itertools
import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from several_hosts import free_port, launch, outputs

BATCH, WIDTH = 48, 40
TOLERANCE = 1e-5  # relative, of losses: sums in another order; seen: 1e-6


# ---- The loss ----------------------------------------------------------------------------------


def loss_worker(port: str, process: str) -> None:
    """One of the two processes: compares what lies on its devices with the reference."""
    import jax.numpy as jnp
    import reference

    from clip_jax import choices, losses, sharding

    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    mesh = sharding.make_mesh(data=2, fsdp=4)
    images, texts = reference.pairs(BATCH, WIDTH)
    rows = slice(int(process) * BATCH // 2, (int(process) + 1) * BATCH // 2)
    place = sharding.batch_sharding(mesh)
    embeds = [jax.make_array_from_process_local_data(place, x[rows]) for x in (images, texts)]

    errors = {}
    for method, multiplier in itertools.product(choices.LOSS_METHODS, (1 / 0.07, 100)):
        scale = np.float32(np.log(multiplier))
        loss = functools.partial(losses.softmax_loss, mesh=mesh, method=method, tile=2)
        grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        value, (d_images, d_texts, d_scale) = grad(*embeds, jnp.float32(scale))
        want = reference.softmax_loss(images, texts, scale)
        found = {"loss": (value, want[0]), "d_logit_scale": (d_scale, want[3])}
        for name, got, wanted in (("d_images", d_images, 1), ("d_texts", d_texts, 2)):
            for i, shard in enumerate(got.addressable_shards):
                found[f"{name} {i}"] = (shard.data, want[wanted][shard.index])
        for name, (got, wanted) in found.items():
            case = f"{name} at {multiplier:.0f} by {method}"
            errors[case] = reference.relative_error(got, wanted)
    print(json.dumps({"devices": jax.device_count(), "errors": errors}))


def test_loss_over_two_processes_equals_the_reference():
    port = str(free_port())
    workers = [launch([__file__, port, str(process)], devices=4) for process in range(2)]
    for printed in outputs(workers):
        found = json.loads(printed.splitlines()[-1])
        assert found["devices"] == 8
        assert len(found["errors"]) == 2 * 2 * (2 + 2 * 4)
        for name, error in found["errors"].items():
            assert error < 1e-5, name


# ---- A run -------------------------------------------------------------------------------------

CHANGES = {
    "duration": "6 steps",
    "checkpoint.every": "3 steps",
    "eval.every": "3 steps",
    "log.tensorboard": False,
}


def command(workdir: pathlib.Path, **flags) -> list[str]:
    import tiny_run

    settings = {f"config.{k}": v for k, v in {**tiny_run.SETTINGS, **CHANGES}.items()}
    settings |= {"workdir": workdir, **flags}
    return [
        "main.py",
        "--config=configs/vit_b32.py:smoke",
        *(f"--{name}={value}" for name, value in settings.items()),
    ]


HEADS = {"config.model.size.image_heads": 4, "config.model.size.text_heads": 4}
NAMED = {
    "config.eval.datasets": "digits",  # 360 and 1,293 images, which no batch divides
    "config.eval.tasks": "zeroshot,linear_probe",
}
# By the mesh that they have over 8 devices: number of processes, and the settings that they change.
RUNS = {
    "data 4 x fsdp 2": (2, {"config.mesh.fsdp": 2}),
    # Tensor groups of four devices span two processes, which load the same examples.
    "slice 2 x tensor 4": (
        4,
        {
            "config.mesh.tensor": 4,
            "config.mesh.slices": 2,
            "config.loss.method": "ring",
            "config.accum_steps": 4,
        },
    ),
}
SLOW = pytest.param("slice 2 x tensor 4", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> pathlib.Path:
    """Workdir of a run by one process on one device, compiled as a user's is."""
    folder = tmp_path_factory.mktemp("one")
    outputs([launch(command(folder, **HEADS, **NAMED), devices=1, quick="")])
    return folder


@pytest.fixture(scope="module", params=["data 4 x fsdp 2", SLOW])
def several(request, tmp_path_factory) -> pathlib.Path:
    """Workdir of the same run by several processes, on eight devices in all."""
    count, changes = RUNS[request.param]
    folder = tmp_path_factory.mktemp("several")
    shared = {"coordinator": f"127.0.0.1:{free_port()}", "processes": count}
    commands = [
        command(folder, process=process, **shared, **HEADS, **NAMED, **changes)
        for process in range(count)
    ]
    first, *others = outputs([launch(arguments, 8 // count) for arguments in commands])
    assert f"8 x cpu (mesh {request.param})" in first
    for printed in others:
        # The first process speaks for all. Gloo's threads print too, in pieces that mix.
        gloo = "Gloo Rank is connected to peer ranks Expected number of"
        assert set(re.findall("[A-Za-z]+", printed)) <= set(gloo.split())
    return folder


def read(workdir: pathlib.Path, kind: str) -> dict[int, dict[str, float]]:
    """Rows of metrics.jsonl that have this kind of metric ("train/"), by step."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if any(name.startswith(kind) for name in row)]
    by_step = {int(row.pop("step")): row for row in found}
    assert len(by_step) == len(found)
    return by_step


def assert_same_training(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    got, want = read(workdir, "train/"), read(reference, "train/")
    assert list(got) == list(want) == list(range(1, 7))
    for step, row in want.items():
        for name in ("loss", "grad_norm", "param_norm", "learning_rate"):
            tolerance = TOLERANCE if name == "loss" else 10 * TOLERANCE
            value = got[step][f"train/{name}"]
            assert value == pytest.approx(row[f"train/{name}"], rel=tolerance), (step, name)


def test_processes_train_as_one_does(several, one):
    losses = [row["train/loss"] for row in read(one, "train/").values()]
    assert losses[0] - losses[-1] > 0.1  # nats: it learned something that could differ
    assert_same_training(several, one)


def test_processes_evaluate_as_one_does(several, one):
    """One query in a hundred may be at a tie; seen: none."""
    want, got = read(one, "zeroshot/"), read(several, "zeroshot/")
    assert list(got) == list(want) == [3, 6]
    for step, row in want.items():
        assert row.keys() == got[step].keys()
        for name, value in row.items():
            if name != "eval/images_seen":
                assert got[step][name] == pytest.approx(value, abs=0.011), (step, name)


def test_processes_probe_as_one_does(several, one):
    want, got = (read(workdir, "linear_probe/")[6] for workdir in (one, several))
    name = "linear_probe/digits/accuracy"
    assert want[name] > 0.3
    assert got[name] == pytest.approx(want[name], abs=0.011)
    # The data set that a config describes and the one that it names are the same images here.
    assert want["zeroshot/digits/top1"] == want["zeroshot/top1"]


def test_processes_leave_one_run_behind(several, one):
    names = {path.name for path in several.iterdir()}
    assert names == {path.name for path in one.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.html", "checkpoints"} <= names
    assert {path.name for path in (several / "checkpoints").iterdir()} == {"3", "6"}


def test_one_process_resumes_what_several_began(several, one, tmp_path, capsys):
    """The run resumes at step 3, on a mesh of another shape."""
    import tiny_run

    from clip_jax.training import train

    shutil.copytree(several, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    heads = {"model.size.image_heads": 4, "model.size.text_heads": 4}
    with tiny_run.compile_once():
        train.train(tiny_run.config({**CHANGES, **heads}), tmp_path)
    printed = capsys.readouterr().out
    assert "(mesh data 8)" in printed
    assert f"Resuming {tmp_path} from step 3." in printed
    assert_same_training(tmp_path, one)
    assert (tmp_path / "checkpoints" / "6").exists()


if __name__ == "__main__":
    loss_worker(*sys.argv[1:])
