"""The web page of python -m clip_jax search --serve: thumbnails, a picture and its labels."""

import contextlib
import importlib
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.data import images
from clip_jax.embed import inputs
from clip_jax.errors import BadExample, UserError
from clip_jax.search.searcher import Hit, Searcher

_RESULTS = 24  # shown for a query
_SIDE = 320  # pixels of a thumbnail
_TEMPLATE = "a photo of a {}."
_MOST_BYTES = 2**25  # of a request, such as the upload of a picture
_KEPT_FOR = 600  # seconds that an uploaded picture is kept, to be classified after the search
_FONTS = ("system-ui", "sans-serif")  # nothing is fetched from elsewhere
_BROKEN_AFTER = 60  # seconds without a byte until an upload counts as broken off
_LOOPBACK = ("127.0.0.1", "localhost")
_STYLE = """
.gradio-container {
  width: 100% !important; max-width: 1200px !important; margin: 0 auto !important;
}
#about h1 { margin: 0; }
#results .grid-wrap { max-height: none; overflow: visible; }
#results .caption-label {
  left: 4px; right: 4px; bottom: 4px; max-width: none; padding: 1px 6px;
  font-size: 12px; text-align: left;
}
@media (max-width: 640px) {
  .gradio-container main { padding: 12px !important; }
  #results .grid-wrap { max-height: 60vh; overflow: auto; }  /* the picture stays near */
  #results .grid-container { grid-template-columns: repeat(2, 1fr) !important; }
}
"""

Thumbnails = list[tuple[Image.Image, str]]


def serve(searcher: Searcher, host: str, port: int) -> None:
    """Serves the page until interrupted.

    Raises:
      UserError: gradio is missing, the pictures are no longer there, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="clip_jax_search_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # else uploads would stay on the disk
        page = build(searcher)
        searcher.hold()
        launch(page, host, port, prevent_thread_lock=False)


def launch(page: Any, host: str, port: int, prevent_thread_lock: bool) -> None:
    """Serves a built page; `prevent_thread_lock`: in a thread of its own."""
    gradio = _gradio()
    # A page of another site, whose name was made to lead here, may ask nothing of this one.
    hosts = _LOOPBACK if host in _LOOPBACK else ("*",)
    middleware = importlib.import_module("starlette.middleware")
    trusted = importlib.import_module("starlette.middleware.trustedhost").TrustedHostMiddleware
    guards = [middleware.Middleware(_Bounded)]
    guards += [middleware.Middleware(trusted, allowed_hosts=hosts, www_redirect=False)]
    try:
        page.launch(
            server_name=host,
            server_port=port,
            theme=gradio.themes.Soft(font=_FONTS, font_mono=("ui-monospace", "monospace")),
            css=_STYLE,
            footer_links=[],
            share=False,
            ssr_mode=False,
            max_file_size=_MOST_BYTES,
            app_kwargs={"middleware": guards},
            prevent_thread_lock=prevent_thread_lock,
        )
    except OSError as error:
        raise UserError(
            f"The page cannot be served at {host}:{port} ({error}): choose another --port."
        ) from error


def build(searcher: Searcher) -> Any:
    """Builds the page as a `gradio.Blocks`, not served yet."""
    gradio, handlers = _gradio(), Handlers(searcher)
    manifest, count = searcher.store.manifest, sum(searcher.store.counts())
    with gradio.Blocks(
        title="clip_jax search", analytics_enabled=False, delete_cache=(60, _KEPT_FOR)
    ) as page:
        gradio.Markdown(
            f"# Search\n{count:,} examples of {manifest.data['data']}, embedded by "
            f"{manifest.model}.",
            elem_id="about",
        )
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                with gradio.Row(equal_height=True):
                    query = gradio.Textbox(
                        show_label=False,
                        placeholder="Describe what to look for, and press Enter",
                        elem_id="query",
                        scale=5,
                        min_width=200,
                    )
                    go = gradio.Button("Search", variant="primary", scale=1, min_width=90)
                results = _results(gradio, handlers)
            with gradio.Column(scale=1, min_width=280):
                picture = gradio.Image(
                    label="Picture",
                    placeholder="Drop a picture\nto look for others like it",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=240,
                    elem_id="picture",
                )
                # gradio would open it by any of Pillow's formats, some of which start programs.
                picture.preprocess = lambda uploaded: uploaded.path if uploaded else None
                names = gradio.Textbox(
                    label="Labels, comma-separated",
                    placeholder="cat, dog, something else",
                    elem_id="names",
                )
                template = gradio.Textbox(label="Template", value=_TEMPLATE, elem_id="template")
                classify = gradio.Button("Which label fits?", elem_id="classify")
                labels = gradio.Label(label="Probabilities", elem_id="labels", show_heading=False)
        gradio.on([go.click, query.submit], _showing_errors(handlers.by_text), query, results)
        picture.upload(_showing_errors(handlers.by_picture), picture, results)
        asked = [picture, names, template]
        gradio.on([classify.click, names.submit], _showing_errors(handlers.labels), asked, labels)
    return page


class Handlers:
    """The functions behind the page's controls."""

    def __init__(self, searcher: Searcher):
        """Opens the data whose pictures are shown; UserError where they are no longer there."""
        data = searcher.store.manifest.data
        self.has_pictures = not inputs.is_caption_file(data["data"], data["image_key"])
        self._searcher = searcher
        self._source = inputs.open_source(data) if self.has_pictures else None

    def by_text(self, text: str) -> Thumbnails | list[list[str]]:
        """Finds the nearest pictures or captions of a text."""
        if not text.strip():
            raise UserError("Describe what to look for.")
        return self._show(self._searcher.texts([text], _RESULTS)[0])

    def by_picture(self, picture: str | None) -> Thumbnails | list[list[str]]:
        """Finds the nearest pictures or captions of an uploaded picture."""
        return self._show(self._searcher.pictures(_uploaded(picture), _RESULTS)[0])

    def labels(self, picture: str | None, names: str, template: str) -> dict[str, float]:
        """Computes the probabilities of comma-separated labels."""
        given = [name.strip() for name in names.split(",") if name.strip()]
        if picture is None or len(given) < 2:
            raise UserError("Drop a picture, and name two labels or more, comma-separated.")
        model = self._searcher.model
        probabilities: np.ndarray = model.zero_shot(_uploaded(picture), given, templates=[template])
        return dict(zip(given, probabilities[0].tolist()))

    def _show(self, hits: Sequence[Hit]) -> Thumbnails | list[list[str]]:
        if not self.has_pictures:
            return [[f"{hit.score:.3f}", hit.row.caption] for hit in hits]
        return [(self._thumbnail(hit.row.index), _caption(hit)) for hit in hits]

    def _thumbnail(self, index: int) -> Image.Image:
        assert self._source is not None
        try:
            example = self._source[index]
            if isinstance(example.image, bytes):
                picture = images.decode(example.image, example.key)
            else:
                picture = Image.fromarray(example.image)
        except BadExample:  # gone or damaged since
            return Image.new("RGB", (_SIDE, _SIDE), "lightgrey")
        picture.thumbnail((_SIDE, _SIDE))
        return picture


class _Bounded:
    """ASGI middleware: a request of more than `_MOST_BYTES`, declared or not, is answered 413."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, and counts its bytes as they come."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _delete_broken_uploads()
        exceptions = importlib.import_module("starlette.exceptions")
        declared = int(dict(scope["headers"]).get(b"content-length", b"0"))
        count = 0

        async def bounded() -> Any:
            nonlocal count
            message = await receive() if declared <= _MOST_BYTES else {}
            count += len(message.get("body", b""))
            if max(count, declared) > _MOST_BYTES:
                raise exceptions.HTTPException(413, f"More than {_MOST_BYTES:,} bytes.")
            return message

        await self._app(scope, bounded, send)


def _delete_broken_uploads() -> None:
    """Deletes what gradio leaves of uploads that were refused or broke off."""
    uploads = os.environ.get("GRADIO_TEMP_DIR")  # set by `serve`
    for path in pathlib.Path(uploads).glob("tmp*") if uploads else ():
        with contextlib.suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > _BROKEN_AFTER:
                path.unlink()


def _uploaded(path: str | None) -> Image.Image:
    """Decodes an uploaded picture."""
    if path is None:
        raise UserError("Drop a picture.")
    try:
        return images.decode(pathlib.Path(path).read_bytes(), "the picture")
    except FileNotFoundError:
        raise UserError("The picture was deleted meanwhile: drop it again.") from None
    except BadExample as error:
        raise UserError(f"Cannot read the picture: {error}.") from None


def _results(gradio: Any, handlers: Handlers) -> Any:
    """Creates the area of the results: thumbnails, or a table of texts."""
    if handlers.has_pictures:
        return gradio.Gallery(
            show_label=False,
            columns=4,
            height="auto",
            object_fit="contain",
            buttons=["fullscreen"],
            elem_id="results",
        )
    return gradio.Dataframe(headers=["score", "text"], wrap=True, elem_id="results")


def _showing_errors(function: Any) -> Any:
    """Wraps a function to show user errors on the page."""

    def wrapped(*values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            raise _gradio().Error(str(error), duration=6, print_exception=False) from error

    return wrapped


def _caption(hit: Hit) -> str:
    text = " ".join(hit.row.caption.split()) or hit.row.key
    return f"{hit.score:.3f}  {text}"


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise UserError(
            f"The page needs gradio ({error}): run `pip install -r requirements-page.txt`, or "
            "search without --serve."
        ) from error
