"""Detects other programs' prompt syntax, which the text encoder would silently read as plain words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator

_NUMBER = r"[+-]?\d*[.,]?\d+"
_NETWORK = re.compile(
    rf"<\s*(?:(?:lora|lyco|lycoris|locon|loha|lokr|dora|hypernet|ti)\s*:|\w+\s*:(?=[^:<>]*:\s*{_NUMBER}))"
    r"\s*([^:<>]*)(?::([^<>]*))?>",
    re.IGNORECASE,
)
_STRENGTH = re.compile(rf"<\s*([^:<>]*[^\W\d_][^:<>]*):\s*({_NUMBER})\s*>")
_EMBEDDING = re.compile(r"\bembedding:\s*([\w.-]+)", re.IGNORECASE)
_CONTROL = re.compile(r"<\|\w+\|>|</s>")
_BRACKETS = re.compile(r"<(\s*[^\W\d_][^<>]*)>")
_WEIGHTS = (
    # (cat:1.2), but neither (ratio 4:3) nor (at 10:30), because a weight after a digit must have decimals
    re.compile(rf"(?<!\()\(+[^()]*?(?:[^()\d\s]\s*:\s*{_NUMBER}|\d\s*:\s*\d*[.,]\d+)\s*\)+"),
    re.compile(r"\([^()]*[^\W\d_][^()]*\)(?:\++|-{2,}|\d*\.?\d+)(?![\w+-])"),  # (cat)++, (cat)1.3
    re.compile(r"(?<!\()\({2,}[^()]*\){2,}"),  # ((cat))
    re.compile(r"\b[^\W\d_]{2,}(?:\+{2,}|-{2,}(?=\s*(?:,|$)))"),  # cat++, but not C++, which is a word
    re.compile(r"(?<![\w>)])[\w>)]+::(?:\s*-?\d*\.?\d+(?!\w)|(?=\s|$))"),  # cat::2
)
_SQUARE = re.compile(r"\[+([^\[\]:|]*[^\W\d_][^\[\]:|]*)\]+")
_SCHEDULE = re.compile(r"\[[^\[\]]*:[^\[\]]*\d\]|\[[^\[\]]*\|[^\[\]]*\]")
_CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}|\b__[\w/-]+__\b")
_ESCAPED = re.compile(r"\\\([^()\\]*\\\)|\\[()\[\]{}]")
_JOINED = (
    # keywords such as AND and BREAK, but not in "ROCK AND ROLL" or "COFFEE BREAK", where they are ordinary words
    re.compile(r"(?<![A-Z] )\bAND\b|\bAND\b(?! [A-Z](?![a-z]))"),
    re.compile(r"(?<![A-Z] )\b(?:BREAK|ADDCOMM|ADDBASE|ADDROW|ADDCOL)\b(?! [A-Z](?![a-z]))"),
    re.compile(r"\.(?:and|blend|swap)\("),
)
_OPTION = re.compile(r"(?<!\S)--(?:[a-z]+ +\d[\d.:]*|(?:no|niji|tile|raw|hd|style|sref|cref|fast|turbo|relax|p)\b)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

_How = Callable[[re.Match[str], Collection[str]], str]
_NO_WEIGHTS = "words have no weights here, but a concept has a strength (--concept PATH:0.8)"


def _network(found: re.Match[str], names: Collection[str]) -> str:
    strength = f":{found[2].split(':')[0].strip()}" if found[2] else ""
    name = _loaded(found[1], names) or _valid(found[1]) or "NAME"
    return (
        f"load it with --concept {name}.concept{strength} (or --lora FILE{strength}), and write <{name}> in the prompt"
    )


def _strength(found: re.Match[str], names: Collection[str]) -> str:
    name, strength = _loaded(found[1], names) or _valid(found[1]) or "NAME", found[2].replace(",", ".")
    return f"set the strength with the option --concept {name}.concept:{strength}, and write <{name}> in the prompt"


def _named(found: re.Match[str], names: Collection[str]) -> str:
    return f"write <{_loaded(found[1], names) or _valid(found[1]) or 'NAME'}>"


def _square(found: re.Match[str], names: Collection[str]) -> str:
    return f"write <{name}>" if (name := _loaded(found[1], names)) else _NO_WEIGHTS


def _always(how: str) -> _How:
    return lambda *_: how


_FORMS: tuple[tuple[re.Pattern[str], _How], ...] = (  # text that one form matches is skipped by later forms
    (_NETWORK, _network),
    (_STRENGTH, _strength),
    (_EMBEDDING, _named),
    (_ESCAPED, _always("write brackets without backslashes")),
    *((pattern, _always(_NO_WEIGHTS)) for pattern in _WEIGHTS),
    (
        _SCHEDULE,
        _always("words cannot change between steps, but a concept's strength can (--strength NAME=0@0,1@0.2)"),
    ),
    (_SQUARE, _square),
    (_CHOICE, _always("write out each prompt separately")),
    *((pattern, _always("a prompt is a single text here, so write one sentence")) for pattern in _JOINED),
    (_OPTION, _always("options such as --width, --seed and --negative go outside the prompt")),
)


def foreign_syntax(prompt: str, names: Collection[str] = ()) -> Iterator[str]:
    """Yields, for each use of another program's syntax in a prompt, a sentence that explains what to write instead.

    Args:
        names: the names of the loaded concepts
    """
    said: set[str] = set()
    taken: list[tuple[int, int]] = []
    for pattern, here in _FORMS:
        for found in pattern.finditer(prompt):
            start, end = found.span()
            if any(start < e and s < end for s, e in taken):
                continue
            taken.append((start, end))
            if found[0] not in said:
                said.add(found[0])
                yield f"{found[0]!r} is read as plain words; {here(found, names)}"
    for mark in dict.fromkeys(_CONTROL.findall(prompt)):
        yield f"{mark!r} is not text but a control token of the text encoder; leave it out"
    known = ", ".join(f"<{n}>" for n in sorted(names)) or "none"
    for found in _BRACKETS.finditer(prompt):
        if not _NAME.fullmatch(found[1]) and not any(s < found.end() and found.start() < e for s, e in taken):
            how = f"write <{name}>" if (name := _loaded(found[1], names)) else "leave the brackets out"
            yield f"{found[0]!r} is not a concept's name and is read as plain words; {how} (loaded concepts: {known})"


def _loaded(text: str, names: Collection[str]) -> str:
    """Returns the name of the loaded concept that the text refers to, or "" if there is none."""
    return next((n for n in names if n.lower() == _valid(text).lower()), "")


def _valid(text: str) -> str:
    """Returns the text as a valid name ("Émile 2" -> "Emile-2"), or "" if it has no Latin letters or digits."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_-]+", "-", plain.strip()).strip("-_")
