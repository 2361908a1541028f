"""The planner from the command line to the table, on programs of the real TPU compiler."""

import json
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest
from tiny_plan import TINY, V5E_8, check_paragraph, needs_compiler, tiny_config, unread_flops

from clip_jax import __main__ as commands
from clip_jax.models import flops as model_flops
from clip_jax.models.sizes import Size
from clip_jax.plan import make, progress, search, step_cost, table, topology
from clip_jax.training import program

FLAGS = ["--config=configs/vit_b32.py:smoke", "--config.model.attention=xla"] + [
    f"--config.model.size.{name}={value}" for name, value in TINY.items()
]


@pytest.fixture(scope="module")
def plan() -> make.Plan:
    """The tiny model, with parameters sharded over half of the chips."""
    config = tiny_config(**{"mesh.fsdp": 4, "loss.method": "ring"})
    return make.make_plan(config, V5E_8, examples=3200, top=5)


# ---- Plans -------------------------------------------------------------------------------------


@needs_compiler
def test_memory(plan):
    memory = plan.memory
    state = program.build(tiny_config(**{"mesh.fsdp": 4}), 3200, devices=V5E_8.devices()).state
    sharded = replicated = 0
    for leaf in jax.tree.leaves(state.params):
        whole = leaf.sharding.is_fully_replicated
        replicated += leaf.size * 4 * whole
        sharded += leaf.size * 4 * (not whole)
    assert memory.parameters == replicated + sharded / 4
    assert memory.optimizer == pytest.approx(2 * memory.parameters, abs=64)
    assert memory.batch == 4 * (16 * 16 * 3 + 4 * 8)
    assert memory.temporaries > 0
    assert memory.fits
    assert memory.peak == memory.resident + memory.temporaries + memory.results + memory.code
    assert plan.fits


@needs_compiler
def test_operations_of_the_step(plan):
    """Executed are those of the model: 4/3 of the loss's in a ring, none to the pixels, nor those
    of tokens that are not read."""
    size = Size(**{**TINY, "image_mlp": 0, "text_mlp": 0})
    pixels = 2 * 4 * 8 * 8 * 3 * 32 * 32
    logits = 2 * 32 * 32 * 16
    wanted = model_flops.step_flops(size, 32, 1) - pixels + logits - 3 * 32 * unread_flops(size)
    assert plan.step.model_flops * 8 == model_flops.step_flops(size, 32, 1)
    assert plan.step.hardware_flops * 8 == pytest.approx(wanted, rel=0.02)
    assert plan.step.mfu / plan.step.hfu == pytest.approx(
        plan.step.model_flops / plan.step.hardware_flops
    )


@needs_compiler
@pytest.mark.slow
def test_two_captions_an_image_and_weights():
    settings = {"data.captions": 2, "data.source.weight_key": "score"}
    plan = make.make_plan(tiny_config(**settings), V5E_8, examples=3200, top=5)
    assert plan.memory.batch == 4 * (16 * 16 * 3 + 2 * 4 * 8 + 4)
    size = Size(**{**TINY, "image_mlp": 0, "text_mlp": 0})
    assert plan.step.model_flops * 8 == model_flops.step_flops(size, 32, 2)
    another = 3 * 32 * (model_flops.text_flops(size) + 2 * 32 * size.embed_dim)
    one = make.make_plan(tiny_config(), V5E_8, examples=3200, top=5)
    executed = 8 * (plan.step.hardware_flops - one.step.hardware_flops)
    assert 0.6 * another < executed < another  # not those of tokens that are not read


@needs_compiler
def test_collectives_of_the_step(plan):
    """Parameters are gathered along fsdp, gradients summed along data, texts go round both."""
    found = {(x.kind, axis) for x in plan.step.collectives for axis in x.axes.split("+")}
    assert ("all-gather", "fsdp") in found
    assert ("all-reduce", "data") in found
    assert {("collective-permute", "fsdp"), ("collective-permute", "data")} <= found
    permutes = [x for x in plan.step.collectives if x.kind == "collective-permute"]
    assert all(x.network == "ici" and x.overlapped for x in permutes)
    assert sum(x.seconds for x in plan.step.collectives) == pytest.approx(plan.step.network_seconds)


@needs_compiler
def test_time_of_the_step(plan):
    step = plan.step
    assert step.seconds >= max(step.compute_seconds, 1e-6)
    assert plan.total_steps == 20
    assert plan.run_seconds == pytest.approx(20 * step.seconds)
    assert plan.examples_per_second == pytest.approx(32 / step.seconds)
    assert sum(part.seconds for part in step.parts) == pytest.approx(step.compute_seconds)
    owners = {part.name.split(",")[0] for part in step.parts}
    assert {"image tower", "text tower", "loss", "optimiser"} <= owners
    assert len(step.top) == 5


@needs_compiler
def test_the_table(plan):
    text = table.format_plan(plan, ["--config.accum_steps=2"])
    for line in (
        "32 pairs a step, on v5e:2x4: 8 chips, mesh data 2 x fsdp 4",
        "of 15.75: FITS",
        "20 steps of 3,200 examples: 20 steps",
        "collective-permute",
        "text tower, MLP, backward",
        "What would fit:\n  --config.accum_steps=2",
        "XLA's estimated cycles at 1.50 GHz",
        " of about 56 cores at 275 images/s each",
    ):
        assert line in text
    assert max(map(len, text.splitlines())) < 400
    assert all(line == line.rstrip() for line in text.splitlines())


@needs_compiler
def test_json(plan):
    fields = json.loads(json.dumps(plan.to_json()))
    assert fields["fits"] is True
    assert fields["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "tensor": 1}
    assert fields["memory"]["peak"] == plan.memory.peak
    assert fields["step"]["mfu"] == plan.step.mfu
    assert set(fields["step"]["top"][0]) >= {"name", "origin", "times", "seconds", "flops"}
    assert fields["days"] == pytest.approx(plan.run_seconds / 86_400)
    assert fields["step"]["collectives"][0]["axes"]


@needs_compiler
@pytest.mark.slow
def test_several_slices():
    config = tiny_config(**{"mesh.slices": 2})
    found = make.make_plan(config, topology.parse_topology("v5e:2x2", slices=2), examples=3200)
    networks = {x.axes: x.network for x in found.step.collectives}
    assert networks["slice"] == "dcn"
    assert networks["data"] == "ici"
    assert found.mesh == {"slice": 2, "data": 4, "fsdp": 1, "tensor": 1}
    assert "Between slices: 3.1" in table.format_plan(found)
    assert "slice (DCN)" in table.format_plan(found)


@needs_compiler
@pytest.mark.slow
def test_kernels_of_the_step():
    """Attention's kernels are parts of the towers, called once a layer and pass."""
    config = tiny_config(**{"model.attention": "pallas", "model.scan_layers": False})
    found = make.make_plan(config, V5E_8, examples=3200)
    kernels = {kernel.part: kernel for kernel in found.step.kernels}
    for name in ("image tower, attention, forward", "image tower, attention, backward"):
        kernel = kernels[name]
        assert kernel.timing.simulated
        assert kernel.seconds >= kernel.times * kernel.timing.cycles / 1.5e9 * 0.999
        part = next(part for part in found.step.parts if part.name == name)
        assert part.seconds >= kernel.seconds
        assert part.flops >= kernel.times * kernel.flops > 0
    text = table.format_plan(found)
    assert "Pallas kernels" in text
    assert "simulation of all their instructions" in text
    json.dumps(found.to_json())


@needs_compiler
@pytest.mark.slow
def test_accumulation_and_remat_cost_operations(plan):
    config = tiny_config(**{"accum_steps": 2, "model.remat": "full"})
    found = make.make_plan(config, V5E_8, examples=3200)
    # Embedded, embedded again, and recomputed layer by layer behind that: five passes for three.
    assert 1.4 < found.step.hardware_flops / plan.step.hardware_flops < 5 / 3
    names = [part.name for part in found.step.parts]
    assert "micro-batches" in names
    assert any("recomputed" in name for name in names)


@pytest.mark.parametrize(("rate", "waits"), [(1000.0, False), (1e6, True)])
def test_the_input_of_a_host(rate, waits):
    """64 hosts of four chips."""
    host = make.Host.of(topology.parse_topology("v5e:16x16"), rate, 250.0)
    assert host.images == rate / 64
    assert host.needed_cores == host.images / 250
    assert host.starves == waits == (host.needed_cores > 56)
    assert make.Host.of(topology.parse_topology("tpu7x:1x1x1"), rate, 250.0).images == rate


def test_progress(monkeypatch):
    """A stage says again how long it takes, for as long as it does."""
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    lines: list[str] = []
    with progress.stage("Compiling", lines.append):
        time.sleep(1)
    count = len(lines)
    assert lines[0] == "Compiling."
    assert count > 3
    assert all(re.fullmatch(r"Compiling: \d+s so far\.", line) for line in lines[1:])
    time.sleep(0.2)
    assert len(lines) == count


# ---- The command line --------------------------------------------------------------------------


def test_commands(capsys):
    commands.main(["--help"])
    said = capsys.readouterr().out
    for name in commands.COMMANDS:
        assert f"\n  {name} " in said
    with pytest.raises(SystemExit) as caught:
        commands.main(["plam"])
    assert caught.value.code == 2
    assert re.search(r"'plam'.*plan", capsys.readouterr().err)


def test_help(capsys):
    commands.main(["plan", "--help"])
    said = capsys.readouterr().out
    for name in (
        "config",
        "topology",
        "slices",
        "examples",
        "json",
        "search_minutes",
        "top",
        "budget",
    ):
        assert f"--{name}" in said or f"--[no]{name}" in said


USER_ERRORS = {
    "no topology": (FLAGS, r"--topology is missing.*v5e:16x16"),
    "no config": (["--topology=v5e:2x2"], r"--config is missing"),
    "no such config": (["--config=configs/vit_b33.py", "--topology=v5e:2x2"], r"vit_b33"),
    "no such topology": ([*FLAGS, "--topology=v5e:3x5"], r"no TPU slice v5e:3x5.*v5e:4x4"),
    "no such flag": ([*FLAGS, "--topolgy=v5e:2x2"], r"topolgy"),
    "no such field": ([*FLAGS, "--topology=v5e:2x2", "--config.batchsize=3"], r"batchsize"),
    "stray word": ([*FLAGS, "--topology=v5e:2x2", "fast"], r"'fast'"),
    "bad mesh": ([*FLAGS, "--topology=v5e:2x2", "--config.mesh.fsdp=3"], r"mesh\.fsdp=3.*1, 2, 4"),
    "bad batch": ([*FLAGS, "--topology=v5e:2x4", "--config.batch_size=33"], r"batch_size=32"),
    "bad value": ([*FLAGS, "--topology=v5e:2x2", "--config.seed=-1"], r"seed is -1"),
    "no folder": ([*FLAGS, "--topology=v5e:2x2", "--json=nowhere/x.json"], r"no nowhere"),
    "no examples": ([*FLAGS, "--topology=v5e:2x2", "--examples=0"], r"--examples is 1"),
    "no rate": ([*FLAGS, "--topology=v5e:2x2", "--images_per_core=0"], r"images_per_core=0"),
    "no slices": ([*FLAGS, "--topology=v5e:2x2", "--slices=0"], r"0 slices"),
    "two slices": ([*FLAGS, "--topology=v5e:2x2", "--slices=2", "--config.mesh.slices=4"], "slice"),
}


@needs_compiler
@pytest.mark.parametrize("name", USER_ERRORS)
def test_a_user_error_gets_one_paragraph(name, capsys):
    arguments, wanted = USER_ERRORS[name]
    with pytest.raises(SystemExit) as caught:
        commands.main(["plan", *arguments])
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.out == ""
    check_paragraph(said.err)
    assert re.search(wanted, said.err), said.err


@needs_compiler
@pytest.mark.slow
def test_the_command(tmp_path):
    """Runs in a process whose environment nothing has set."""
    target = tmp_path / "plan.json"
    command = [sys.executable, "-m", "clip_jax", "plan", *FLAGS, "--topology=v5e:2x2", "--top=3"]
    answer = subprocess.run(
        [*command, f"--json={target}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin"},
        cwd=pathlib.Path(__file__).parents[2],
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "FITS" in answer.stdout
    stages = ["Tracing the step", "Compiling for v5e:2x2, which takes some minutes"]
    said = answer.stderr.strip().splitlines()
    assert [line for line in said if "so far" not in line] == [f"{stage}." for stage in stages]
    assert json.loads(target.read_text())["chips"] == 4


def test_the_recommendation_of_a_search(capsys, monkeypatch):
    """The command to train with: the user's settings, then those found."""

    def found(config, topology, **options):
        assert config.mesh.slices == 2
        choice = search.Choice(fsdp=2)
        memory = make.Memory(*[0.0] * 8, 1.0)
        step = step_cost.Step(1, 1, 0, 1, 1, 1, 0.1, 0.1, [], [], [], [], [])
        tail = memory, step, 0.0, "", 1, 1.0, "1 steps", 1.0, make.Host(1.0, 1.0, 1)
        plan = make.Plan("m", 8, 1, "none", "ring", "v5e:2x2", 2, 8, 8, {"fsdp": 2}, *tail)
        return search.SearchResult([search.Tried(choice, plan)], 1, 0)

    monkeypatch.setattr(search, "search", found)
    arguments = ["--topology=v5e:2x2", "--slices=2", "--search", "--config.batch_size=64"]
    with pytest.raises(SystemExit) as caught:
        commands.main(["plan", FLAGS[0], *arguments])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert (
        f"python main.py {FLAGS[0]} --config.batch_size=64 --config.mesh.slices=2 "
        f"{search.Choice(fsdp=2).flags}\n"
    ) in said
