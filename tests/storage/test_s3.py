"""clip_jax.storage on s3://, against a server of moto in another process."""

import os
import pathlib
import socket
import subprocess
import sys
import time

_S3 = """
import pathlib, sys
from clip_jax.storage import locations, ranges, remote, writing

remote.filesystem("s3://bucket").mkdir("bucket")
place = locations.parse("s3://bucket/folder")
data = bytes(range(256)) * 1000
writing.write(place / "a.bin", data)
with writing.replacing(place / "b.bin") as temporary:
    temporary.write_bytes(data[::-1])
assert locations.expand(f"{place}/*.bin", ".bin") == [place / "a.bin", place / "b.bin"]
stat = locations.stat(place / "b.bin")
assert stat.size == len(data)
assert ranges.start(place / "b.bin", [(5, 3), (250_000, 7)], stat.version)() == [
    data[::-1][5:8], data[::-1][250_000:250_007]
]
writing.write(place / "b.bin", data)
try:
    ranges.start(place / "b.bin", [(5, 3)], stat.version)()
except ranges.Replaced:
    print("replaced")
try:
    locations.expand("s3://buckett/*.bin", ".bin")
except Exception as error:
    print(error)
"""


def test_s3():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    credentials = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    places = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        found = subprocess.run(
            [sys.executable, "-c", _S3],
            cwd=pathlib.Path(__file__).parents[2],
            env={**os.environ, **credentials, **places, "no_proxy": "127.0.0.1"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.kill()
    assert found.returncode == 0, found.stderr
    replaced, sentence = found.stdout.splitlines()
    assert replaced == "replaced"
    assert "no such bucket or object" in sentence
    assert "'buckett'" in sentence
