"""The base class of all sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shared.config import KindPart
from shared.sources.source_context import SourceContext
from shared.types import Example, Role, Subject


class SourcePart(KindPart):
    """A source of examples."""

    @property
    def gives(self) -> Role:
        """The role of its examples."""
        return "instance"

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        """Checks everything that can be checked before a model is loaded.

        Args:
            earlier: the phases before the one that has this source

        Returns:
            its pictures of role "instance" that already exist as files, each with its mask or None

        Raises:
            ValueError: for missing files, subjects and phases
        """
        return {}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields its examples lazily, in the same order each time."""
        raise NotImplementedError
