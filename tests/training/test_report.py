"""report.html, read back with the standard library's HTML parser."""

import base64
import io
import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from html_page import Page
from PIL import Image

from clip_jax.evaluate.run_report import write_report
from clip_jax.evaluate.run_results import (
    GalleryRow,
    Mistake,
    RetrievalResult,
    RunSummary,
    ZeroshotResult,
)

SECTIONS = ["curves", "zeroshot", "retrieval", "data", "run"]
EVIL = "<script>alert(1)</script>"
START = datetime(2026, 3, 4, 12, 30, tzinfo=UTC)
SUMMARY = RunSummary(
    title="quickstart on digits",
    command="python main.py --config=configs/quickstart.py",
    started=START,
    finished=START.replace(hour=13),
    wall_seconds=223.4,
    hardware="2 CPU cores",
    params=1_234_567,
    images_seen=96_000,
    steps=750,
    images_per_second=812.3,
    skipped={"unreadable image": 1200, "empty caption": 3},
    truncated=7,
    config_text="seed: 0\nbatch_size: 128\n",
)


@pytest.fixture
def page(tmp_path):
    def render(summary=SUMMARY, history=(), zeroshot=None, retrieval=None) -> tuple[str, Page]:
        path = tmp_path / "report.html"
        write_report(path, summary, history, zeroshot, retrieval)
        text = path.read_text("utf-8")
        return text, Page(text)

    return render


def picture(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def classified(classes: int, seed: int = 0, **changes) -> ZeroshotResult:
    rng = np.random.default_rng(seed)
    confusion = rng.poisson(0.3, (classes, classes)).astype(np.int64)
    confusion[np.diag_indices(classes)] = rng.integers(20, 1500, classes)
    result = ZeroshotResult(
        class_names=tuple(f"class {i}" for i in range(classes)),
        templates=("a photo of a {}.",),
        confusion=confusion,
        top1=float(np.trace(confusion) / confusion.sum()),
        top5=0.9876,
        per_class=np.diag(confusion) / confusion.sum(1),
        n=int(confusion.sum()),
        mistakes=[Mistake(picture(i), "class 1", "class 2", 0.9 - 0.1 * i) for i in range(3)],
    )
    return replace(result, **changes)


def retrieved(**changes) -> RetrievalResult:
    result = RetrievalResult(
        metrics={"text_to_image/recall@1": 0.214, "image_to_text/recall@1": 0.3},
        chance={"text_to_image/recall@1": 0.002, "image_to_text/recall@1": 0.004},
        gallery=[
            GalleryRow(
                f"caption {i}", [picture(5 * i + k) for k in range(5)], [k == i for k in range(5)]
            )
            for i in range(3)
        ],
    )
    return replace(result, **changes)


def curves(steps: int = 30) -> list[dict[str, float]]:
    history: list[dict[str, float]] = []
    for step in range(25, 25 * steps + 1, 25):
        row = {"step": step, "epoch": step / 100, "train/loss": 5 / step, "train/grad_norm": 2.0}
        if step % 250 == 0:
            row |= {"zeroshot/top1": 0.5, "retrieval/text_to_image/recall@1": 0.1}
        history.append(row)
    return history


def test_stands_alone(page):
    text, parsed = page(SUMMARY, curves(), classified(10), retrieved())
    assert "http" not in text
    assert not parsed.unbalanced
    references = [
        element["attrs"][name]
        for element in parsed.elements
        for name in ("src", "href", "xlink:href")
        if name in element["attrs"]
    ]
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert not parsed.find("link")
    assert not parsed.find("script")
    assert "@import" not in text
    assert all(reference.startswith("#") for reference in re.findall(r"url\((.*?)\)", text))
    assert [section["attrs"]["id"] for section in parsed.find("section")] == SECTIONS
    targets = {element["attrs"].get("id") for element in parsed.elements}
    assert all(link["attrs"]["href"][1:] in targets for link in parsed.find("a"))
    assert all(image["attrs"]["alt"] for image in parsed.find("img"))
    assert all(
        plot["attrs"]["aria-label"] for plot in parsed.find("svg") if "role" in plot["attrs"]
    )
    assert len(text) < 300_000


def test_ids_are_unique(page):
    _, parsed = page(SUMMARY, curves(), classified(10), retrieved())
    ids = [element["attrs"]["id"] for element in parsed.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))


def test_figures_are_those_given(page):
    zeroshot, retrieval = classified(10), retrieved()
    text, parsed = page(SUMMARY, curves(), zeroshot, retrieval)
    figures = [e["text"] for e in parsed.find("dd", "headline") if e["attrs"].get("class")]
    assert figures[0] == f"{100 * zeroshot.top1:.1f}\xa0%"
    assert figures[1:] == ["21.4\xa0%", "30.0\xa0%", "3m 43s", "812.3"]
    assert "107 × the chance of 0.2\xa0%" in text
    assert "98.8\xa0%" in text  # top-5
    for expected in ("1,234,567", "96,000", "2 CPU cores", SUMMARY.command):
        assert expected in text
    assert parsed.rows("skipped") == [["unreadable image", "1,200"], ["empty caption", "3"]]
    assert "7 captions were" in text
    assert parsed.find("pre", "config")[0]["text"] == SUMMARY.config_text
    assert ["recall@1", "21.4 %", "0.2 %", "107"] in parsed.rows("recall")


def test_class_table_and_heat_map_hold_the_confusion_matrix(page):
    zeroshot = classified(10, seed=1)
    _, parsed = page(SUMMARY, [], zeroshot, None)
    rows = parsed.rows("classes")
    assert [row[0] for row in rows] == list(zeroshot.class_names)
    right = [int(row[1].replace(",", "")) for row in rows]
    assert right == [int(zeroshot.confusion[i][i]) for i in range(10)]
    total = [int(row[2].replace(",", "")) for row in rows]
    assert total == [sum(int(x) for x in line) for line in zeroshot.confusion]
    shares = [float(row[3].removesuffix(" %")) for row in rows]
    np.testing.assert_allclose(shares, 100 * np.divide(right, total), atol=0.051)
    read = [[int(cell or 0) for cell in row[1:]] for row in parsed.rows("confusion")]
    np.testing.assert_array_equal(read, zeroshot.confusion)
    diagonal = [
        cell for cell in parsed.find("td", "confusion") if "right" in cell["attrs"].get("class", "")
    ]
    assert [int(cell["text"]) for cell in diagonal] == right


def test_many_classes_list_the_most_confused_pairs(page):
    zeroshot = classified(1000, seed=2)
    confusion = zeroshot.confusion.copy()
    confusion[17, 903], confusion[903, 17] = 777, 55
    zeroshot = replace(
        zeroshot, confusion=confusion, per_class=np.diag(confusion) / confusion.sum(1)
    )
    text, parsed = page(SUMMARY, curves(), zeroshot, retrieved())
    assert not parsed.rows("confusion")
    assert len(parsed.rows("classes")) == 1000
    pairs = parsed.rows("pairs")
    assert [row[:3] for row in pairs[:2]] == [
        ["class 17", "class 903", "777"],
        ["class 903", "class 17", "55"],
    ]
    counts = [int(row[2]) for row in pairs]
    off_diagonal = sorted(confusion[~np.eye(1000, dtype=bool)].tolist(), reverse=True)
    assert counts == off_diagonal[: len(counts)]
    assert not parsed.unbalanced
    assert len(text) < 1_500_000


def test_gallery_marks_hits_without_colour(page):
    _, parsed = page(SUMMARY, [], None, retrieved())
    items = parsed.find("li", "gallery")
    marks = ["✓" in item["text"] for item in items]
    assert marks == [k == i for i in range(3) for k in range(5)]
    alts = ["belongs to it" in image["attrs"]["alt"] for image in parsed.find("img", "gallery")]
    assert alts == marks
    assert [
        p["text"] for p in parsed.find("p", "gallery") if p["attrs"].get("class") == "query"
    ] == [
        "caption 0",
        "caption 1",
        "caption 2",
    ]


@pytest.mark.parametrize("size", [24, 224])
def test_images_are_the_pixels_given(page, size):
    image = np.full((size, size, 3), (200, 30, 60), np.uint8)
    image[: size // 2] = (10, 90, 220)
    mistakes = [Mistake(image, "cat", "dog", 0.7512)]
    _, parsed = page(SUMMARY, [], classified(10, mistakes=mistakes), None)
    (shown,) = parsed.find("img", "mistakes")
    kind, data = shown["attrs"]["src"].split(";base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{decoded.format.lower()}"
    assert (int(shown["attrs"]["width"]), int(shown["attrs"]["height"])) == decoded.size
    back = np.asarray(decoded.convert("RGB").resize((size, size)), np.int64)
    if size == 24:
        np.testing.assert_array_equal(back, image)
    assert np.abs(back - image).mean() < 4
    (item,) = parsed.find("li", "mistakes")
    assert " ".join(item["text"].split()) == "cat, taken for dog (75.1 %)"


def test_texts_are_escaped(page):
    zeroshot = classified(
        2,
        class_names=(EVIL, '"><img src=x>'),
        templates=(EVIL,),
        mistakes=[Mistake(picture(0), '" onload="alert(1)', EVIL, 0.5)],
    )
    retrieval = retrieved(gallery=[GalleryRow(f"{EVIL} \ud800 &amp;", [picture(1)], [False])])
    summary = replace(
        SUMMARY, title=EVIL, command=EVIL, hardware=EVIL, config_text=EVIL, skipped={EVIL: 1}
    )
    history = [{"step": 1, f"{EVIL}/$x^{EVIL}": 1.0, '"><script>/loss': 2.0}]
    _, parsed = page(summary, history, zeroshot, retrieval)
    assert not parsed.find("script")
    assert not parsed.unbalanced
    assert all("onload" not in element["attrs"] for element in parsed.elements)
    assert len(parsed.find("img")) == 2
    assert parsed.find("h1")[0]["text"] == EVIL
    queries = [p["text"] for p in parsed.find("p") if p["attrs"].get("class") == "query"]
    assert queries == [f"{EVIL} ? &amp;"]


@pytest.mark.parametrize("history", [[], [{"step": 5}]])
def test_nothing_to_show_is_said(page, history):
    summary = replace(SUMMARY, skipped={}, truncated=0)
    text, parsed = page(summary, history, None, None)
    assert [section["attrs"]["id"] for section in parsed.find("section")] == SECTIONS
    for sentence in (
        "logged no metrics",
        "no zero-shot evaluation",
        "no retrieval evaluation",
        "No example was skipped",
        "No caption was longer",
    ):
        assert sentence in text
    assert not parsed.find("figure")
    assert not parsed.unbalanced


def test_class_without_examples_and_perfect_result(page):
    confusion = np.diag([4, 0, 3]).astype(np.int64)
    zeroshot = ZeroshotResult(
        ("a", "b", "c"), (), confusion, 1.0, None, np.array([1, np.nan, 1.0]), 7
    )
    _, parsed = page(SUMMARY, [], zeroshot, None)
    assert [row[:4] for row in parsed.rows("classes")][1] == ["b", "0", "0", "–"]


def test_each_metric_is_shown_once_with_its_last_value_and_chance(page):
    history = [*curves(), {"step": 800, "data/queue_length": 3.0}]
    _, parsed = page(SUMMARY, history, classified(10), retrieved())
    figures = {f["text"].split("\n")[1].strip(): f["text"] for f in parsed.find("figure")}
    assert list(figures) == [
        "loss",
        "zero-shot accuracy",
        "retrieval: text to image",
        "grad norm",
        "data: queue length",
    ]
    assert "50.0\xa0% chance 10.0\xa0%" in " ".join(figures["zero-shot accuracy"].split(" "))
    assert "chance 0.2\xa0%" in figures["retrieval: text to image"]
    assert "0.006667" in figures["loss"]  # 5 / 750
    assert "chance" not in figures["loss"]


def test_diverged_run_is_drawn(page):
    values = [1.0, float("nan"), float("inf"), 2.0, float("nan")]
    history = [{"step": i, "train/loss": value} for i, value in enumerate(values)]
    text, _ = page(SUMMARY, history, None, None)
    assert "<b>not finite</b>" in text
    assert not re.search(r"\b(nan|inf)\b", text)
    page(SUMMARY, [{"step": 1, "train/loss": float("nan")}], None, None)


def test_same_input_same_bytes(page):
    first, _ = page(SUMMARY, curves(), classified(10), retrieved())
    second, _ = page(SUMMARY, curves(), classified(10), retrieved())
    assert first == second
