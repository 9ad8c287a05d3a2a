"""What every source has in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shared.config import KindPart
from shared.sources.source_context import SourceContext
from shared.types import Example, Role, Subject


class SourcePart(KindPart):
    """Where examples come from."""

    @property
    def gives(self) -> Role:
        """The role of its examples."""
        return "instance"

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        """What can be known before a model is loaded.

        Args:
            earlier: the phases before the one that it is a source of

        Returns:
            of its pictures of role "instance", those that are files by now, each with the mask that came with it

        Raises:
            ValueError: for files, subjects and phases that are not there
        """
        return {}

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Lazily, in the same order each time."""
        raise NotImplementedError
