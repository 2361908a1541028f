"""Requests that no browser of the page sends: too large, from elsewhere, of other files."""

import http.client
import io
import json
import pathlib
import socket
import types
from collections.abc import Iterator

import pytest
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.search import web

BOUNDARY = {"Content-Type": "multipart/form-data; boundary=B"}
UPLOAD = "/gradio_api/upload"


def form(data: bytes, name: str = "a.png") -> bytes:
    head = f'--B\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n--B--\r\n"


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    pytest.importorskip("gradio")
    manifest = types.SimpleNamespace(data={"data": "x.csv", "image_key": ""}, model="tiny")
    store = types.SimpleNamespace(manifest=manifest, counts=lambda: [3])
    with pytest.MonkeyPatch.context() as patch, socket.socket() as probe:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        probe.bind(("127.0.0.1", 0))
        found = probe.getsockname()[1]
        probe.close()
        made = web.build(types.SimpleNamespace(store=store))
        web.launch(made, "127.0.0.1", found, prevent_thread_lock=True)
        yield found
        made.close()


def ask(port: int, method: str, path: str, body=None, headers=None) -> tuple[int, bytes]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    chunked = not isinstance(body, (bytes, type(None)))
    client.request(method, path, body, headers or {}, encode_chunked=chunked)
    answer = client.getresponse()
    return answer.status, answer.read()


def test_large_uploads_are_refused(port):
    large = form(bytes(web._MOST_BYTES))
    pieces = [large[i : i + 2**20] for i in range(0, len(large), 2**20)]
    assert ask(port, "POST", UPLOAD, large, BOUNDARY)[0] == 413
    chunked = BOUNDARY | {"Transfer-Encoding": "chunked"}
    assert ask(port, "POST", UPLOAD, iter(pieces), chunked)[0] == 413
    lying = BOUNDARY | {"Content-Length": str(10**12)}
    assert ask(port, "POST", UPLOAD, form(b"x"), lying)[0] == 413
    assert ask(port, "POST", UPLOAD, form(b"x"), BOUNDARY)[0] == 200


def test_names_lead_nowhere(port, tmp_path):
    status, body = ask(port, "POST", UPLOAD, form(b"x", f"../../../..{tmp_path}/evil"), BOUNDARY)
    assert status == 200
    assert "uploads" in json.loads(body)[0]
    assert not list(tmp_path.iterdir())
    assert ask(port, "GET", "/gradio_api/file=/etc/hostname")[0] == 403
    bad = ask(port, "POST", "/gradio_api/queue/join", b"{", {"Content-Type": "application/json"})
    assert bad[0] == 422


def test_other_sites_whose_name_leads_here_are_refused(port):
    assert ask(port, "GET", "/")[0] == 200
    assert ask(port, "GET", "/", headers={"Host": f"localhost:{port}"})[0] == 200
    assert ask(port, "GET", "/", headers={"Host": "example.com"})[0] == 400


def test_broken_uploads_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "tmpbroken").write_bytes(b"x")
    web._delete_broken_uploads()
    assert list(tmp_path.iterdir())
    monkeypatch.setattr(web, "_BROKEN_AFTER", -1)
    web._delete_broken_uploads()
    assert not list(tmp_path.iterdir())


def test_uploads_are_opened_by_the_package(tmp_path):
    path = pathlib.Path(tmp_path / "a")
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    path.write_bytes(file.getvalue())
    assert web._uploaded(str(path)).size == (3, 2)
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "EPS")
    path.write_bytes(file.getvalue())
    with pytest.raises(UserError, match="no known image format"):
        web._uploaded(str(path))
    path.unlink()
    with pytest.raises(UserError, match="deleted meanwhile"):
        web._uploaded(str(path))
