"""Text of others on a terminal: what would move the cursor, change colours or hide other words is taken out."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
# Marks that turn the direction of reading: with them a text can show other words than it holds.
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: object, line: bool = False) -> str:
    """The text without control characters (C0, C1, half surrogates) and marks of direction; line ends and tabs stay.

    line: one line, so that a name cannot pretend to be a message of its own; line ends and tabs become spaces.
    """
    words = "".join(c for c in str(text) if c in _KEPT or not (unicodedata.category(c) in ("Cc", "Cs") or c in _TURNS))
    return words.replace("\n", " ").replace("\t", " ") if line else words
