# SPDX-License-Identifier: Apache-2.0
"""HTML and SVG as a tree: text becomes text nodes, so nothing in data can become a tag."""

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

Child = Element | str | int | float | None | list

# Not allowed in HTML text, or invisible: NUL and the other control characters but tab and newlines.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """`text` with control characters and lone surrogates made visible as U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def h(tag: str, *children: Child, **attributes: str | int | float | None) -> Element:
    """An element. `cls` is class, `_` in a name is `-`; attributes that are None are left out.

    Strings among `children` become text, lists are flattened, None is skipped.
    """
    element = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            name = "class" if name == "cls" else name.rstrip("_").replace("_", "-")
            element.set(name, clean(str(value)))
    append(element, *children)
    return element


def append(element: Element, *children: Child) -> Element:
    """Adds children to an element, as `h` does."""
    for child in children:
        if child is None:
            continue
        if isinstance(child, list):
            append(element, *child)
        elif isinstance(child, Element):
            element.append(child)
        else:
            text = clean(str(child))
            if len(element):
                element[-1].tail = (element[-1].tail or "") + text
            else:
                element.text = (element.text or "") + text
    return element


def render(root: Element) -> bytes:
    """The document as UTF-8, doctype included."""
    text = ElementTree.tostring(root, encoding="unicode", method="html")
    return ("<!doctype html>\n" + text + "\n").encode("utf-8", "replace")
