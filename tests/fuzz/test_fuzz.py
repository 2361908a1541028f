"""Damaged files: only the package's own errors and counted skips. fuzzer.py tries more by hand."""

import fuzzer
import numpy as np
import pytest
import targets


@pytest.mark.parametrize("seed", [0])
def test_no_damage_is_a_surprise(seed):
    findings = fuzzer.supervise(targets.QUICK, seed, 0, 240)
    assert not findings, "\n\n".join(findings)


def test_a_finding_is_found(tmp_path, monkeypatch):
    def read(folder):
        (folder.parent / "escaped").write_text("x")
        raise ZeroDivisionError("a defect")

    target = targets.Target(lambda folder: (folder / "a").write_bytes(b"abc" * 99), read)
    monkeypatch.setitem(targets.TARGETS, "defect", target)
    seeds, where = tmp_path / "seeds", tmp_path / "where"
    seeds.mkdir()
    where.mkdir()
    target.make(seeds)
    found = fuzzer.run_case("defect", seeds, 0, 0, where)
    assert "ZeroDivisionError: a defect" in found
    assert "written beside the folder: ['escaped']" in found


def test_cases_repeat():
    data = bytes(range(256)) * 4
    damaged = [fuzzer.damage(data, np.random.default_rng(5), [data]) for _ in range(2)]
    assert damaged[0] == damaged[1] != data
