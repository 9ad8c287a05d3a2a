"""Parses `key=value` settings. Paths and strings are taken literally, and all other values are read as YAML."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from shared.config import expanded, parse_yaml, yaml_problem

_NONE = type(None)
_SHOWN = 200  # the maximum number of characters of a setting that are shown in a message


def parse_overrides(overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """Parses `["train.steps=5", "subject.images=cats #1"]` into nested mappings, using the field types of `model`.

    The text after `=` is taken literally if the field is a path or a string, and is read as YAML otherwise. There are
    two exceptions for paths and strings:

    - If the field takes several paths or strings, `[a.png, b.png]` is read as a YAML list, unless a file or folder has
      that name.
    - If the field can be unset, empty text (`subject.masks=`) unsets a path, and `null` unsets a string. For a path,
      `null` is a name like any other.

    If two overrides set the same key, the last one wins. Otherwise their order does not matter.
    """
    out: dict[str, Any] = {}
    for item in overrides:
        key, sep, text = item.partition("=")
        names = key.strip().split(".")
        if not sep or not all(names):
            raise ValueError(f"{item!r} is not a setting: write key=value, for example train.steps=500")
        try:
            node = _value(text, set(_leaves(model, names, model)))
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"cannot read the value of {_shortened(item)!r}: {yaml_problem(error, text)}") from None
        for name in reversed(names):
            node = {name: node}
        _gather(out, node)
    return out


def _shortened(item: str) -> str:
    return item if len(item) <= _SHOWN else f"{item[:_SHOWN]}…"


def _gather(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds `more` to `into`, in place. Mappings are merged; all other values are replaced."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _gather(into[key], value)
        else:
            into[key] = value


def _value(text: str, leaves: set[Any]) -> Any:
    """Parses the value of a field that may have any of the types in `leaves`; (type,) stands for a sequence of that type."""
    path = Path in leaves
    if not path and (str not in leaves or leaves - {str, _NONE, (str,)}):
        return parse_yaml(text)
    if _NONE in leaves and text == ("" if path else "null"):
        return None
    if leaves & {(Path,), (str,)} and text.lstrip().startswith("[") and not (path and expanded(text).exists()):
        return _strings(text) or text
    return text


class _Texts(yaml.SafeLoader):
    """A YAML loader that reads every scalar as a string, so that `[2024, true]` is a list of two names."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}


def _strings(text: str) -> list[str] | None:
    try:
        items = yaml.load(text, Loader=_Texts)
    except (yaml.YAMLError, RecursionError):
        return None
    return items if isinstance(items, list) and items and all(isinstance(f, str) for f in items) else None


def _leaves(annotation: Any, names: Sequence[str], root: type[BaseModel]) -> Iterator[Any]:
    """Yields the types that are allowed at the nested key `names` of `annotation`. Follows models, unions, slots and
    phase overlays."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(arguments[0], names, root)
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _leaves(argument, names, root)
    elif not names:
        sequence = origin in (tuple, list, Sequence)
        yield from ((inner,) for a in arguments[:1] for inner in _leaves(a, (), root)) if sequence else (annotation,)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation is root and names[0] == "phases" and len(names) > 2:
            yield from _leaves(root, names[2:], root)  # a phase is an overlay of the recipe
        elif names[0] in annotation.model_fields:
            yield from _leaves(annotation.model_fields[names[0]].annotation, names[1:], root)
    elif origin in (dict, Mapping):
        yield from _leaves(arguments[1], names[1:], root)
