"""Every file name that a system allows: read, matched, planned, printed and recorded."""

from __future__ import annotations

import codecs

import pytest

from shared.io.terminal import escaped_name

#: What people's systems put into names: macOS' screenshots, Japanese input, a web page, joined emoji, bytes of another age.
NAMES = (
    "Screenshot 2024-05-01 at 9.41.00\u202fAM",
    "写真\u3000一",
    "my\u00a0photo",
    "👩\u200d🚀",
    "a\\b",
    "caf\udce9",
    "tab\tand\nline",
    "cats #1",
)


@pytest.mark.parametrize("name", NAMES)
def test_an_escaped_name_is_printable_and_says_the_whole_name(name: str) -> None:
    said = escaped_name(name)
    assert said.isprintable() and "/" not in said
    said.encode("utf-8")
    assert codecs.decode(said.encode("ascii", "backslashreplace").decode(), "unicode_escape") == name


def test_plain_names_stay_as_they_are_and_others_stay_different() -> None:
    assert escaped_name("写真 naïve 🚀.png") == "写真 naïve 🚀.png"
    assert escaped_name("a\u00a0b") == "a\\u00a0b" != escaped_name("a\\u00a0b")
    assert escaped_name("\U000e0041/") == "\\U000e0041\\u002f"
