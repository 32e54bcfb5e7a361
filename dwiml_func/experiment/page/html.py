"""HTML as a tree of elements, so that every text from a file is escaped where it is written."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

__all__ = ["document", "image", "json_block", "rows_table", "tag"]


def tag(name: str, /, *children: Element | str, **attributes: str) -> Element:
    """An element. Of names of attributes a last underscore is dropped, and others are hyphens: `for_`, `aria_label`."""
    element = Element(name, {key.rstrip("_").replace("_", "-"): _clean(value) for key, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + _clean(child)
        else:
            element.text = (element.text or "") + _clean(child)
    return element


def rows_table(
    head: Sequence[str], rows: Iterable[Sequence[Element | str]], *, caption: str = "", kind: str = "wide"
) -> Element:
    """A table whose first cells name their rows; it scrolls sideways where it is too wide. `kind` is its class."""
    cells = [tag("thead", tag("tr", *(tag("th", text, scope="col") for text in head)))] if any(head) else []
    body = tag(
        "tbody", *(tag("tr", tag("th", first, scope="row"), *(tag("td", c) for c in rest)) for first, *rest in rows)
    )
    name = {"aria_label": caption or " and ".join(filter(None, head)) or "names and values"}
    region = tag("div", tag("table", *cells, body), class_=kind, tabindex="0", role="region", **name)
    return tag("div", *([tag("p", caption, class_="caption")] if caption else []), region)


def image(svg: bytes, *, text: str) -> Element:
    """A drawing, as an image: nothing in it can run or meet a name of the page."""
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return tag("img", src=source, alt=text)


def json_block(name: str, data: Any) -> Element:
    """Data for a script of the page, by the id of their element."""
    text = json.dumps(data).replace("<", "\\u003c")  # so nothing in it can end the element
    return tag("script", text, type="application/json", id=name)


def document(title: str, body: Iterable[Element], *, style: str, script: str) -> str:
    """The whole file, in ASCII. Its policy lets a browser load nothing, and run this script alone."""
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    page = tag("html", head, tag("body", *body, tag("script", script)), lang="en")
    return "<!DOCTYPE html>\n" + tostring(page, encoding="us-ascii", method="html").decode() + "\n"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _clean(text: str) -> str:
    """Control characters and what turns the direction of writing are shown, and change nothing."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
