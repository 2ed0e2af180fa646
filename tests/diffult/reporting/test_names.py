"""Class names that no encoding and no XML holds, in pages and pictures."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from report_pages import Page, example_comparison, example_content

from diffult.config import load_preset
from diffult.reporting.comparison import render as render_comparison
from diffult.reporting.run import render
from diffult.reporting.text import readable, shortened

NAMES = (
    "caf\udce9",
    "th\udce8",
    "a\nb\x01",
    "\x00\x7f\x85",
    "\ufffe\uffff",
    "$x_1$<b>&\"'",
    "日本 語🙂",
    "\u202e\u2028",
)


def test_every_character_that_can_be_written_is() -> None:
    assert readable("日本 語🙂 $x_1$<b>&\t\n") == "日本 語🙂 $x_1$<b>&\t\n"
    assert [readable(name) for name in NAMES[:5]] == [
        r"caf\udce9",
        r"th\udce8",
        "a\nb\\x01",
        r"\x00\x7f\x85",
        r"\ufffe\uffff",
    ]
    assert shortened("a\n b\x01") == r"a b\x01"


@pytest.mark.filterwarnings("error::UserWarning")
def test_reports_of_such_classes_are_whole() -> None:
    config = load_preset("digits-lt", ["generate.balance_to=40"])
    for html in (render(example_content(config, NAMES)), render_comparison(example_comparison(NAMES))):
        text = html.encode("utf-8").decode("utf-8")  # raises for what is no text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", text)
        drawings = re.findall(r"<svg.*?</svg>", text, re.S)
        assert drawings
        for drawing in drawings:
            ElementTree.fromstring(drawing)  # raises for what is no XML
        assert r"caf\udce9" in text and r"th\udce8" in text and "日本 語🙂" in Page(text).text
