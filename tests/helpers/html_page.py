"""A page as a test reads it."""

import re
from html.parser import HTMLParser

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Text, tags and attributes; fails on a tag that closes another one than the innermost."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.attributes, self.open, self.tags = "", [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(html: str) -> None:
    """Nothing runs and nothing is fetched; ids are unique, and every reference resolves."""
    page = Page(html)
    assert "script" not in page.tags
    for text in ("http:", "https:", "@import"):
        assert text not in html
    references = [
        value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href")
    ]
    assert all(
        reference.startswith(("data:image/png;base64,", "data:image/webp;base64,", "#"))
        for reference in references
    )
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {reference[1:] for reference in references if reference.startswith("#")}
    used |= {
        match
        for _, value in page.attributes
        for match in re.findall(r"url\(#([^)]+)\)", value or "")
    }
    assert used
    assert used <= set(ids)
