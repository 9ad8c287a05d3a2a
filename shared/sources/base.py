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
        """The role of the source's examples."""
        return "instance"

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        """Checks everything that can be checked before a model is loaded.

        Args:
            earlier: the names of the phases before the one that has this source

        Returns:
            the mask, or None, of each picture of role "instance" that already exists as a file

        Raises:
            ValueError: when a file, a subject or a phase is missing
        """
        return {}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the examples lazily, in the same order each time."""
        raise NotImplementedError
