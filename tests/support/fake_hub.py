"""The part of the Hugging Face hub that an upload needs, over HTTP on 127.0.0.1."""

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

TOKEN = "hf_of_the_tests"


class Hub:
    """The uploads.

    Attributes:
      repos: body of the request that made each repository.
      files: content by path, of the last commit.
      commits: number of them.
      large: endings of files that must go the way of large ones.
    """

    def __init__(self, large: tuple[str, ...]):
        self.repos: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.large = large
        self.blobs: dict[str, bytes] = {}

    def preupload(self, body: dict) -> dict:
        modes = {
            file["path"]: "lfs" if file["path"].endswith(self.large) else "regular"
            for file in body["files"]
        }
        return {
            "files": [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for path, mode in modes.items()
            ]
        }

    def lfs(self, body: dict, address: str) -> dict:
        return {
            "transfer": "basic",
            "objects": [
                {
                    "oid": wanted["oid"],
                    "size": wanted["size"],
                    "actions": {"upload": {"href": f"{address}/blob/{wanted['oid']}"}},
                }
                for wanted in body["objects"]
            ],
        }

    def commit(self, lines: list[dict], address: str, repo: str) -> dict:
        self.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        return {"commitUrl": f"{address}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40}


@contextlib.contextmanager
def serve(large: tuple[str, ...]) -> Iterator[tuple[str, Hub]]:
    """The address of a hub, and what it receives."""
    hub = Hub(large)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, {"error": "Invalid credentials"})
                return
            address = f"http://{self.headers['Host']}"
            repo = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
            if self.path == "/api/repos/create":
                body = json.loads(data)
                name = f"{body['organization']}/{body['name']}"
                hub.repos[name] = body
                self.answer(200, {"url": f"{address}/{name}"})
            elif self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                self.answer(200, hub.preupload(json.loads(data)))
            elif self.path.endswith("/info/lfs/objects/batch"):
                self.answer(200, hub.lfs(json.loads(data), address))
            elif "/commit/" in self.path:
                lines = [json.loads(line) for line in data.splitlines()]
                self.answer(200, hub.commit(lines, address, repo))
            else:
                self.answer(404, {"error": f"POST {self.path}"})

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            hub.blobs[self.path.rpartition("/")[2]] = data
            self.answer(200, {})

        def do_GET(self) -> None:
            self.answer(404, {"error": f"GET {self.path}"})

        def answer(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_) -> None:
            pass

    return Handler
