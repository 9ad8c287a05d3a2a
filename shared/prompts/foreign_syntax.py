"""Detects other programs' prompt syntax, which the text encoder would silently read as plain words."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

_NETWORK = re.compile(r"<(?:lora|lyco|hypernet|ti):\s*([^:<>]*)(?::([^<>]*))?>", re.IGNORECASE)
_EMBEDDING = re.compile(r"\bembedding:\s*([\w.-]+)", re.IGNORECASE)
_WEIGHT = re.compile(r"\(([^()]*?):\s*[+-]?\d*\.?\d+\s*\)")
_SCHEDULE = re.compile(r"\[[^\[\]]*:[^\[\]]*\d\]|\[[^\[\]]*\|[^\[\]]*\]")
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}|\b__[\w/-]+__\b")
_BRACKETS = re.compile(r"<(\s*[^\W\d_][^<>]*)>")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _network(found: re.Match[str], names: Collection[str]) -> str:
    name, strength = _fitting(found[1], names), f":{found[2].split(':')[0].strip()}" if found[2] else ""
    return f"load it with --concept {name}.concept{strength} (or --lora FILE{strength}), and write <{name}> for it"


def _named(found: re.Match[str], names: Collection[str]) -> str:
    return f"write <{_fitting(found[1], names)}>"


_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], Collection[str]], str]], ...] = (
    (_NETWORK, _network),
    (_EMBEDDING, _named),
    (_WEIGHT, lambda *_: "words have no weights here; a concept has a strength, --concept PATH:0.8"),
    (
        _SCHEDULE,
        lambda *_: "words cannot change between steps; a concept's strength can, --strength NAME=0@0,1@0.2",
    ),
    (_CHOICE, lambda *_: "write out each prompt separately"),
)


def foreign_syntax(prompt: str, names: Collection[str] = ()) -> Iterator[str]:
    """Yields one sentence for each piece of another program's syntax in a prompt, with the way to write it here.

    Args:
        names: the loaded concepts
    """
    for pattern, here in _FORMS:
        for found in pattern.finditer(prompt):
            yield f"{found[0]!r} is read as plain words: {here(found, names)}"
    for found in _BRACKETS.finditer(prompt):
        if not _NAME.fullmatch(found[1]) and not _NETWORK.fullmatch(found[0]):
            known = ", ".join(f"<{n}>" for n in sorted(names)) or "none"
            how = f"write <{name}>" if (name := _fitting(found[1], names)) else "leave the brackets out"
            yield f"{found[0]!r} is not a concept's name and is read as plain words: {how} (loaded concepts: {known})"


def _fitting(text: str, names: Collection[str]) -> str:
    """Returns the loaded concept that the text refers to, else the text as a valid name."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text.strip()).strip("-_")
    return next((n for n in names if n.lower() == name.lower()), name)
