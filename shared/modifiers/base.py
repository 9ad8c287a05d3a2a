"""What every modifier attaches: one concept's name on one backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from shared.types import SiteContext


class PlaceholderBase:
    """Plain words that learn nothing; the base of the others. Satisfies `shared.backbones.protocol.Placeholder`."""

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
        """Plain words have no strength. A placeholder that learns interpolates from its start to what it learned, or
        refuses."""
        if strength != 1 and any(True for _ in self.parameters()):
            raise ValueError(f"{self.name!r}: its learned words only work at strength 1, not {strength:g}")

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"this concept has no learned words, but {len(state)} tensors were given for it")

    def initial_state_dict(self) -> dict[str, Tensor]:
        """Empty: it cannot interpolate between its start and what it learned."""
        return {}

    def load_initial_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when there is anything to load."""
        if state:
            raise ValueError(f"{self.name!r} keeps no initial words, but {len(state)} tensors were given for them")


def phrase(words: str, class_noun: str, with_class_noun: bool) -> str:
    """Joins modifier and class noun, without an article."""
    return f"{words} {class_noun}".strip() if with_class_noun else words
