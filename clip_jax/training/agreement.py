"""The agreement of the hosts of a run, before its first step: else each trains something else.

Each check is called by all hosts, and where they differ all raise the same error.
"""

import hashlib
import json
import pathlib
import secrets
import socket
import time

import jax
from etils import epath
from ml_collections import ConfigDict

from clip_jax.common import hosts
from clip_jax.data import identity
from clip_jax.errors import UserError
from clip_jax.storage import ranges, writing
from clip_jax.training import workdir

_SEEN_WITHIN = 5.0  # seconds in which a file of another host must be seen
# Settings that may differ between hosts: resources of the host, and where its data lie. Whether
# these are the same is compared by themselves.
_OWN = ("compilation_cache", "data.threads", "data.processes", "data.prefetch")
_OWN += ("data.source.path",)


def check_program(config: ConfigDict) -> None:
    """Checks that all hosts run the same code with the same settings.

    Raises:
      UserError: names a host that does not, and the difference.
    """
    plain = workdir.flatten(workdir.to_plain(config))
    settings = {name: value for name, value in plain.items() if not _is_own(name)}
    versions = {"jax": jax.__version__, "the code of clip_jax": _code()}
    texts = hosts.gather(json.dumps([versions, settings]))
    first = json.loads(texts[0])
    for host, text in enumerate(texts):
        for what, own, other in zip(("versions", "settings"), json.loads(text), first):
            names = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
            if not names:
                continue
            listed = "; ".join(f"{n} is {own.get(n)!r}, on host 0 {other.get(n)!r}" for n in names)
            remedy = (
                "Install the same version of clip_jax and JAX on every host."
                if what == "versions"
                else "Start the same command on every host; only --process differs."
            )
            raise UserError(f"Host {host} runs with other {what} than host 0: {listed}. {remedy}")


def _is_own(name: str) -> bool:
    return name in _OWN or (name.startswith("data.mixture.") and name.endswith(".path"))


def _code() -> str:
    """Returns a digest of the package's code: working copies differ under one version."""
    root = pathlib.Path(__file__).parents[1]  # the package
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_workdir(directory: epath.Path) -> None:
    """Checks that all hosts see one workdir, by a file that the first writes into it.

    Raises:
      UserError: names the hosts that do not.
    """
    own = {"token": secrets.token_hex(8), "name": socket.gethostname()}
    if jax.process_index() == 0:
        writing.write(directory / f"hosts-{own['token']}", own["token"].encode())
    told = [json.loads(text) for text in hosts.gather(json.dumps(own))]
    token = told[0]["token"]
    path = directory / f"hosts-{token}"
    seen = [text == "seen" for text in hosts.gather("seen" if _holds(path, token) else "")]
    if jax.process_index() == 0:
        writing.remove(path)
    if not all(seen):
        blind = ", ".join(f"{i} ({told[i]['name']})" for i, yes in enumerate(seen) if not yes)
        raise UserError(
            f"The hosts do not share the workdir {directory}: what host 0 ({told[0]['name']}) "
            f"wrote there is not seen by host {blind}. All of them write parts of one checkpoint: "
            "give a --workdir that every host sees, such as a network directory or gs://BUCKET/RUN."
        )


def _holds(path: epath.Path, token: str) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            return ranges.read(path).decode() == token
        except (OSError, UserError):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def check_data(data: identity.Identity) -> None:
    """Checks that all hosts found the same training data.

    Raises:
      UserError: names a host that did not, and the difference.
    """
    texts = hosts.gather(json.dumps(data))
    for host, text in enumerate(texts):
        where = "on host 0", f"on host {host}"
        if found := identity.differences(json.loads(texts[0]), json.loads(text), where):
            raise UserError(
                f"Host {host} finds other training data than host 0: {'; '.join(found)}. Give "
                "every host the same files, in a network directory or a bucket."
            )
