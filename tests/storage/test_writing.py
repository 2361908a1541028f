"""clip_jax.storage.writing: the same for local paths and a bucket."""

import numpy as np
import pytest

from clip_jax.storage import locations, ranges, writing

DATA = np.random.default_rng(0).bytes(300_000)


def test_whole_or_not_there(place):
    with writing.replacing(place / "a") as temporary:
        temporary.write_bytes(DATA)
    with pytest.raises(KeyError), writing.replacing(place / "b") as temporary:  # noqa: PT012
        temporary.write_bytes(DATA)
        raise KeyError
    with writing.replacing_folder(place / "folder") as temporary:
        (temporary / "in").mkdir(parents=True)
        (temporary / "in" / "c").write_bytes(b"c")
    with pytest.raises(KeyError), writing.replacing_folder(place / "other") as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "d").write_bytes(b"d")
        raise KeyError
    assert locations.tree(place) == ["a", "folder/in/c"]
    assert ranges.read(place / "a") == DATA


def test_files_that_grow(place):
    growing = writing.Growing(place / "logs")
    for line in ("one\n", "two\n"):
        with (growing.local / "log").open("a") as file:
            file.write(line)
        growing.flush()
        assert ranges.read(place / "logs" / "log").decode().endswith(line)
    with (growing.local / "log").open("a") as file:
        file.write("three\n")
    growing.close()
    assert ranges.read(place / "logs" / "log") == b"one\ntwo\nthree\n"


def test_logs_outlive_an_outage(bucket, remote, hurry, caplog):
    growing = writing.Growing(remote)
    (growing.local / "log").write_text("one\n")
    bucket.faults([{"match": "POST", "kind": 403}])
    growing.flush()
    assert "not there yet" in caplog.text
    bucket.faults([])
    growing.close()
    assert bucket.get("bucket", f"{remote.name}/log") == b"one\n"
