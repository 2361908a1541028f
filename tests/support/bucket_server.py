"""A Google Cloud Storage in the memory of one process, over HTTP on 127.0.0.1.

It speaks as much of the JSON API as gcsfs and TensorStore use. In tests, Server starts it.

    # Prints its address.
    python tests/support/bucket_server.py --port 0 --bucket NAME --load NAME=DIR
"""

import argparse
import asyncio
import collections
import contextlib
import json
import math
import os
import random
import re
import select
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from bucket_api import RIGHTS, Json, Reply, Request, Storage, as_json, problem

FAULTS = {401, 403, 404, 429, 500, 503, "reset", "truncate", "stall", "delay"}
CONTROL = "/_control/"  # begins the path of what Server asks: neither counted nor delayed
ENV = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "NO_GCE_CHECK": "true", "EPATH_USE_TF": "0"}
ENV |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "no_proxy": "127.0.0.1,localhost"}
ENV |= {"FSSPEC_GCS_TOKEN": "anon"}


async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in rest)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    if "expect" in headers:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int((await reader.readline()).partition(b";")[0], 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        body = b"".join(parts)
        await reader.readline()
    method, target, _ = first.split()
    return Request(method, target, headers, body)


class Service:
    """HTTP around a storage, with faults, a log and latency."""

    def __init__(self, storage: Storage, seed: int):
        self.storage, self.stats, self.chance = storage, storage.stats, random.Random(seed)
        self.latency, self.faults = 0.0, []
        self.log: collections.deque[Json] = collections.deque(maxlen=50_000)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection."""
        known, stays = False, True
        with contextlib.suppress(OSError, EOFError):  # the client has gone, or a stall is over
            while stays:
                r = await receive(reader, writer)
                stays = r.headers.get("connection", "").lower() != "close"
                if r.path.startswith(CONTROL):
                    writer.write(self.control(r).text())
                    continue
                self.stats.update(requests=1, bytes_in=len(r.body), connections=not known)
                known, fault = True, self.fault(r.line)
                kind, seconds = fault.get("kind"), fault.get("seconds")
                path, _, query = r.line.partition(" ")[2].partition("?")
                entry = {"method": r.method, "path": path, "query": query, "status": kind}
                entry |= {"range": r.headers.get("range", ""), "sent": 0}
                self.log.append(entry)
                if wait := self.latency + (seconds if kind == "delay" else 0):
                    await asyncio.sleep(wait)
                if kind == "stall":
                    await asyncio.wait_for(reader.read(1), seconds)
                    break
                if kind == "reset":
                    linger = (1).to_bytes(8, "little")  # on, for no time at all
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                    break
                reply = problem(kind) if isinstance(kind, int) else self.storage.answer(r)
                sent = len(reply.body) // (2 if kind == "truncate" else 1)
                stays = stays and kind != "truncate"
                entry |= {"status": reply.status, "sent": sent}
                self.stats["bytes_out"] += sent
                writer.write(reply.text(sent))  # in one piece, so that no packet waits for another
                await writer.drain()
        writer.close()

    def fault(self, line: str) -> Json:
        """The first fault that meets a request, if any does."""
        for fault in self.faults:
            due = fault["count"] > 0 and time.monotonic() < fault["until"]
            if due and re.search(fault["match"], line) and self.chance.random() < fault["p"]:
                fault["count"] -= 1
                self.stats[f"fault_{fault['kind']}"] += 1
                return fault
        return {}

    def control(self, r: Request) -> Reply:
        """Do what a method of Server asks with a line of JSON and, maybe, content after it."""
        line, _, data = r.body.partition(b"\n")
        given, value, storage = json.loads(line), None, self.storage
        objects = storage.buckets.get(given.get("bucket"), {})
        match r.path.removeprefix(CONTROL):
            case "faults" if {fault["kind"] for fault in given["faults"]} <= FAULTS:
                rest = {"match": "", "p": 1, "count": math.inf}
                self.faults = [{**rest, **fault} for fault in given["faults"]]
                for fault in self.faults:
                    fault["until"] = time.monotonic() + fault.get("for", math.inf)
            case "latency":
                self.latency = given["seconds"]
            case "rights" if given["rights"] in RIGHTS:
                storage.rights[given["bucket"]] = given["rights"]
            case "put" if given["bucket"] in storage.buckets:
                storage.put(given["bucket"], given["name"], data, {})
            case "delete" if given["name"] in objects:
                del objects[given["name"]]
            case "get" if given["name"] in objects:
                return Reply(200, objects[given["name"]][1])
            case "names":
                value = sorted(name for name in objects if name.startswith(given["prefix"]))
            case "stats" | "log" as what:
                value = dict(self.stats) if what == "stats" else list(self.log)
                if given["reset"]:
                    (self.stats if what == "stats" else self.log).clear()
            case what:
                return problem(400, f"{what} {given}")
        return as_json(value)


class Server:
    """The program in a process of its own, for as long as a with statement lasts.

    Attributes:
      url: its address.
      env: the environment variables that lead clients to it.
    """

    def __init__(self, *buckets: str, load: dict[str, Path] | None = None, seed: int = 0):
        self.command = [sys.executable, __file__, "--watch_stdin", f"--seed={seed}"]
        self.command += [f"--bucket={bucket}" for bucket in buckets]
        self.command += [f"--load={bucket}={folder}" for bucket, folder in (load or {}).items()]

    def __enter__(self) -> "Server":
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError("the bucket server did not start")
        hosts = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
        self.env = {**ENV, **dict.fromkeys(hosts, self.url)}
        return self

    def __exit__(self, *_: object) -> None:
        with self.process as process:
            process.kill()

    def faults(self, faults: list[Json]) -> None:
        """Replace the faults. Of each request the first that applies is taken:

        {"kind": of FAULTS, "match": regular expression, searched in "METHOD /path?query", decoded,
        "p": probability, "count": how often, "for": seconds from now, "seconds": how long a delay
        or a stall takes}. All but kind, and seconds of a delay, may be left out.
        """
        self.ask("faults", faults=faults)

    def latency(self, seconds: float) -> None:
        """Let every answer wait; those of several connections wait at the same time."""
        self.ask("latency", seconds=seconds)

    def rights(self, bucket: str, rights: str) -> None:
        """Allow only some operations: one of RIGHTS."""
        self.ask("rights", bucket=bucket, rights=rights)

    def stats(self, reset: bool = False) -> collections.Counter[str]:
        return collections.Counter(json.loads(self.ask("stats", reset=reset)))

    def requests(self, reset: bool = False) -> list[Json]:
        """The latest requests: method, path, query, range, status and bytes of the body sent."""
        return json.loads(self.ask("log", reset=reset))

    def put(self, bucket: str, name: str, data: bytes) -> None:
        self.ask("put", data, bucket=bucket, name=name)

    def get(self, bucket: str, name: str) -> bytes:
        return self.ask("get", bucket=bucket, name=name)

    def delete(self, bucket: str, name: str) -> None:
        self.ask("delete", bucket=bucket, name=name)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        return json.loads(self.ask("names", bucket=bucket, prefix=prefix))

    def ask(self, what: str, data: bytes = b"", **given: Any) -> bytes:
        with contextlib.closing(HTTPConnection(self.url.removeprefix("http://"))) as connection:
            connection.request("POST", CONTROL + what, json.dumps(given).encode() + b"\n" + data)
            reply = connection.getresponse()
            body = reply.read()
        if reply.status != 200:
            raise ValueError(body.decode())
        return body


def end_with_parent() -> None:
    """End the program once its parent has ended or has closed its standard input."""
    parent = os.getppid()
    while os.getppid() == parent:
        if select.select([0], [], [], 1)[0] and not os.read(0, 1 << 16):
            break
    os._exit(0)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--bucket", action="append", default=[], help="an empty one; repeatable")
    parser.add_argument("--load", action="append", default=[], help="NAME=DIR: one of a folder")
    parser.add_argument("--seed", type=int, default=0, help="of faults with a probability")
    parser.add_argument("--watch_stdin", action="store_true", help=end_with_parent.__doc__)
    args = parser.parse_args()
    if args.watch_stdin:
        threading.Thread(target=end_with_parent, daemon=True).start()
    storage = Storage()
    storage.buckets |= {bucket: {} for bucket in args.bucket}
    for bucket, folder in (pair.split("=", 1) for pair in args.load):
        storage.buckets.setdefault(bucket, {})
        for path in filter(Path.is_file, sorted(Path(folder).rglob("*"))):
            name = path.relative_to(folder).as_posix()
            storage.put(bucket, name, path.read_bytes(), {})
    listen = {"host": "127.0.0.1", "port": args.port, "limit": 1 << 20, "backlog": 1024}
    server = await asyncio.start_server(Service(storage, args.seed).serve, **listen)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
