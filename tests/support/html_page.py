"""Pages read back with the standard library's HTML parser."""

import html
import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "input", "link", "path", "rect", "use", "circle"}


class Page(HTMLParser):
    """Elements in order, each with tag, attributes and text; tables by id as rows of texts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.unbalanced: list[str] = []
        self.feed(text)
        self.close()
        self.unbalanced += [element["tag"] for element in self.open]

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "parents": list(self.open)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] is self.elements[-1]:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop()["tag"] != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, tag: str, inside: str | None = None) -> list[dict]:
        """Elements of a tag, of those inside the element with an id."""
        return [
            element
            for element in self.elements
            if element["tag"] == tag
            and (inside is None or any(p["attrs"].get("id") == inside for p in element["parents"]))
        ]

    def rows(self, inside: str) -> list[list[str]]:
        """Cells of the table body with or within an id."""
        return [
            [
                " ".join(cell["text"].split())
                for cell in self.elements
                if cell["tag"] in ("td", "th") and any(parent is row for parent in cell["parents"])
            ]
            for row in self.find("tr", inside)
            if any(parent["tag"] == "tbody" for parent in row["parents"])
        ]


def check(text: str) -> Page:
    """A page that stands alone: balanced, every id once, nothing fetched, all pictures named."""
    page = Page(text)
    assert not page.unbalanced
    ids = [element["attrs"]["id"] for element in page.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        for name in ("src", "href"):
            value = element["attrs"].get(name) or "#"
            assert value.startswith(("#", "data:", "overlap-")), value
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)
    assert all(image["attrs"].get("alt") for image in page.find("img"))
    assert all(
        plot["attrs"].get("aria-label")
        for plot in page.find("svg")
        if plot["attrs"].get("class") == "plot"
    )
    targets = {a["attrs"]["href"][1:] for a in page.find("a") if a["attrs"]["href"][0] == "#"}
    assert targets <= set(ids)
    return page


def text_of(page: str) -> str:
    """Returns the text of a page, without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
