"""The contents of a Google Cloud Storage in memory, and its answers by the JSON API."""

import base64
import collections
import hashlib
import json
import os
import re
import time
from http.client import responses
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote

OBJECTS = {"get", "list", "create", "delete"}
RIGHTS = {"all": {*OBJECTS, "bucket"}, "objects": OBJECTS, "read": {"get", "list"}}
RIGHTS |= {"none": set(), "expired": set()}
REASONS = {401: "authError", 403: "forbidden", 404: "notFound", 412: "conditionNotMet"}
REASONS |= {429: "rateLimitExceeded", 500: "internalError", 503: "backendError"}
MESSAGES = {401: "Invalid Credentials", 416: "Request range not satisfiable"}
PHRASES = {**responses, 308: "Resume Incomplete", 499: "Client Closed Request"}
HASHED = 1 << 20  # a larger object has no hash, like one composed at Google
PAGE = 1000  # names in one listing
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
        target = re.sub("^https?://[^/]+", "", target)
        self.path, _, query = target.partition("?")
        self.query = dict(parse_qsl(query, keep_blank_values=True))
        self.line = f"{method} {unquote(target)}"


class Storage:
    """Buckets, and the answers to requests.

    Attributes:
      stats: requests by kind. A read is one for content, and a read_whole such a one without a
        range; stat and stat_missing ask for metadata; a write is to make an object, a write_part
        is any other step of an upload; denied is what rights forbid.
    """

    def __init__(self):
        self.buckets: dict[str, Objects] = {}
        self.rights: dict[str, str] = {}
        self.uploads: dict[str, tuple] = {}  # of one that is complete, the reply
        self.stats: collections.Counter[str] = collections.Counter()
        self.generation = 0

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
        about |= {"timeCreated": now(), "updated": now()}
        if len(data) <= HASHED:
            about["md5Hash"] = base64.b64encode(hashlib.md5(data).digest()).decode()
        self.buckets[bucket][name] = about, data
        return about

    def write(self, bucket: str, name: str, data: bytes, sent: Json, query: Json) -> Json:
        """Make an object, if rights and conditions allow it."""
        objects = self.open(bucket, "create")
        check(objects, name, query)
        self.open(bucket, *["delete"] * (name in objects))
        return self.put(bucket, name, data, sent)

    def get(self, r: Request, bucket: str, name: str, media: bool) -> Reply:
        objects, span = self.open(bucket, "get"), r.headers.get("range", "")
        self.stats["read" if media else "stat" if name in objects else "stat_missing"] += 1
        self.stats["read_whole"] += media and not span
        about, data = find(objects, name, r.query, unchanged=304)
        if not media:
            return as_json(about)
        made = time.gmtime(int(about["generation"]) // 10**6)
        headers = {"Last-Modified": time.strftime("%a, %d %b %Y %H:%M:%S GMT", made)}
        headers |= {"Content-Type": about["contentType"], "ETag": about["etag"]}
        headers |= {"X-Goog-Generation": about["generation"]}
        headers |= {"X-Goog-Stored-Content-Length": about["size"]}
        if (parts := re.fullmatch(r"bytes=(\d*)-(\d*)", span)) is None:
            hashes = {"X-Goog-Hash": f"md5={about['md5Hash']}"} if "md5Hash" in about else {}
            return Reply(200, data, headers | hashes)
        first, last = parts.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            raise Refused(416)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return Reply(206, data[start:stop], headers)

    def page(self, query: Json, objects: Objects) -> Reply:
        """A page of a listing; its token is the name that the next one begins with."""
        self.stats["list"] += 1
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        token = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        start, end = max(query.get("startOffset", ""), token), query.get("endOffset")
        found, answer = {}, {"kind": "storage#objects"}
        names = [n for n in objects if n.startswith(prefix) and n >= start]
        for name in sorted(n for n in names if not end or n < end):
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            key = name if cut < 0 else name[: cut + len(delimiter)]
            if key not in found and len(found) == min(int(query.get("maxResults", PAGE)), PAGE):
                answer["nextPageToken"] = base64.urlsafe_b64encode(name.encode()).decode()
                break
            found[key] = cut < 0
        items = [objects[key][0] for key, whole in found.items() if whole]
        folders = [key for key, whole in found.items() if not whole]
        return as_json(answer | {k: v for k, v in (("items", items), ("prefixes", folders)) if v})

    def patch(self, r: Request, about: Json) -> Reply:
        self.stats["patch"] += 1
        sent = json.loads(r.body)
        own = {**about.get("metadata", {}), **(sent.get("metadata") or {})}
        sent["metadata"] = {key: value for key, value in own.items() if value is not None}
        about |= {"metageneration": str(int(about["metageneration"]) + 1), "updated": now(), **sent}
        return as_json(about)

    def copy(self, r: Request, how: str, bucket: str, name: str, to: str, new: str) -> Reply:
        objects = self.open(bucket, "get")
        self.stats["move" if how == "move" else "copy"] += 1
        about, data = find(objects, name, {"generation": r.query.get("sourceGeneration")})
        made = self.write(to, new, data, about, r.query)
        if how == "move" and new != name:
            del objects[name]
        sizes = {"totalBytesRewritten": about["size"], "objectSize": about["size"]}
        whole = {"kind": "storage#rewriteResponse", "done": True, **sizes, "resource": made}
        return as_json(whole if how == "rewriteTo" else made)

    def compose(self, r: Request, bucket: str, name: str) -> Reply:
        objects, asked = self.open(bucket, "get"), json.loads(r.body)
        self.stats["copy"] += 1
        parts = [find(objects, part["name"], part)[1] for part in asked["sourceObjects"]]
        if not 1 <= len(parts) <= 32:
            raise Refused(400, "The number of source components must be between 1 and 32.")
        sent = asked.get("destination", {})
        return as_json(self.write(bucket, name, b"".join(parts), sent, r.query))

    def upload(self, r: Request, bucket: str) -> Reply:
        how, data, sent = r.query["uploadType"], r.body, {"name": r.query.get("name")}
        if how == "media":
            sent["contentType"] = r.headers.get("content-type")
        elif how == "multipart":
            about, data = related(r)
            sent |= about
        else:
            sent |= {"contentType": r.headers.get("x-upload-content-type")}
            sent |= json.loads(data or "{}")
        if not sent["name"]:
            raise Refused(400, "Required: name")
        objects = self.open(bucket, "create")
        self.stats["write_part" if how == "resumable" else "write"] += 1
        if how != "resumable":
            return as_json(self.write(bucket, sent["name"], data, sent, r.query))
        check(objects, sent["name"], r.query)
        key = f"{len(self.uploads)}-{os.urandom(8).hex()}"
        self.uploads[key] = bucket, sent, r.query, bytearray()
        place = f"http://{r.headers['host']}{r.path}?uploadType=resumable&upload_id={key}"
        return Reply(200, b"", {"Location": place})

    def proceed(self, r: Request) -> Reply:
        """Take more of a resumable upload, or say how much of it has arrived."""
        key = r.query["upload_id"]
        upload = self.uploads.get(key)
        if upload is None or r.method == "DELETE":
            raise Refused(499 if self.uploads.pop(key, None) else 404, "No such upload.")
        if isinstance(upload, Reply):
            return upload
        bucket, sent, query, data = upload
        self.open(bucket, "create")
        span, form = r.headers.get("content-range"), r"bytes (?:(\d+)-(\d+|\*)|\*)/(\d+|\*)"
        first, last, total = re.fullmatch(form, span or "bytes 0-*/*").groups()
        if first:
            if int(first) > len(data):
                raise Refused(400, f"The offset {first} is beyond the {len(data)} bytes received.")
            data[int(first) :] = r.body
        if last == total == "*" or (total != "*" and len(data) >= int(total)):
            self.stats["write"] += 1
            made = self.write(bucket, sent["name"], bytes(data), sent, query)
            self.uploads[key] = as_json(made)
            return self.uploads[key]
        self.stats["write_part"] += 1
        return Reply(308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {})

    def batch(self, r: Request) -> Reply:
        """Answer each request of a body of several parts; those have no bodies themselves."""
        self.stats["batch"] += 1
        edge, text = f"batch_{os.urandom(8).hex()}", b""
        for method, target in re.findall(r"\n([A-Z]+) (\S+) HTTP/1\.1", r.body.decode()):
            text += f"--{edge}\r\nContent-Type: application/http\r\n\r\n".encode()
            text += self.answer(Request(method, target, {})).text() + b"\r\n"
        kind = {"Content-Type": f"multipart/mixed; boundary={edge}"}
        return Reply(200, text + f"--{edge}--".encode(), kind)


def as_json(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def problem(status: int, message: str = "") -> Reply:
    if status < 400:
        return Reply(status)
    message = message or MESSAGES.get(status, PHRASES[status])
    error = {"message": message, "domain": "global", "reason": REASONS.get(status, "invalid")}
    return as_json({"error": {"code": status, "message": message, "errors": [error]}}, status)


def now() -> str:
    seconds, _, rest = f"{time.time():.3f}".partition(".")
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(int(seconds))) + f".{rest}Z"


def find(objects: Objects, name: str, query: Json, unchanged: int = 412) -> tuple[Json, bytes]:
    held = objects.get(name)
    if held is None or query.get("generation") not in (None, held[0]["generation"]):
        raise Refused(404, f"No such object: {name}")
    check(objects, name, query, unchanged)
    return held


def check(objects: Objects, name: str, query: Json, unchanged: int = 412) -> None:
    """Refuse what the conditions of a query forbid; the generation of no object is 0."""
    generation = objects[name][0]["generation"] if name in objects else "0"
    wrong = query.get("ifGenerationMatch", generation) != generation
    if wrong or query.get("ifGenerationNotMatch") == generation:
        raise Refused(412 if wrong else unchanged)


def related(r: Request) -> tuple[Json, bytes]:
    """Metadata and content of an upload in two parts.

    gcsfs ends lines with \\n alone, others with \\r\\n. The first line tells which, and not what is
    before the last edge: content may end with \\r.
    """
    edge = re.search(r'boundary="?([^";]+)', r.headers["content-type"])[1]
    mark, body = f"--{edge}".encode(), r.body
    end = re.compile(rb"\r?\n").search(body, body.index(mark))[0]
    second = body.index(end + mark, len(mark))
    start = body.index(end * 2, second) + 2 * len(end)
    kind = re.search(r"(?i)\ncontent-type: *([^\r\n]+)", body[second:start].decode())
    about = {"contentType": kind[1]} if kind else {}
    about |= json.loads(body[:second].partition(end * 2)[2])
    return about, body[start : body.rindex(end + mark)]
