"""Expands a user's prompt into the text that the text encoder reads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping

from shared.backbones.protocol import Placeholder
from shared.prompts.foreign_syntax import foreign_syntax

_NAME = re.compile(r"<([A-Za-z0-9][A-Za-z0-9_-]*)>")


def names_in(prompt: str) -> tuple[str, ...]:
    """Lists the concepts that a prompt names as `<name>`, in order and without duplicates."""
    return tuple(dict.fromkeys(_NAME.findall(prompt)))


def expand(prompt: str, placeholders: Mapping[str, Placeholder]) -> str:
    """Replaces every `<name>` with the words that stand for the concept.

    Raises ValueError, listing the loaded names, if a name is not loaded. Warns about other programs' syntax,
    which is read as plain words here.
    """
    check_known(prompt, placeholders)
    for said in foreign_syntax(prompt, placeholders):
        warnings.warn(said, UserWarning, stacklevel=2)
    expanded = _NAME.sub(lambda m: placeholders[m.group(1)].words, prompt)
    return re.sub(r"\s+", " ", expanded).strip()


def check_known(prompt: str, loaded: Collection[str]) -> None:
    """Raises ValueError, listing the loaded names, if the prompt names a concept that is not loaded."""
    for name in names_in(prompt):
        if name not in loaded:
            known = ", ".join(f"<{n}>" for n in sorted(loaded)) or "none"
            raise ValueError(f"the prompt names <{name}>, which is not loaded; loaded concepts: {known}")


def without(prompt: str, class_nouns: Mapping[str, str]) -> str:
    """Replaces each `<name>` in a prompt with the concept's class noun, for use with the base model."""
    return re.sub(r"\s+", " ", _NAME.sub(lambda m: class_nouns.get(m.group(1), m.group(0)), prompt)).strip()


def check_named(prompt: str, must: Mapping[str, str]) -> None:
    """Raises ValueError if the prompt does not name every loaded subject. Motions and styles need not be named.

    Args:
        must: the kind of each loaded concept, by the concept's name
    """
    named = names_in(prompt)
    for name, kind in must.items():
        if kind in ("subject", "identity") and name not in named:
            raise ValueError(
                f"{name!r} is loaded, but the prompt {prompt!r} does not name it; write <{name}> where it should appear"
            )
