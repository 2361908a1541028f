"""Configs with several lines, each against figures that its authors give in other units."""

import importlib

import pytest
from ml_collections import ConfigDict

from clip_jax import models
from clip_jax.common import clock
from clip_jax.configs import (
    clipa,
    conceptual,
    datacomp,
    default,
    metaclip,
    mobileclip,
    openmammut,
    openvision,
    reference,
)
from clip_jax.errors import UserError
from clip_jax.training import program, validation

LINES = [("datacomp", line) for line in datacomp.SCALES]
LINES += [("metaclip", line) for line in metaclip.MODELS]
LINES += [("conceptual", line) for line in conceptual.LINES]
LINES += [("clipa", line) for line in clipa.MODELS]
LINES += [("mobileclip", line) for line in mobileclip.LINES]
LINES += [("openvision", line) for line in openvision.MODELS]
LINES += [("openmammut", line) for line in openmammut.MODELS]
LINES += [("reference", line) for line in reference.LINES if line != "digits"]


def get_config(name: str, argument: str) -> ConfigDict:
    return importlib.import_module(f"clip_jax.configs.{name}").get_config(argument)


@pytest.mark.parametrize(("name", "line"), LINES)
def test_every_line(name: str, line: str):
    """Runs once it is told its data; shrinks to embedded data; stands in its docstring."""
    config = get_config(name, line)
    program.make_mesh_and_net(config)
    with pytest.raises(UserError, match="names no training data"):
        validation.validate(config)
    config.data.source.type = "tar"
    validation.validate(config)
    small = get_config(name, f"{line},smoke")
    validation.validate(small)
    assert small.data.source.type == "digits"
    assert small.duration == "20 steps"
    text = importlib.import_module(f"clip_jax.configs.{name}").__doc__
    assert f"\n    {line} " in text
    with pytest.raises(UserError, match=rf"'{line}x'.* one of .*{line}.*smoke"):
        get_config(name, f"{line}x")


def steps(config: ConfigDict, examples: int = 0) -> tuple[int, int]:
    """The length of a run and of its warm-up, on a set of so many examples."""
    total = clock.to_steps(
        config.duration, batch_size=config.batch_size, examples_per_epoch=examples
    )
    warmup = clock.to_steps(
        config.optim.warmup,
        batch_size=config.batch_size,
        examples_per_epoch=examples,
        total_steps=total,
    )
    return total, warmup


@pytest.mark.parametrize(
    ("name", "line", "examples", "expected"),
    [
        # By DataComp's tables: samples seen by batch.
        ("datacomp", "small", 0, (12_800_000 // 4096, 500)),
        ("datacomp", "medium", 0, (31_250, 500)),
        ("datacomp", "large", 0, (156_250, 500)),
        ("datacomp", "xlarge", 0, (142_045, 10_000)),
        # By MetaCLIP's: 32 epochs of 400 million pairs, on 64 GPUs with 512 each.
        ("metaclip", "b32", 0, (32 * 400_000_000 // (64 * 512), 2000)),
        ("metaclip", "l14", 0, (32 * 400_000_000 // (128 * 256), 2000)),
        # By MobileCLIP's: 30 and 200 times 1,000 batches.
        ("mobileclip", "dr12m", 0, (245_760_000 // 8192, 1000)),
        ("mobileclip", "dr1b", 0, (13_107_200_000 // 65_536, 1000)),
        # By the name of a run of openMaMMUT: 12.8 billion pairs, 180,224 at a time.
        ("openmammut", "b32", 0, (12_800_000_000 // 180_224, 6000)),
        # By open_clip's own count of CC12M, of whose last batch SLIP drops what is left over.
        ("conceptual", "cc12m", 10_968_539, (35 * 10_968_539 // 4096, 10_968_539 // 4096)),
    ],
)
def test_steps(name: str, line: str, examples: int, expected: tuple[int, int]):
    assert steps(get_config(name, line), examples) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("line", "warmup"), [("l14", 52_428_800 // 65_536), ("h14", 3200)])
def test_stages_of_clipa(line: str, warmup: int):
    """By its files: as many pairs as 10,000 epochs of ImageNet, then 4 and 1 times 131,072,000."""
    config = get_config("clipa", line)
    stages = [default.of_stage(config, name) for name in config.stages]
    expected = [(10_000 * 1_281_167 // 65_536, warmup), (16_000, 800), (8000, 1600)]
    for stage, each in zip(stages, expected, strict=True):
        assert steps(stage) == pytest.approx(each, abs=1)
        rate = stage.optim.learning_rate / (stage.batch_size / 256)
        assert rate == pytest.approx({84: 8e-6, 224: 4e-7, 336: 1e-7}[side(stage)])
    assert [side(stage) for stage in stages] == [84, 224, 336]


@pytest.mark.parametrize("line", openvision.MODELS)
def test_stages_of_openvision(line: str):
    """By its script: ImageNet's epochs, and rates for 256 examples, in units of 16,384."""
    config = get_config("openvision", line)
    stages = [default.of_stage(config, name) for name in config.stages]
    script = [(10_000, 40, 8e-6, 2), (800, 20, 4e-7, 1), (200, 0, 1e-7, 0.5)]
    for stage, (epochs, warmup, rate, factor) in zip(stages, script):
        batch = int(1024 * 16 * factor)
        expected = (1_281_167 * epochs // batch, 1_281_167 * warmup // batch)
        assert stage.batch_size == batch
        assert steps(stage) == pytest.approx(expected, abs=1)
        assert stage.optim.learning_rate == pytest.approx(rate * 64 * factor)
    assert len(stages) == (2 if line == "h14" else 3)


def side(config: ConfigDict) -> int:
    return models.get_size(config.model.name, config.model.size.to_dict()).image_size
