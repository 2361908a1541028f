"""The web page of python -m clip_jax search --serve, in a headless Chromium."""

import base64
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterator

import pytest
import tiny_run
from PIL import Image
from tiny_data import encoded, picture

import clip_jax
from clip_jax.embed import cli as embed
from clip_jax.embed.store import open_store
from clip_jax.errors import UserError
from clip_jax.search import web
from clip_jax.search.searcher import Searcher

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
COUNT = 30
TIMEOUT = 60_000  # milliseconds; the machine may be busy

# Drops a file, given in base64, on an element as a hand would.
DROP = """([element, data, name]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: 'image/png'}));
  for (const kind of ['dragenter', 'dragover', 'drop'])
    element.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("page")
    (made / "pictures").mkdir()
    for seed in range(COUNT):
        image = picture(seed, (120, 90) if seed % 3 else (80, 110))
        (made / "pictures" / f"{seed}.png").write_bytes(encoded(image))
    return made


@pytest.fixture(scope="module")
def searcher(folder) -> Searcher:
    run = tiny_run.finished()
    with tiny_run.compile_once():
        embed.main([f"--model={run}", str(folder / "pictures"), f"--out={folder / 'out'}"])
    made = Searcher(clip_jax.load(run), open_store(folder / "out"), "", approximate=False)
    made.hold()
    return made


@pytest.fixture(scope="module")
def address(searcher) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = web.build(searcher)
    web.launch(made, "127.0.0.1", port, prevent_thread_lock=True)
    yield f"http://127.0.0.1:{port}"
    made.close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, address) -> Iterator:
    """A tab; fails on errors and on requests to other machines."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, errors, elsewhere = context.new_page(), [], []
    opened.set_default_timeout(TIMEOUT)
    opened.on("pageerror", lambda error: errors.append(str(error)))

    def look(request):
        if not request.url.startswith((address, "data:", "blob:")):
            elsewhere.append(request.url)

    opened.on("request", look)
    opened.goto(address)
    opened.wait_for_selector("#query textarea, #query input")
    yield opened
    context.close()
    assert not errors
    assert not elsewhere


def ask(tab, text: str) -> None:
    box = tab.locator("#query textarea, #query input")
    box.fill(text)
    box.press("Enter")


def captions(tab) -> list[str]:
    """Returns the captions of the thumbnails, once there are any."""
    tab.wait_for_selector("#results .caption-label")
    return [
        " ".join(text.split()) for text in tab.locator("#results .caption-label").all_inner_texts()
    ]


def drop(tab, path: pathlib.Path) -> None:
    zone = tab.locator("#picture button").first.element_handle()
    data = base64.b64encode(path.read_bytes()).decode()
    tab.evaluate(DROP, [zone, data, path.name])


def test_a_text_shows_what_the_searcher_finds(tab, searcher):
    ask(tab, "the digit seven")
    wanted = searcher.texts(["the digit seven"], 24)[0]
    assert captions(tab) == [f"{hit.score:.3f} {hit.row.key}" for hit in wanted]
    widths = tab.evaluate(
        "[...document.querySelectorAll('#results img')].map(i => i.complete && i.naturalWidth)"
    )
    assert len(widths) == 24
    tab.wait_for_function(
        "[...document.querySelectorAll('#results img')].every(i => i.complete && i.naturalWidth)"
    )


def test_a_dropped_picture_is_found_and_classified(tab, folder, searcher):
    path = folder / "pictures" / "11.png"
    drop(tab, path)
    assert captions(tab)[0] == "1.000 11.png"
    tab.locator("#names textarea, #names input").fill("seven, three ,nine")
    tab.locator("#template textarea, #template input").fill("the digit {}")
    tab.locator("#classify").click()
    tab.wait_for_function("document.querySelector('#labels').innerText.includes('%')")
    text = " ".join(tab.locator("#labels").inner_text().split())
    with Image.open(path) as image:
        names = ["seven", "three", "nine"]
        probabilities = searcher.model.zero_shot(image, names, ["the digit {}"])[0]
    for name, probability in zip(names, probabilities):
        assert f"{name} {probability * 100:.0f}%" in text


def test_user_errors_are_shown(tab):
    tab.locator("#classify").click()
    tab.get_by_text("name two labels or more").first.wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(width, tab):
    tab.set_viewport_size({"width": width, "height": 844})
    ask(tab, "seven")
    captions(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    first = tab.locator("#results img").first.bounding_box()
    assert first["width"] >= 120
    assert tab.locator("#query").bounding_box()["width"] >= 200
    beside = tab.locator("#picture").bounding_box()["x"] > first["x"] + first["width"]
    assert beside == (width > 1000)


def test_without_gradio_it_says_what_to_install(searcher, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"requirements-page.txt"):
        web.build(searcher)
