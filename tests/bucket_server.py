"""A Google Cloud Storage in the memory of one process, over HTTP on 127.0.0.1.

It speaks as much of the JSON API as gcsfs and TensorStore use. In tests, Server starts it.

    python tests/bucket_server.py --port 0 --bucket NAME --load NAME=DIR  # prints its address
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import hashlib
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
from http.client import HTTPConnection, responses
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

OBJECTS = {"get", "list", "create", "delete"}
RIGHTS = {"all": {*OBJECTS, "bucket"}, "objects": OBJECTS, "read": {"get", "list"}}
RIGHTS |= {"none": set(), "expired": set()}
FAULTS = {401, 403, 404, 429, 500, 503, "reset", "truncate", "stall", "delay"}
REASONS = {401: "authError", 403: "forbidden", 404: "notFound", 412: "conditionNotMet"}
REASONS |= {429: "rateLimitExceeded", 500: "internalError", 503: "backendError"}
MESSAGES = {401: "Invalid Credentials", 416: "Request range not satisfiable"}
PHRASES = {**responses, 308: "Resume Incomplete", 499: "Client Closed Request"}
HASHED = 1 << 20  # a larger object has no hash, like one composed at Google
PAGE = 1000  # names in one listing
CONTROL = "/_control/"  # begins the path of what Server asks: neither counted nor delayed
ENV = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "NO_GCE_CHECK": "true", "EPATH_USE_TF": "0"}
ENV |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "no_proxy": "127.0.0.1,localhost"}
Json = dict[str, Any]
Objects = dict[str, tuple[Json, bytes]]  # metadata and content by name


class Refused(Exception):
    """Status of an answer other than success and, if the usual one does not do, its message."""


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (nobody changes it)

    def text(self, sent: int | None = None) -> bytes:
        """All that goes over the line, or that with only the first bytes of the body."""
        lines = [f"HTTP/1.1 {self.status} {PHRASES[self.status]}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += [f"Content-Length: {len(self.body)}", "", ""]
        return "\r\n".join(lines).encode() + self.body[:sent]


class Request:
    def __init__(self, method: str, target: str, headers: dict[str, str], body: bytes = b""):
        self.method, self.headers, self.body = method, headers, body
        self.path, _, query = target.partition("?")
        self.query = dict(parse_qsl(query, keep_blank_values=True))
        self.line = f"{method} {unquote(target)}"


class Storage:
    """Buckets, and an HTTP service of them with faults, a log and counts.

    Attributes:
      stats: bytes, connections, and requests by kind. A read is one for content, and a read_whole
        such a one without a range; stat and stat_missing ask for metadata; a write is to make an
        object, a write_part is any other step of an upload; denied is what rights forbid.
    """

    def __init__(self, seed: int):
        self.buckets: dict[str, Objects] = {}
        self.rights: dict[str, str] = {}
        self.uploads: dict[str, tuple] = {}  # of one that is complete, the reply
        self.stats: collections.Counter[str] = collections.Counter()
        self.log: collections.deque[Json] = collections.deque(maxlen=50_000)
        self.generation, self.latency, self.faults = 0, 0.0, []
        self.chance = random.Random(seed)

    def answer(self, r: Request) -> Reply:
        try:
            return self.route(r)
        except Refused as error:
            return problem(*error.args)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            return problem(400, f"Bad request: {r.line[:200]}: {error!r}")

    def route(self, r: Request) -> Reply:
        way, _, path = r.path.partition("/storage/v1")
        match r.method + way, [unquote(part) for part in path.split("/")[1:]]:
            case "GET" | "GET/download", ["b", bucket, "o", name]:
                return self.get(r, bucket, name, bool(way) or r.query.get("alt") == "media")
            case "GET", ["b", bucket, "o"]:
                return self.page(r.query, self.open(bucket, "list"))
            case "DELETE", ["b", bucket, "o", name]:
                objects = self.open(bucket, "delete")
                self.stats["delete"] += 1
                find(objects, name, r.query)
                del objects[name]
                return Reply(204)
            case "PATCH", ["b", bucket, "o", name]:
                return self.patch(r, find(self.open(bucket, "create"), name, r.query)[0])
            case "POST", ["b", bucket, "o", name, "compose"]:
                return self.compose(r, bucket, name)
            case "POST", ["b", bucket, "o", name, "moveTo", "o", new]:
                self.open(bucket, "delete")
                return self.copy(r, "move", bucket, name, bucket, new)
            case "POST", ["b", bucket, "o", name, how, "b", to, "o", new]:
                return self.copy(r, how, bucket, name, to, new)
            case "POST/upload" | "PUT/upload" | "DELETE/upload", ["b", bucket, "o"]:
                return self.proceed(r) if "upload_id" in r.query else self.upload(r, bucket)
            case "POST/batch", []:
                return self.batch(r)
            case "GET", ["b"]:
                self.stats["bucket"] += 1
                items = [{"kind": "storage#bucket", "name": name} for name in self.buckets]
                return as_json({"kind": "storage#buckets", "items": items})
            case "GET", ["b", bucket, *_]:
                self.open(bucket, "bucket")
                self.stats["bucket"] += 1
                return as_json({"kind": "storage#bucket", "name": bucket, "location": "US"})
        raise Refused(404, f"Not Found: {r.line[:200]}")

    def open(self, bucket: str, *operations: str) -> Objects:
        """The objects of a bucket, if its rights allow the operations."""
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        rights = self.rights.get(bucket, "all")
        for operation in set(operations) - RIGHTS[rights]:
            self.stats["denied"] += 1
            if rights == "expired":
                raise Refused(401)
            right = "buckets.get" if operation == "bucket" else f"objects.{operation}"
            denied = f"Permission 'storage.{right}' denied on resource (or it may not exist)."
            raise Refused(403, f"Caller does not have storage.{right} access. {denied}")
        return self.buckets[bucket]

    def put(self, bucket: str, name: str, data: bytes, sent: Json) -> Json:
        """Make an object; its metadata."""
        self.generation = max(self.generation + 1, time.time_ns() // 1000)
        about = {"contentType": "application/octet-stream", "storageClass": "STANDARD"}
        about |= {key: value for key, value in sent.items() if value is not None}
        about |= {"kind": "storage#object", "id": f"{bucket}/{name}/{self.generation}"}
        about |= {"bucket": bucket, "name": name, "size": str(len(data)), "metageneration": "1"}
        about |= {"generation": str(self.generation), "etag": f"CL{self.generation}EAE="}
        about |= {"timeCreated": now(), "updated": now(), "md5Hash": md5(data)}
        self.buckets[bucket][name] = {k: v for k, v in about.items() if v is not None}, data
        return self.buckets[bucket][name][0]

    def write(self, kind: str, bucket: str, name: str, data: bytes, sent: Json, query: Json) -> Json:
        """Make an object, if rights and conditions allow it."""
        objects = self.open(bucket, "create")
        self.stats[kind] += 1
        check(objects, name, query)
        self.open(bucket, *["delete"] * (name in objects))
        return self.put(bucket, name, data, sent)
