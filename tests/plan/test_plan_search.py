"""Programs that do not fit, suggestions that would, and the search for the fastest settings."""

import dataclasses
import functools
import json

import jax
import pytest
from ml_collections import ConfigDict
from tiny_plan import TINY, V5E_8, needs_compiler, tiny_config

from clip_jax.configs import rn50, vit_b32
from clip_jax.errors import UserError
from clip_jax.models import layers
from clip_jax.models.sizes import SIZES, Size
from clip_jax.plan import estimate, make, search, step_cost, suggest, table, topology
from clip_jax.training import program

# ---- Programs that do not fit ------------------------------------------------------------------


@pytest.fixture(scope="module")
def too_large() -> tuple[ConfigDict, make.Plan]:
    config = tiny_config(**{"batch_size": 2**18})
    return config, make.make_plan(config, V5E_8, examples=1e6)


@needs_compiler
def test_too_large(too_large):
    _, found = too_large
    assert not found.fits
    assert found.step is None
    assert found.missing > 1e9
    assert "RESOURCE_EXHAUSTED" in found.report
    assert "DOES NOT FIT" in table.format_plan(found)
    assert json.loads(json.dumps(found.to_json()))["fits"] is False


@needs_compiler
def test_suggestions(too_large):
    config, found = too_large
    lines = suggest.suggestions(config, V5E_8, found)
    assert 2 <= len(lines) <= 8
    assert any("--config.loss.method=ring" in line for line in lines)
    assert all(line.startswith(("--config", "as it is", "These")) for line in lines)


@pytest.mark.parametrize(
    ("report", "temporaries", "missing"),
    [
        (
            "the total memory required for HLO temporaries (34.00G) exceeds available HBM (15.75G)",
            34.0,
            19.25,
        ),
        (
            "Ran out of memory in memory space hbm. Used 41.90G of 15.75G hbm. Exceeded hbm "
            "capacity by 26.15G. Total hbm usage >= 42.15G: reserved 258.00M program 41.90G",
            41.9,
            26.15,
        ),
    ],
)
def test_reading_the_compilers_report(report, temporaries, missing):
    gib = 2**30
    memory = make.Memory(0.5 * gib, 0.5 * gib, 0, 0, 0, None, 0, 0, 15.75 * gib)
    assert make.read_shortage(report, memory) == pytest.approx(missing * gib)
    assert memory.temporaries == pytest.approx(temporaries * gib)
    assert not memory.fits


@needs_compiler
def test_a_program_that_the_compiler_refuses(monkeypatch):
    def lower(self, scales):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel\nmore")

    monkeypatch.setattr(program.Program, "lower", lower)
    with pytest.raises(UserError, match=r"not memory: INTERNAL: Mosaic failed.*kernel\."):
        make.make_plan(tiny_config(), V5E_8)


# ---- Search ------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
def test_search_with_the_compiler():
    lines: list[str] = []
    config = tiny_config()
    found = search.search(config, V5E_8, examples=3200, most=2, report=lines.append)
    assert found.best
    assert found.best.seconds == min(t.plan.step.seconds for t in found.tried)
    done = [line for line in lines if line.startswith("[")]
    assert 2 < len(done) == len(found.tried) <= 5
    assert "[1, at most 1 to go" in done[0]
    assert "ETA 0s" in done[1]
    text = search.format_search(found, "python main.py")
    assert found.best.choice.flags in text.splitlines()[-1]
    assert f"{len(done)} combinations compiled, of {found.candidates:,} and their variants" in text
    json.dumps(found.to_json())


@pytest.fixture
def pretended(monkeypatch) -> list[estimate.Choice]:
    """Replaces the compiler: 1.7 times the estimated memory, and speeds of its own."""
    asked: list[estimate.Choice] = []
    speeds = {"none": 1.3, "full": 0.9}

    def make_plan(config, slice_, *, examples, top, images_per_core=1.0):
        choice = estimate.Choice.of(config)
        asked.append(choice)
        task = estimate.Task(SIZES["ViT-B/32"], config.batch_size, 1, 151e6, 12, slice_)
        factor = 1.7 if choice.method == "ring" else 2.5
        memory = make.Memory(
            estimate.resident(choice, task),
            *(0, 0, 0, 0),
            factor * estimate.temporaries(choice, task),
            *(0, 0, slice_.chip.hbm),
        )
        missing = max(memory.peak - memory.available, 0)
        time = estimate.seconds(choice, task) * speeds.get(choice.remat, 1.1)
        step = step_cost.Step(time, time, 0, 1, 1, 1, 0.1, 0.1, [], [], [], [], [])
        where = slice_.name, slice_.slices, slice_.size, slice_.size, {"data": slice_.size}
        about = "m", config.batch_size, choice.accum_steps, choice.remat, choice.method
        tail = missing, "", 10, examples, "10 steps", 1.0, make.Host(1.0, 1.0, 1)
        return make.Plan(*about, *where, memory, step if memory.fits else None, *tail)

    monkeypatch.setattr(search.make, "make_plan", make_plan)
    task = estimate.Task(SIZES["ViT-B/32"], 32768, 1, 151e6, 12, topology.parse_topology("v5e:4x4"))
    monkeypatch.setattr(search, "make_task", lambda *_: task)
    return asked


def test_search_finds_the_fastest_that_fits(pretended):
    """The search agrees with an exhaustive one, at a fraction of the compilations."""
    config, slice_ = vit_b32.get_config().unlock(), topology.parse_topology("v5e:4x4")
    found = search.search(config, slice_, report=lambda line: None)
    compiled = len(pretended)
    everything = [
        search.make.make_plan(choice.apply(config), slice_, examples=1, top=1)
        for choice in search.candidates(search.make_task())
    ]
    fastest = min(plan.step.seconds for plan in everything if plan.fits)
    assert found.best.seconds <= 1.05 * fastest
    assert compiled == len(found.tried) <= 27 < len(everything) == found.candidates
    assert not all(tried.plan.fits for tried in found.tried)
    text = search.format_search(found, "x")
    assert "does not fit" in text


def test_search_keeps_to_its_budget(pretended):
    config, slice_ = vit_b32.get_config().unlock(), topology.parse_topology("v5e:4x4")
    found = search.search(config, slice_, minutes=0.0, report=lambda line: None)
    assert len(pretended) == 1
    assert found.left > 0
    assert "a larger --search_minutes" in search.format_search(found, "x")


def test_candidates_divide():
    size = Size(**{**TINY, "text_heads": 4})
    task = estimate.Task(size, 96, 1, 1e6, 12, V5E_8)
    found = list(search.candidates(task))
    assert {c.tensor for c in found} == {1, 2}
    assert {c.accum_steps for c in found if c.tensor == 1} == {1, 2, 4}
    assert {c.fsdp for c in found if c.tensor == 2} == {1, 2, 4}
    assert len(set(found)) == len(found)
    assert not list(search.candidates(estimate.Task(size, 97, 1, 1e6, 12, V5E_8)))


def test_estimates_move_the_right_way():
    task = estimate.Task(SIZES["ViT-B/32"], 32768, 1, 151e6, 12, topology.parse_topology("v5e:4x4"))
    plain = estimate.Choice()
    need = functools.partial(estimate.Correction().need, task=task)
    assert need(estimate.Choice(accum_steps=4)) < need(plain)
    assert need(estimate.Choice(remat="full")) < need(estimate.Choice(remat="dots_saveable"))
    assert need(estimate.Choice(method="ring")) < need(plain)
    assert need(estimate.Choice(fsdp=4)) < need(plain)
    slower = functools.partial(estimate.seconds, task=task)
    assert slower(estimate.Choice(remat="full")) > slower(plain)
    assert slower(estimate.Choice(accum_steps=2)) > slower(plain)


def test_a_correction_learns():
    task = estimate.Task(SIZES["ViT-B/32"], 32768, 1, 151e6, 12, topology.parse_topology("v5e:4x4"))
    plain, correction = estimate.Choice(), estimate.Correction()
    estimated = estimate.temporaries(plain, task)
    correction.learn(plain, task, 2 * estimated, 1.0)
    assert correction.need(plain, task) > 2 * estimated
    assert correction.time(plain, task) == pytest.approx(1.0)
    correction.learn(plain, task, estimated)  # the compiler gave up early: at least that much
    assert correction.need(plain, task) > 2 * estimated


@needs_compiler
def test_resnets_are_planned():
    assert estimate.activations(SIZES["RN50"], 1) > estimate.activations(SIZES["ViT-B/32"], 1)
    config = rn50.get_config("smoke").unlock()
    task = search.make_task(config, V5E_8, 3200)
    assert task.size.is_resnet
    assert {c.tensor for c in search.candidates(task)} >= {1, 2}


@pytest.mark.slow
def test_the_fastest_is_tried_with_other_text_towers_and_unrolled_layers(pretended):
    config, slice_ = vit_b32.get_config().unlock(), topology.parse_topology("v5e:4x4")
    found = search.search(config, slice_, report=lambda line: None)
    *others, last = pretended
    assert {choice.scan for choice in others} == {True}
    assert dataclasses.replace(last, scan=True) in others
    best = found.best.choice
    varied = [c for c in pretended if dataclasses.replace(c, text_remat="", scan=True) == best]
    assert {"", "none", "full"} == {choice.text_remat for choice in varied}
    assert f"--config.model.scan_layers={best.scan}" in best.flags


def test_remat_policies_are_those_of_the_models():
    names = estimate.remats()
    assert {"none", "full", "dots_saveable"} <= set(names)
    assert set(names) <= {"none", *layers.POLICIES}
    assert "nothing_saveable" not in names  # the same as full
