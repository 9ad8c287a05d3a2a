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
            earlier: the names of the phases that come before the phase with this source

        Returns:
            a mapping from each existing picture file with the role "instance" to its mask file, or to None if it has no
            mask

        Raises:
            ValueError: if a file, a subject or a phase is missing
        """
        return {}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the examples lazily, in the same order each time."""
        raise NotImplementedError
