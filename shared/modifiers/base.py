"""Defines the base class of placeholders. A modifier attaches one placeholder to the backbone for each concept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from shared.types import SiteContext


class PlaceholderBase:
    """A placeholder (`shared.backbones.protocol.Placeholder`) with plain words, which are not learned. The
    classes of other placeholders derive from this one."""

    tokens: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    varies_with: frozenset[str] = frozenset()

    def __init__(self, name: str, words: str, frozen: bool = False) -> None:
        self.name, self.words, self.frozen = name, words, frozen

    def embeddings(self, component: str, t: Tensor | None, site: str | None) -> Tensor | None:
        return None

    def edit(self, context: SiteContext, positions: Tensor, t: Tensor | None, site: str | None) -> SiteContext:
        return context

    def set_strength(self, strength: float) -> None:
        """Does nothing for plain words, because they have no strength. If the words are learned, raises ValueError for
        any strength other than 1.

        Subclasses may instead interpolate between the initial and the learned vectors.
        """
        if strength != 1 and any(True for _ in self.parameters()):
            raise ValueError(f"the learned words of {self.name!r} work only at strength 1, not {strength:g}")

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            given = f"{len(state)} tensor{'s' if len(state) > 1 else ''}"
            raise ValueError(f"{self.name!r} has no learned words, but was given {given} for them")

    def initial_state_dict(self) -> dict[str, Tensor]:
        """Returns an empty dictionary, because this placeholder cannot interpolate from an initial state."""
        return {}

    def load_initial_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError if there is anything to load."""
        if state:
            given = f"{len(state)} tensor{'s' if len(state) > 1 else ''}"
            raise ValueError(f"{self.name!r} has no initial words, but was given {given} for them")


def phrase(words: str, class_noun: str, with_class_noun: bool) -> str:
    """Returns the modifier's words, followed by the class noun if `with_class_noun` is set. No article is added."""
    return f"{words} {class_noun}".strip() if with_class_noun else words
