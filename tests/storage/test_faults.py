"""clip_jax.storage.faults: retries, counts and explanations of the failures of a bucket."""

import logging

import numpy as np
import pytest
from etils import epath

from clip_jax.errors import StorageError, UserError
from clip_jax.storage import faults, locations, ranges, writing

DATA = np.random.default_rng(0).bytes(300_000)

REASONS = {
    503: "HTTP 503",
    429: "HTTP 429",
    "reset": "connection broken",
    "truncate": "connection broken",
}


@pytest.mark.parametrize("kind", REASONS, ids=str)
def test_what_passes_is_waited_out_and_counted(bucket, remote, kind, caplog):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    bucket.faults([{"match": "GET .*file", "kind": kind, "count": 3}])
    with caplog.at_level(logging.WARNING):
        assert ranges.start(remote / "file", [(7, 500)])() == [DATA[7:507]]
    if kind == "reset" and not faults.counts():
        return  # curl itself has asked again, as it does where it had used a connection before
    assert faults.counts()[REASONS[kind]] >= 1
    assert f"Storage: {REASONS[kind]} at {remote}/file" in caplog.text
    assert caplog.text.count(REASONS[kind]) == 1  # not a line each


def test_failures_of_other_requests_are_counted_too(bucket, remote):
    path = locations.parse(remote / "file")
    bucket.faults([{"match": "POST", "kind": 503, "count": 1}])
    writing.write(path, DATA)
    assert ranges.read(path) == DATA
    assert faults.counts() == {"HTTP 503": 1}


def test_silence_is_ended(bucket, remote, monkeypatch):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    monkeypatch.setattr(ranges, "_STALL", 0.3)
    bucket.faults([{"match": "GET", "kind": "stall", "count": 1, "seconds": 20}])
    assert ranges.start(remote / "file", [(0, 5)])() == [DATA[:5]]
    assert faults.counts() == {"no answer": 1}


def test_in_the_end_it_is_a_sentence(bucket, remote, hurry):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    bucket.faults([{"match": "GET", "kind": 503}])
    with pytest.raises(StorageError, match=r"file could not be reached for 1 s.*unavailabl"):
        ranges.start(remote / "file", [(0, 5)])()


def test_no_such_bucket(bucket):
    with pytest.raises(UserError, match=r"no such bucket.*'buckett'"):
        locations.expand("gs://buckett/shards/*.tar", ".tar")


@pytest.mark.parametrize(
    ("rights", "message"),
    [("none", r"lack the right.*Storage Object Viewer"), ("expired", r"refused, or have expired")],
)
def test_no_rights(bucket, remote, rights, message):
    bucket.put("bucket", f"{remote.name}/file", DATA)
    bucket.rights("bucket", rights)
    with pytest.raises(UserError, match=message):
        ranges.start(remote / "file", [(0, 5)])()


def test_read_only(bucket, remote):
    bucket.rights("bucket", "read")
    with pytest.raises(UserError, match=r"lack the right.*Storage Object User"):
        writing.write(remote / "file", DATA)


def test_rights_that_come_back(bucket, remote, caplog):
    """Credentials that expire in mid-run are renewed; whoever had access is waited for."""
    bucket.put("bucket", f"{remote.name}/file", DATA)
    ranges.start(remote / "file", [(0, 5)])()
    bucket.faults([{"match": "GET", "kind": 401, "count": 2}])
    assert ranges.start(remote / "file", [(0, 5)])() == [DATA[:5]]
    assert faults.counts() == {"HTTP 401": 2}


def test_a_missing_local_file_is_no_failure_of_storage(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        ranges.read(epath.Path(tmp_path / "none"))
    assert faults.explained(caught.value) == ""


def test_a_message_that_is_cut_says_so():
    assert faults.first_line(ValueError("one\ntwo")) == "one"
    assert faults.first_line(ValueError()) == "ValueError"
    assert faults.first_line(ValueError("a" * 200)) == "a" * 200
    assert faults.first_line(ValueError("a" * 201)) == "a" * 199 + "…"
