"""Whole runs with every form of the contrastive loss at once: trained, resumed, evaluated."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny_data
import tiny_run
from shards import write_tar

from clip_jax.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "0.tar"
    members = []
    for i in range(40):
        record = {"caption": [f"picture {i}", f"number {i}"], "alt": f"{i}", "score": i % 4}
        image = tiny_data.encoded(tiny_data.picture(i))
        members += [(f"{i:02}.png", image), (f"{i:02}.json", json.dumps(record).encode())]
    write_tar(path, members)
    return path


def config(shard, **overrides):
    return tiny_run.config(
        {
            "data.source.type": "tar",
            "data.source.path": str(shard),
            "data.source.text_key": "caption:2,alt",
            "data.source.weight_key": "score",
            "data.captions": 2,
            "loss.label_smoothing": 0.1,
            "loss.widths": (4, 8),
            "loss.captioning": 2.0,
            "loss.views": 0.5,
            "model.packing.length": 0,
            "duration": "8 steps",
            "checkpoint.every": "4 steps",
            **overrides,
        }
    )


@pytest.fixture(scope="module")
def finished(shard):
    workdir = tiny_run.folder() / "losses"
    with tiny_run.compile_once():
        final = train.train(config(shard), workdir)
    return workdir, final


def test_it_learns_and_is_evaluated_as_any_other(finished):
    workdir, final = finished
    rows = [row for row in tiny_run.read_rows(workdir) if "train/loss" in row]
    guess = math.log(16) + math.log(2) / 2  # nats of each width
    assert 3 * guess - 0.5 < rows[0]["train/loss/contrastive"] < 5 * guess
    assert rows[0]["train/loss/captioning"] == pytest.approx(math.log(49_408), rel=0.1)
    assert math.log(31) - 1 < rows[0]["train/loss/views"] < 2 * math.log(31)  # of 31 other views
    for row in rows:
        terms = [row[f"train/loss/{name}"] for name in ("contrastive", "captioning", "views")]
        assert row["train/loss"] == pytest.approx(np.dot(terms, (1, 2, 0.5)), rel=1e-6)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 1
    assert "zeroshot/top1" in final


def test_resuming_ends_in_the_same_bits(finished, shard, tmp_path):
    whole, _ = finished
    copy = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints/8")
    with tiny_run.compile_once():
        train.train(config(shard), copy)
    assert tiny_run.learned(copy) == tiny_run.learned(whole)
    tiny_run.assert_same_checkpoint(copy, whole, 8)


def test_in_pieces_by_a_ring_and_from_processes(finished, shard, tmp_path):
    overrides = {"accum_steps": 2, "loss.method": "ring", "mesh.fsdp": 2, "data.processes": 2}
    train.train(config(shard, **overrides), tmp_path / "run")
    wanted, found = (
        [row["train/loss"] for row in tiny_run.read_rows(workdir) if "train/loss" in row]
        for workdir in (finished[0], tmp_path / "run")
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
