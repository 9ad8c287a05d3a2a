"""Makes untrusted text safe for the terminal and for output files: characters that move the cursor, change colours or hide
other text are removed or escaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_KEPT = "\n\t"
_SHOWN = 8  # the maximum number of names in a message
# Bidirectional control characters, which can disguise text as different text.
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: object, line: bool = False) -> str:
    """Removes control characters (C0 and C1), lone surrogates and bidirectional marks. Line breaks and tabs are kept.

    line: whether to turn line breaks and tabs into spaces, so that a name cannot pose as a separate message
    """
    words = "".join(c for c in str(text) if c in _KEPT or not (unicodedata.category(c) in ("Cc", "Cs") or c in _TURNS))
    return words.replace("\n", " ").replace("\t", " ") if line else words


def encodable(text: str) -> str:
    """Escapes the characters that UTF-8 cannot encode (lone surrogates, which come from undecodable bytes)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def escaped_name(name: str) -> str:
    """Turns a file name into printable text without folder separators, so that it can be stored and shown anywhere.

    Printable characters, including the plain space, are kept. Every other character becomes its Python escape
    (`\\uXXXX`, or `\\UXXXXXXXX` above U+FFFF): controls, other separators (U+00A0, U+202F, U+3000), joiners, lone
    surrogates (bytes that were not UTF-8), `/` and `\\` itself. Escapes are reversible, so different names stay
    different.
    """
    return "".join(c if c.isprintable() and c not in "/\\" else _escape(c) for c in name)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def check_utf8(text: str) -> str:
    """Returns the text.

    Raises ValueError if it contains a lone surrogate, which represents an undecodable byte or half a character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text!r} is not UTF-8 text (character {error.start + 1} is {text[error.start]!r}): type it again in a terminal "
            "or editor that is set to UTF-8"
        ) from None
    return text


def names(items: Iterable[str]) -> str:
    """Formats a list for a message: at most eight names, then how many more there are."""
    every = list(items)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
