"""Runs the commands of docs/storage.md as they are written, with a server in place of the bucket.

It needs what requirements.txt installs and no more: .ci/run calls it before anything else is there.

    python tests/support/bucket_commands.py
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

from bucket_server import Server

ROOT = pathlib.Path(__file__).parents[2]
PAGE = "docs/storage.md"
TITLE = "From bucket to bucket"
# What the commands leave in the bucket, at least.
LEFT = (
    "shards/00000.tar",
    "shards/clip_jax.tar.index",
    "runs/b32/config.json",
    "runs/b32/metrics.jsonl",
    "runs/b32/report.html",
    "runs/b32/checkpoints/20/commit_success.txt",
    "runs/b32/evaluation-20/report.html",
    "embeddings/embeddings.json",
    "for_transformers/config.json",
    "for_transformers/model.safetensors",
    "exported/clip_jax.json",
)


def commands() -> list[list[str]]:
    """The commands of the section, split as a shell would."""
    text = (ROOT / PAGE).read_text()
    section = text.partition(f"## {TITLE}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def main() -> None:
    found = commands()
    assert len(found) >= 9, found
    with Server("bucket") as server, tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, **server.env, "JAX_PLATFORMS": "cpu", "HOME": empty}
        environment["PYTHONPATH"] = str(ROOT)
        for program, *arguments in found:
            assert program == "python", program
            arguments = [argument.replace("BUCKET", "bucket") for argument in arguments]
            print("+ python", shlex.join(arguments), flush=True)
            began = time.monotonic()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=True)
            print(f"({time.monotonic() - began:.0f} s)", flush=True)
        names = server.names("bucket")
        missing = [name for name in LEFT if name not in names]
        assert not missing, f"{missing} are not among {names}"
        assert not list(ROOT.glob("gs:*")), "something was written to a local folder"
        requests = server.stats()["requests"]
        print(f"{len(found)} commands, {len(names)} objects, {requests} requests.")


if __name__ == "__main__":
    main()
