"""A Google Cloud Storage in the memory of one process, over HTTP on 127.0.0.1.

It speaks as much of the JSON API as gcsfs and TensorStore use. As a program,

    python tests/bucket_server.py --port 0 --bucket NAME --load NAME=DIR

prints its address and serves until it is ended. In a test, Server starts that program, and has the
variables that lead clients to it, and the means to fill buckets, take rights away and break things.
"""

import argparse
import asyncio
import base64
import bisect
import collections
import contextlib
import email.utils
import functools
import hashlib
import http
import json
import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

GRANTS = {
    "all": {"get", "list", "create", "delete", "bucket"},
    "objects": {"get", "list", "create", "delete"},
    "read": {"get", "list"},
    "none": set(),
    "expired": set(),
}
FAULTS = {401, 403, 404, 429, 500, 503, "reset", "truncate", "stall", "delay"}
REASONS = {400: "invalid", 401: "authError", 403: "forbidden", 404: "notFound"} | {
    409: "conflict",
    412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
    500: "internalError",
    503: "backendError",
}
PHRASES = {308: "Resume Incomplete", 499: "Client Closed Request"}
# What a client may set of an object's metadata.
SETTABLE = {"contentType", "metadata", "storageClass", "customTime", "cacheControl"} | {
    f"content{part}" for part in ("Encoding", "Disposition", "Language")
}
HASHED = 1 << 20  # a larger object comes without a hash, as a composed one does from Google
PAGE = 1000  # names in a page of a listing, at most
LOGGED = 50_000  # requests remembered
CONTROL = "/_control/"  # what steers the server; neither counted nor delayed


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


class Refused(Exception):
    """An error as the JSON API words it."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        problem = {"message": message, "domain": "global", "reason": REASONS.get(status, "other")}
        body = {"error": {"code": status, "message": message, "errors": [problem]}}
        self.reply = as_json(body, status) if status >= 400 else Reply(status)


class Request(NamedTuple):
    method: str
    path: str  # as sent, so that %2F is not yet a slash
    query: dict[str, str]
    headers: dict[str, str]  # by name in lower case
    body: bytes
    line: str  # "METHOD /path?query", readable

    @classmethod
    def parse(cls, head: str, body: bytes) -> "Request":
        first, *rest = head.rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        path, _, query = target.partition("?")
        pairs = (line.partition(":") for line in rest)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        values = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        line = f"{method} {urllib.parse.unquote(target)}"
        return cls(method, path, values, headers, body, line)


class Blob:
    """One generation of an object."""

    def __init__(self, name: str, data: bytes, generation: int, attributes: dict[str, Any]):
        self.name, self.data, self.generation = name, data, generation
        self.attributes = {"contentType": "application/octet-stream", **attributes}
        self.metageneration = 1
        self.created = self.updated = time.time()

    @functools.cached_property
    def md5(self) -> str | None:
        if len(self.data) > HASHED:
            return None
        return base64.b64encode(hashlib.md5(self.data).digest()).decode()

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        return {
            "Content-Type": self.attributes["contentType"],
            "ETag": f"CL{self.generation}EAE=",
            "Last-Modified": email.utils.formatdate(self.updated, usegmt=True),
            "X-Goog-Generation": str(self.generation),
            "X-Goog-Metageneration": str(self.metageneration),
            "X-Goog-Stored-Content-Length": str(len(self.data)),
        }

    def metadata(self, bucket: str) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{self.name}/{self.generation}",
            "bucket": bucket,
            "name": self.name,
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "size": str(len(self.data)),
            "etag": f"CL{self.generation}EAE=",
            "timeCreated": _rfc3339(self.created),
            "updated": _rfc3339(self.updated),
            "storageClass": "STANDARD",
            **({"md5Hash": self.md5} if self.md5 else {}),
            **self.attributes,
        }


class Bucket:
    def __init__(self, name: str):
        self.name, self.rights = name, "all"
        self.blobs: dict[str, Blob] = {}
        self.names: list[str] = []  # in order

    def put(self, blob: Blob) -> None:
        if blob.name not in self.blobs:
            bisect.insort(self.names, blob.name)
        self.blobs[blob.name] = blob

    def remove(self, name: str) -> None:
        del self.blobs[name], self.names[bisect.bisect_left(self.names, name)]

    def page(self, query: dict[str, str]) -> dict[str, Any]:
        """A page of a listing. Its token is the name that the next page begins with."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        token = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        most = min(int(query.get("maxResults", PAGE)), PAGE)
        items, folders, next_page = [], [], {}
        at = bisect.bisect_left(self.names, max(prefix, query.get("startOffset", ""), token))
        end = query.get("endOffset", "")
        while at < len(self.names) and (name := self.names[at]).startswith(prefix):
            if end and name >= end:
                break
            if len(items) + len(folders) == most:
                next_page = {"nextPageToken": base64.urlsafe_b64encode(name.encode()).decode()}
                break
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                items.append(self.blobs[name].metadata(self.name))
                at += 1
            else:
                folders.append(name[: cut + len(delimiter)])
                at = bisect.bisect_left(self.names, folders[-1] + "\U0010ffff", at)
        found = {"items": items, "prefixes": folders}
        return {"kind": "storage#objects", **{k: v for k, v in found.items() if v}, **next_page}


class Upload:
    """A resumable upload: what has arrived and, when all has, the reply to that."""

    def __init__(self, bucket: str, name: str, attributes: dict[str, Any], query: dict[str, str]):
        self.bucket, self.name, self.attributes, self.query = bucket, name, attributes, query
        self.data, self.reply = bytearray(), None


class Storage:
    """The buckets, and the answers to requests.

    Attributes:
      stats: requests by kind. A read is any request for content, and of these a read_whole is one
        without a range; a stat asks for metadata, and a stat_missing in vain; a write makes an
        object, and a write_part is any other step of a resumable upload; copy, move, delete, list,
        batch; bucket asks for a bucket, not its objects; denied is what rights forbid.
    """

    def __init__(self):
        self.buckets: dict[str, Bucket] = {}
        self.uploads: dict[str, Upload] = {}
        self.stats: collections.Counter[str] = collections.Counter()
        self.generation = 0

    def answer(self, request: Request) -> Reply:
        try:
            return self._route(request)
        except Refused as error:
            return error.reply
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            return Refused(400, f"Bad request: {request.line[:200]}: {error!r}").reply

    def _route(self, r: Request) -> Reply:
        way, *parts = map(urllib.parse.unquote, r.path[1:].split("/"))
        if way == "storage":
            way, parts = "", [way, *parts]
        match r.method, way, parts[2:] if parts[:2] == ["storage", "v1"] else []:
            case "GET", "" | "download", ["b", bucket, "o", name]:
                return self._get(r, bucket, name, media=way or r.query.get("alt") == "media")
            case "GET", "", ["b", bucket, "o"]:
                page = self.open(bucket, "list").page(r.query)
                self.stats["list"] += 1
                return as_json(page)
            case _, "upload", ["b", bucket, "o"]:
                return self._upload(r, bucket)
            case "DELETE", "", ["b", bucket, "o", name]:
                return self._delete(r, bucket, name)
            case "PATCH", "", ["b", bucket, "o", name]:
                return self._patch(r, bucket, name)
            case "POST", "", ["b", a, "o", name, "rewriteTo" | "copyTo" as how, "b", b, "o", to]:
                return self._copy(r, how, self.open(a, "get"), name, self.open(b, "create"), to)
            case "POST", "", ["b", a, "o", name, "moveTo" as how, "o", to]:
                both = self.open(a, "get", "create", "delete")
                return self._copy(r, how, both, name, both, to)
            case "POST", "", ["b", bucket, "o", name, "compose"]:
                return self._compose(r, self.open(bucket, "get", "create"), name)
            case "POST", "batch", []:
                return self._batch(r)
            case "GET", "", ["b"]:
                self.stats["bucket"] += 1
                items = [_bucket_metadata(name) for name in self.buckets]
                return as_json({"kind": "storage#buckets", "items": items})
            case "GET", "", ["b", bucket, *what] if what[:1] != ["o"]:
                self.open(bucket, "bucket")
                self.stats["bucket"] += 1
                return as_json(_bucket_metadata(bucket, *what))
            case "POST" | "DELETE", "", ["b", *_]:
                raise Refused(403, "Caller may not make or delete buckets.")
        raise Refused(404, f"Not Found: {r.line[:200]}")

    def open(self, name: str, *operations: str) -> Bucket:
        """The bucket of the name, where its rights allow the operations."""
        bucket = self.buckets.get(name)
        if bucket is None:
            raise Refused(404, "The specified bucket does not exist.")
        for operation in operations:
            if operation in GRANTS[bucket.rights]:
                continue
            self.stats["denied"] += 1
            if bucket.rights == "expired":
                raise Refused(401, "Invalid Credentials")
            right = "buckets.get" if operation == "bucket" else f"objects.{operation}"
            raise Refused(
                403,
                f"Caller does not have storage.{right} access to the Google Cloud Storage "
                f"{right.partition('s.')[0]}. Permission 'storage.{right}' denied on resource "
                "(or it may not exist).",
            )
        return bucket

    def put(self, bucket: Bucket, name: str, data: bytes, attributes: dict[str, Any]) -> Blob:
        self.generation = max(self.generation + 1, time.time_ns() // 1000)
        blob = Blob(name, data, self.generation, attributes)
        bucket.put(blob)
        return blob

    def _find(self, bucket: Bucket, name: str, query: dict[str, str], key="generation") -> Blob:
        blob = bucket.blobs.get(name)
        if blob is None or query.get(key, str(blob.generation)) != str(blob.generation):
            raise Refused(404, f"No such object: {bucket.name}/{name}")
        return blob

    def _write(
        self,
        bucket: Bucket,
        name: str,
        data: bytes,
        attributes: dict[str, Any],
        query: dict[str, str],
    ) -> dict[str, Any]:
        """Make an object, if the query's conditions hold; its metadata."""
        held = bucket.blobs.get(name)
        _check(held, query)
        if held:
            self.open(bucket.name, "delete")
        return self.put(bucket, name, data, attributes).metadata(bucket.name)

    def _get(self, r: Request, bucket: str, name: str, media: bool) -> Reply:
        opened, range_ = self.open(bucket, "get"), r.headers.get("range")
        if media:
            self.stats["read"] += 1
            self.stats["read_whole"] += not range_
        else:
            self.stats["stat" if name in opened.blobs else "stat_missing"] += 1
        blob = self._find(opened, name, r.query)
        _check(blob, r.query, unchanged=304)
        if not media:
            return as_json(blob.metadata(bucket))
        size, match = len(blob.data), re.fullmatch(r"bytes=(\d*)-(\d*)", range_ or "")
        if match is None:
            hashed = {"X-Goog-Hash": f"md5={blob.md5}"} if blob.md5 else {}
            return Reply(200, blob.data, {**blob.headers, **hashed})
        first, last = match.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise Refused(416, "Request range not satisfiable")
        place = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return Reply(206, blob.data[start:stop], {**blob.headers, **place})

    def _delete(self, r: Request, bucket: str, name: str) -> Reply:
        opened = self.open(bucket, "delete")
        self.stats["delete"] += 1
        _check(self._find(opened, name, r.query), r.query)
        opened.remove(name)
        return Reply(204)

    def _patch(self, r: Request, bucket: str, name: str) -> Reply:
        blob = self._find(self.open(bucket, "create"), name, r.query)
        _check(blob, r.query)
        self.stats["patch"] += 1
        change = _attributes(json.loads(r.body))
        if isinstance(change.get("metadata"), dict):
            merged = {**blob.attributes.get("metadata", {}), **change["metadata"]}
            change["metadata"] = {k: v for k, v in merged.items() if v is not None}
        blob.attributes = {k: v for k, v in {**blob.attributes, **change}.items() if v is not None}
        blob.metageneration, blob.updated = blob.metageneration + 1, time.time()
        blob.__dict__.pop("headers", None)
        return as_json(blob.metadata(bucket))

    def _copy(
        self, r: Request, how: str, source: Bucket, name: str, target: Bucket, to: str
    ) -> Reply:
        self.stats["move" if how == "moveTo" else "copy"] += 1
        blob = self._find(source, name, r.query, "sourceGeneration")
        made = self._write(target, to, blob.data, blob.attributes, r.query)
        if how == "moveTo" and name != to:
            source.remove(name)
        if how != "rewriteTo":
            return as_json(made)
        size = str(len(blob.data))
        sizes = {"totalBytesRewritten": size, "objectSize": size}
        return as_json(
            {"kind": "storage#rewriteResponse", **sizes, "done": True, "resource": made}
        )

    def _compose(self, r: Request, bucket: Bucket, name: str) -> Reply:
        self.stats["copy"] += 1
        wanted = json.loads(r.body)
        pieces = [self._find(bucket, s["name"], s).data for s in wanted["sourceObjects"]]
        if not 1 <= len(pieces) <= 32:
            raise Refused(400, "The number of source components must be between 1 and 32.")
        attributes = _attributes(wanted.get("destination", {}))
        return as_json(self._write(bucket, name, b"".join(pieces), attributes, r.query))

    def _upload(self, r: Request, bucket: str) -> Reply:
        if "upload_id" in r.query:
            return self._proceed(r)
        opened = self.open(bucket, "create")
        attributes, content = {"contentType": r.headers.get("content-type")}, r.body
        how = r.query["uploadType"]
        if how == "multipart":
            sent, kind, content = _related(r)
            attributes = {"contentType": kind, "name": r.query.get("name"), **sent}
        elif how == "resumable":
            kind = r.headers.get("x-upload-content-type")
            attributes = {"contentType": kind, **json.loads(content or b"{}")}
        name = r.query.get("name") or attributes["name"]
        attributes = {k: v for k, v in _attributes(attributes).items() if v is not None}
        if how != "resumable":
            made = self._write(opened, name, content, attributes, r.query)
            self.stats["write"] += 1
            return as_json(made)
        _check(opened.blobs.get(name), r.query)
        self.stats["write_part"] += 1
        key = f"{len(self.uploads)}-{os.urandom(8).hex()}"
        self.uploads[key] = Upload(bucket, name, attributes, r.query)
        query = f"uploadType=resumable&upload_id={key}"
        return Reply(200, b"", {"Location": f"http://{r.headers['host']}{r.path}?{query}"})

    def _proceed(self, r: Request) -> Reply:
        """Take more of a resumable upload, or say how much has arrived."""
        upload = self.uploads.get(r.query["upload_id"])
        if upload is None:
            raise Refused(404, "No such upload.")
        bucket, data = self.open(upload.bucket, "create"), upload.data
        if r.method == "DELETE":
            del self.uploads[r.query["upload_id"]]
            return Reply(499)
        if upload.reply is None:
            span = r.headers.get("content-range", "bytes 0-*/*")
            form = r"bytes (?:(\d+)-(\d+|\*)|\*)/(\d+|\*)"
            first, last, total = re.fullmatch(form, span).groups()
            if first and int(first) > len(data):
                raise Refused(400, f"The upload is at {len(data)} bytes, not at {first}.")
            if first:
                data[int(first) :] = r.body
            if last == total == "*" or (total != "*" and len(data) >= int(total)):
                made = self._write(bucket, upload.name, bytes(data), upload.attributes, upload.query)
                self.stats["write"] += 1
                upload.reply = as_json(made)
                data.clear()
                return upload.reply
        self.stats["write_part"] += 1
        held = {"Range": f"bytes=0-{len(data) - 1}"} if data else {}
        return upload.reply or Reply(308, b"", held)

    def _batch(self, r: Request) -> Reply:
        """Answer each of the requests in a body of several parts; those have no body themselves."""
        self.stats["batch"] += 1
        parts = []
        for method, target in re.findall(rb"\n([A-Z]+) (/\S+) HTTP/1\.1", r.body):
            inner = Request.parse(f"{method.decode()} {target.decode()} HTTP/1.1", b"")
            parts.append(b"Content-Type: application/http\r\n\r\n" + _message(self.answer(inner)))
        edge = f"batch_{os.urandom(8).hex()}"
        body = b"".join(b"--%s\r\n%s\r\n" % (edge.encode(), part) for part in parts)
        kind = {"Content-Type": f"multipart/mixed; boundary={edge}"}
        return Reply(200, body + f"--{edge}--".encode(), kind)


def as_json(value: Any, status: int = 200) -> Reply:
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    return Reply(status, json.dumps(value).encode(), headers)


def _check(held: Blob | None, query: dict[str, str], unchanged: int = 412) -> None:
    """Refuse what the query's conditions on the generation rule out."""
    generation = held.generation if held else 0
    if int(query.get("ifGenerationMatch", generation)) != generation:
        raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
    if int(query.get("ifGenerationNotMatch", -1)) == generation:
        raise Refused(unchanged, "At least one of the pre-conditions you specified did not hold.")


def _rfc3339(seconds: float) -> str:
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{day}.{int(seconds % 1 * 1000):03}Z"


def _attributes(sent: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sent.items() if name in SETTABLE}


def _bucket_metadata(name: str, what: str = "", *_: str) -> dict[str, Any]:
    if what == "storageLayout":
        flat = {"hierarchicalNamespace": {"enabled": False}}
        return {"kind": "storage#storageLayout", "bucket": name, "location": "US", **flat}
    if what:
        return {"kind": f"storage#{what}", "items": []}
    place = {"location": "US", "locationType": "multi-region", "storageClass": "STANDARD"}
    return {"kind": "storage#bucket", "id": name, "name": name, **place}


def _related(r: Request) -> tuple[dict[str, Any], str, bytes]:
    """The metadata, content type and content of an upload in two parts.

    gcsfs ends lines with \\n alone, others with \\r\\n; what stands before an edge tells which, for
    the content may itself end with either.
    """
    edge = re.search(r'boundary="?([^";]+)', r.headers["content-type"])[1]
    mark, body = f"--{edge}".encode(), r.body
    end = b"\r\n" if body.startswith(b"\r\n", body.index(mark) + len(mark)) else b"\n"
    second = body.index(mark, body.index(mark) + len(mark))
    sent = body[:second].partition(end * 2)[2]
    start = body.index(end * 2, second) + 2 * len(end)
    kind = re.search(rb"(?i)\ncontent-type: *([^\r\n]+)", body[second:start])
    content = body[start : body.rindex(end + mark)]
    return json.loads(sent), kind[1].decode() if kind else None, content


def _message(reply: Reply, sent: slice = slice(None)) -> bytes:
    """The reply as HTTP, whole or with only some of its body."""
    names = {s.value: s.phrase for s in http.HTTPStatus} | PHRASES
    return b""
