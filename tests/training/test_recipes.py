"""Configs with several lines, each against figures that its authors give in other units."""

import importlib

import pytest

from clip_jax.common import clock
from clip_jax.configs import conceptual, datacomp, default, metaclip
from clip_jax.errors import UserError
from clip_jax.training import program

LINES = [("datacomp", line) for line in datacomp.SCALES]
LINES += [("metaclip", line) for line in metaclip.MODELS]
LINES += [("conceptual", line) for line in conceptual.LINES]


def get_config(name: str, argument: str):
    return importlib.import_module(f"clip_jax.configs.{name}").get_config(argument)


@pytest.mark.parametrize(("name", "line"), LINES)
def test_every_line(name: str, line: str):
    """Runs once it is told its data; shrinks to embedded data; stands in its docstring."""
    config = get_config(name, line)
    program.make_mesh_and_net(config)
    with pytest.raises(UserError, match="names no training data"):
        default.validate(config)
    config.data.source.type = "tar"
    default.validate(config)
    small = get_config(name, f"{line},smoke")
    default.validate(small)
    assert small.data.source.type == "digits"
    assert small.duration == "20 steps"
    text = importlib.import_module(f"clip_jax.configs.{name}").__doc__
    assert f"\n    {line} " in text
    with pytest.raises(UserError, match=rf"'{line}x'.* one of .*{line}.*smoke"):
        get_config(name, f"{line}x")


def steps(name: str, line: str, examples: int) -> tuple[int, int]:
    config = get_config(name, line)
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
        # By open_clip's own count of CC12M, of whose last batch SLIP drops what is left over.
        ("conceptual", "cc12m", 10_968_539, (35 * 10_968_539 // 4096, 10_968_539 // 4096)),
    ],
)
def test_steps(name: str, line: str, examples: int, expected: tuple[int, int]):
    assert steps(name, line, examples) == pytest.approx(expected, abs=1)
