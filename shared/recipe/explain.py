"""Writes a resolved recipe as annotated YAML. Each part is explained above its settings. Each setting is explained
at the end of its line, or above that line if its value spans several lines."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from textwrap import dedent, wrap
from typing import Any

import yaml
from pydantic import BaseModel

_WIDTH = 120


def explained(recipe: BaseModel, data: Mapping[str, Any]) -> str:
    """Returns `data` (the dump of `recipe`) as YAML, with comments taken from the classes of the recipe's parts."""
    return "\n".join(_lines(recipe, data, 0)) + "\n"


def _lines(model: Any, data: Mapping[str, Any], depth: int) -> Iterator[str]:
    notes = comments(type(model)) if isinstance(model, BaseModel) else {}
    pad = "  " * depth
    for key, value in data.items():
        part = model.get(key) if isinstance(model, Mapping) else getattr(model, key, None)
        if isinstance(value, Mapping) and value and isinstance(part, BaseModel | Mapping):
            yield f"{pad}{key}:" + (f"  # {notes[key]}" if key in notes else "")
            if isinstance(part, BaseModel):
                yield from (f"{pad}  # {line}".rstrip() for line in _documentation(type(part), _WIDTH - 4 - 2 * depth))
            yield from _lines(part, value, depth + 1)
            continue
        # with None, PyYAML writes lists of plain values in brackets
        flow = None if isinstance(value, list | dict) else False
        text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=_WIDTH, default_flow_style=flow)
        first, *rest = text.rstrip("\n").split("\n")
        if key in notes and rest:
            yield from (f"{pad}# {line}" for line in wrap(notes[key], max(40, _WIDTH - 2 - len(pad))))
        yield f"{pad}{first}" + (f"  # {notes[key]}" if key in notes and not rest else "")
        yield from (f"{pad}{line}" for line in rest)


def _documentation(part: type[BaseModel], width: int) -> Iterator[str]:
    """Yields the part's docstring, wrapped into lines."""
    for paragraph in inspect.cleandoc(part.__doc__ or "").split("\n\n"):
        yield from wrap(" ".join(paragraph.split()), max(40, width))


def _above(number: int, said: Mapping[int, str], lines: Sequence[str]) -> list[str]:
    """Returns the comments on the lines directly above line `number`."""
    first = number
    while first - 1 in said and lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return [said[n] for n in range(first, number)]


@cache
def comments(part: type[BaseModel]) -> dict[str, str]:
    """Maps each setting to its comment in the source of its class or a base class. This is the comment at the end of
    the setting's line or, failing that, the comment above the line. Classes whose source is unavailable are skipped."""
    out: dict[str, str] = {}
    for base in reversed(part.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            out |= _own_comments(base)
    return out


def _own_comments(part: type[BaseModel]) -> dict[str, str]:
    try:
        source = dedent(inspect.getsource(part))
    except (OSError, TypeError):
        return {}
    said = {t.start[0]: t.string.lstrip("#: ") for t in tokenize.generate_tokens(io.StringIO(source).readline)
            if t.type == tokenize.COMMENT}  # fmt: skip
    lines = source.split("\n")
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    out = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            words = [said[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in said]
            words = words or _above(node.lineno, said, lines)
            words = [w for w in words if not w.startswith(("type:", "noqa", "fmt:", "pyright:"))]
            if words:
                out[node.target.id] = " ".join(words)
    return out
