"""The placeholder that every modifier attaches: one concept's name on one backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from shared.types import SiteContext


class PlaceholderBase:
    """Plain words that are not learned; the base of other placeholders. Satisfies `shared.backbones.protocol.Placeholder`."""

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
        """Raises ValueError for strengths other than 1 if words are learned; plain words have no strength.

        Subclasses may interpolate from the initial to the learned vectors instead.
        """
        if strength != 1 and any(True for _ in self.parameters()):
            raise ValueError(f"{self.name!r}: its learned words only work at strength 1, not {strength:g}")

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"this concept has no learned words, but there are {len(state)} tensors for it")

    def initial_state_dict(self) -> dict[str, Tensor]:
        """Returns nothing, because this placeholder cannot interpolate between its initial and its learned words."""
        return {}

    def load_initial_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError if there is anything to load."""
        if state:
            raise ValueError(f"{self.name!r} keeps no initial words, but there are {len(state)} tensors for them")


def phrase(words: str, class_noun: str, with_class_noun: bool) -> str:
    """Joins modifier and class noun, without an article."""
    return f"{words} {class_noun}".strip() if with_class_noun else words
