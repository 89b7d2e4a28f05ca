"""HTML and SVG as element trees, so that every text and attribute is escaped by the serializer."""

from __future__ import annotations

from xml.etree import ElementTree

Element = ElementTree.Element


def element(tag: str, *children: str | Element, **attributes: str | float) -> Element:
    """An element with ``children`` in order. Attributes are written as in Python: ``class_``, ``stroke_width``."""
    node = Element(tag, {name.rstrip("_").replace("_", "-"): _text(value) for name, value in attributes.items()})
    for child in children:
        append(node, child)
    return node


def append(parent: Element, child: str | Element) -> None:
    """Put an element or a text behind all that ``parent`` has."""
    if not isinstance(child, str):
        parent.append(child)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + child
    else:
        parent.text = (parent.text or "") + child


def page(title: str, style: str, *body: Element) -> str:
    """A self-contained HTML document; ``style`` is CSS of our own, which goes in as it is."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    tree = element("html", head, element("body", *body), lang="en")
    return "<!doctype html>\n" + ElementTree.tostring(tree, encoding="unicode", method="html") + "\n"


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{round(value, 1):g}" if abs(value) < 1e5 else f"{value:.0f}"
