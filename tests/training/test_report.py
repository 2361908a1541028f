"""report.html, read back with the standard library's HTML parser."""

import base64
import dataclasses
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from html_page import Page
from PIL import Image

from clip_jax.common.pages.pictures import thumbnail
from clip_jax.evaluate import confusion
from clip_jax.evaluate.confusion import Confusion, Mistake
from clip_jax.evaluate.results import Result, Score
from clip_jax.training.report import RunSummary, write_report

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
    def render(summary=SUMMARY, history=(), *results: Result) -> tuple[str, Page]:
        path = tmp_path / "report.html"
        # The names that evaluator.logged_name gives them.
        scores = {
            f"{s.task}/{s.metric.replace('accuracy', 'top1')}": s for r in results for s in r.scores
        }
        headlines = {n: s for n, s in scores.items() if n.endswith(("top1", "recall@1"))}
        write_report(path, summary, history, results, scores, headlines)
        text = path.read_text("utf-8")
        return text, Page(text)

    return render


def picture(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def confused(classes: int, seed: int = 0, often: Mapping[tuple[int, int], int] = {}) -> Confusion:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.3, (classes, classes)).astype(np.int64)
    counts[np.diag_indices(classes)] = rng.integers(20, 1500, classes)
    for pair, count in often.items():
        counts[pair] = count
    mistakes = [Mistake(picture(i), "class 1", "class 2", 0.9 - 0.1 * i) for i in range(3)]
    pairs = np.argwhere(counts)
    names = tuple(f"class {i}" for i in range(classes))
    return Confusion(names, pairs, counts[tuple(pairs.T)], mistakes)


def classified(found: Confusion, templates: tuple[str, ...] = ("a photo of a {}.",)) -> Result:
    n, classes = int(found.counts.sum()), len(found.class_names)
    top1 = float(found.right.sum() / n)
    chance = 1 / classes
    scores = [Score("zeroshot", "D", "ensemble", "accuracy", top1, 0.2, 0.99, n, chance)]
    if classes > 5:
        top5 = Score("zeroshot", "D", "ensemble", "top5", 0.9876, 0.9, 0.99, n, 5 / classes)
        scores.append(top5)
    details = {"templates": list(templates), "prompts": "own", "by_likelihood": False}
    details["classes"] = confusion.to_json(found)
    return Result("zeroshot", "D", "Digits", "", "", tuple(scores), details, 1.0)


def gallery_row(query: str, pictures: list[np.ndarray], hits: list[bool]) -> dict:
    images = [dataclasses.asdict(thumbnail(picture)) for picture in pictures]
    return {"query": query, "images": images, "hits": hits}


def retrieved(gallery: list[dict] | None = None) -> Result:
    found = (("text_to_image", 0.214, 0.002), ("image_to_text", 0.3, 0.004))
    scores = tuple(
        Score("retrieval", "S", "captions", f"{way}/recall@1", value, 0.1, 0.4, 500, chance)
        for way, value, chance in found
    )
    rows = [
        gallery_row(
            f"caption {i}", [picture(5 * i + k) for k in range(5)], [k == i for k in range(5)]
        )
        for i in range(3)
    ]
    details = {"images": 500, "captions": 250, "prompt": "", "gallery": gallery or rows}
    return Result("retrieval", "S", "Scenes", "", "", scores, details, 1.0)


def curves(steps: int = 30) -> list[dict[str, float]]:
    history: list[dict[str, float]] = []
    for step in range(25, 25 * steps + 1, 25):
        row = {"step": step, "epoch": step / 100, "train/loss": 5 / step, "train/grad_norm": 2.0}
        if step % 250 == 0:
            row |= {"zeroshot/top1": 0.5, "retrieval/text_to_image/recall@1": 0.1}
        history.append(row)
    return history


def test_stands_alone(page):
    text, parsed = page(SUMMARY, curves(), classified(confused(10)), retrieved())
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
    _, parsed = page(SUMMARY, curves(), classified(confused(10)), retrieved())
    ids = [element["attrs"]["id"] for element in parsed.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))


def test_figures_are_those_given(page):
    zeroshot, retrieval = classified(confused(10)), retrieved()
    text, parsed = page(SUMMARY, curves(), zeroshot, retrieval)
    figures = [e["text"] for e in parsed.find("dd", "headline") if e["attrs"].get("class")]
    assert figures[0] == f"{100 * zeroshot.headline.value:.1f}\xa0%"
    assert figures[1:] == ["21.4\xa0%", "30.0\xa0%", "3m 43s", "812.3"]
    assert "107 × the chance of 0.2\xa0%" in text
    assert "98.8\xa0%" in text  # top-5
    for expected in ("1,234,567", "96,000", "2 CPU cores", SUMMARY.command):
        assert expected in text
    assert parsed.rows("skipped") == [["unreadable image", "1,200"], ["empty caption", "3"]]
    assert "7 captions were" in text
    assert parsed.find("pre", "config")[0]["text"] == SUMMARY.config_text
    recalls = [" ".join(row).replace("\xa0", " ") for row in parsed.rows("recall-S")]
    assert recalls[0] == "text to image, recall@1 21.4 % 10.0 % – 40.0 % 0.2 % 107"
    assert "500 images, 250 captions." in text


def test_class_table_and_heat_map_hold_the_confusion_matrix(page):
    found = confused(10, seed=1)
    _, parsed = page(SUMMARY, [], classified(found))
    rows = parsed.rows("classes-D")
    assert [row[0] for row in rows] == list(found.class_names)
    right = [int(row[1].replace(",", "")) for row in rows]
    assert right == [int(found.matrix()[i][i]) for i in range(10)]
    total = [int(row[2].replace(",", "")) for row in rows]
    assert total == [sum(int(x) for x in line) for line in found.matrix()]
    accuracies = [float(row[3].removesuffix(" %")) for row in rows]
    np.testing.assert_allclose(accuracies, 100 * np.divide(right, total), atol=0.051)
    read = [[int(cell or 0) for cell in row[1:]] for row in parsed.rows("confusion-D")]
    np.testing.assert_array_equal(read, found.matrix())
    diagonal = [
        cell
        for cell in parsed.find("td", "confusion-D")
        if "right" in cell["attrs"].get("class", "")
    ]
    assert [int(cell["text"]) for cell in diagonal] == right


def test_many_classes_list_the_most_confused_pairs(page):
    found = confused(1000, seed=2, often={(17, 903): 777, (903, 17): 55})
    text, parsed = page(SUMMARY, curves(), classified(found), retrieved())
    assert not parsed.rows("confusion-D")
    assert len(parsed.rows("classes-D")) == 1000
    pairs = parsed.rows("pairs-D")
    assert [row[:3] for row in pairs[:2]] == [
        ["class 17", "class 903", "777"],
        ["class 903", "class 17", "55"],
    ]
    counts = [int(row[2]) for row in pairs]
    off_diagonal = sorted(found.matrix()[~np.eye(1000, dtype=bool)].tolist(), reverse=True)
    assert counts == off_diagonal[: len(counts)]
    assert not parsed.unbalanced
    assert len(text) < 1_500_000


def test_gallery_marks_hits_without_colour(page):
    _, parsed = page(SUMMARY, [], retrieved())
    items = parsed.find("li", "gallery-S")
    marks = ["✓" in item["text"] for item in items]
    assert marks == [k == i for i in range(3) for k in range(5)]
    alts = ["belongs to it" in image["attrs"]["alt"] for image in parsed.find("img", "gallery-S")]
    assert alts == marks
    assert [
        p["text"] for p in parsed.find("p", "gallery-S") if p["attrs"].get("class") == "query"
    ] == [
        "caption 0",
        "caption 1",
        "caption 2",
    ]


@pytest.mark.parametrize("size", [24, 224])
def test_images_are_the_pixels_given(page, size):
    image = np.full((size, size, 3), (200, 30, 60), np.uint8)
    image[: size // 2] = (10, 90, 220)
    found = replace(confused(10), mistakes=[Mistake(image, "cat", "dog", 0.7512)])
    _, parsed = page(SUMMARY, [], classified(found))
    (shown,) = parsed.find("img", "mistakes-D")
    kind, data = shown["attrs"]["src"].split(";base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{decoded.format.lower()}"
    assert (int(shown["attrs"]["width"]), int(shown["attrs"]["height"])) == decoded.size
    back = np.asarray(decoded.convert("RGB").resize((size, size)), np.int64)
    if size == 24:
        np.testing.assert_array_equal(back, image)
    assert np.abs(back - image).mean() < 4
    (item,) = parsed.find("li", "mistakes-D")
    assert " ".join(item["text"].split()) == "cat, taken for dog (75.1 %)"


def test_texts_are_escaped(page):
    found = replace(
        confused(2),
        class_names=(EVIL, '"><img src=x>'),
        mistakes=[Mistake(picture(0), '" onload="alert(1)', EVIL, 0.5)],
    )
    zeroshot = replace(classified(found, (EVIL,)), title=EVIL)
    retrieval = retrieved([gallery_row(f"{EVIL} \ud800 &amp;", [picture(1)], [False])])
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
    text, parsed = page(summary, history)
    sections = [section["attrs"]["id"] for section in parsed.find("section")]
    assert sections == ["curves", "not-evaluated", "data", "run"]
    for sentence in (
        "logged no metrics",
        "The run had no evaluation.",
        "No example was skipped",
        "No caption was longer",
    ):
        assert sentence in text
    assert not parsed.find("figure")
    assert not parsed.unbalanced


def test_what_the_model_cannot_do_is_said(page):
    summary = replace(SUMMARY, notes=["No retrieval evaluation: a model of words."])
    text, _ = page(summary, [], classified(confused(3)))
    assert "No retrieval evaluation: a model of words." in text
    assert "no evaluation." not in text


def test_class_without_examples_and_perfect_result(page):
    found = Confusion(("a", "b", "c"), np.array([[0, 0], [2, 2]]), np.array([4, 3]))
    _, parsed = page(SUMMARY, [], classified(found))
    assert [row[:4] for row in parsed.rows("classes-D")][1] == ["b", "0", "0", "–"]


def test_each_metric_is_shown_once_with_its_last_value_and_chance(page):
    last = {"zeroshot/imagenet/top1": 0.4, "zeroshot/mean": 0.3, "linear_probe/mean": 0.6}
    history = [*curves(), {"step": 800, "data/queue_length": 3.0, **last}]
    _, parsed = page(SUMMARY, history, classified(confused(10)), retrieved())
    figures = {f["text"].split("\n")[1].strip(): f["text"] for f in parsed.find("figure")}
    assert list(figures) == [
        "loss",
        "zero-shot accuracy",
        "retrieval: text to image",
        "mean over data sets",
        "grad norm",
        "data: queue length",
        "zero-shot accuracy: imagenet: top1",
    ]
    assert "50.0\xa0% chance 10.0\xa0%" in " ".join(figures["zero-shot accuracy"].split(" "))
    assert "chance 0.2\xa0%" in figures["retrieval: text to image"]
    assert "0.006667" in figures["loss"]  # 5 / 750
    assert "chance" not in figures["loss"]


def test_families_share_a_plot(page):
    names = ["train/images_per_second", "train/images_per_second_per_chip", "train/grad_norm"]
    names += [f"train/grad_norm/{part}" for part in ("image", "text", "other")]
    names += ["time/train", "time/data", "device/memory_gib", "device/peak_memory_gib"]
    names += ["host/memory_gib", "host/threads", "bias/all/age", "bias/all/race"]
    _, parsed = page(SUMMARY, [{"step": step, **dict.fromkeys(names, 2.0)} for step in (1, 2)])
    lines = [[line.strip() for line in f["text"].split("\n")] for f in parsed.find("figure")]
    titles = ["images per second", "grad norm", "device", "host: memory (GiB)"]
    titles += ["host: threads", "bias: all: age", "bias: all: race"]
    assert [line[1] for line in lines] == titles
    assert " ".join(filter(None, lines[1])).endswith("grad norm 2 image 2 text 2 other 2")


def test_what_says_nothing_is_not_drawn(page):
    """Counters that stay at zero; and one evaluation stands in the run, not around itself."""
    rows = [{"step": step, "data/skipped": 0, "data/truncated": step // 20} for step in (10, 20)]
    rows.append({"step": 20, "zeroshot/top1": 0.5, "train/mfu": 0.4})
    _, parsed = page(SUMMARY, rows)
    figures = {next(iter(f["text"].split("\n")[1:])).strip(): f for f in parsed.find("figure")}
    assert list(figures) == ["zero-shot accuracy", "data: truncated", "MFU"]
    assert "40.0\xa0%" in figures["MFU"]["text"]
    assert [text["text"] for text in parsed.find("text")][:5] == ["0", "5", "10", "15", "20"]


def test_diverged_run_is_drawn(page):
    values = [1.0, float("nan"), float("inf"), 2.0, float("nan")]
    history = [{"step": i, "train/loss": value} for i, value in enumerate(values)]
    text, _ = page(SUMMARY, history)
    assert "<b>not finite</b>" in text
    assert not re.search(r"\b(nan|inf)\b", text)
    page(SUMMARY, [{"step": 1, "train/loss": float("nan")}])


def test_same_input_same_bytes(page):
    first, _ = page(SUMMARY, curves(), classified(confused(10)), retrieved())
    second, _ = page(SUMMARY, curves(), classified(confused(10)), retrieved())
    assert first == second
