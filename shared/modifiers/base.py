"""What every modifier attaches: the name of one concept on one backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from shared.types import SiteContext


class PlaceholderBase:
    """Words and nothing learned; the base of the others. Satisfies `shared.backbones.protocol.Placeholder`."""

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
        """Words have none. A placeholder that learns says how it goes from its start to what it learned, or refuses."""
        if strength != 1 and any(True for _ in self.parameters()):
            raise ValueError(f"{self.name!r}: what its words learned has no strength but 1; asked for {strength:g}")

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"this concept's name learns nothing, but {len(state)} tensors were given for it")

    def initial_state_dict(self) -> dict[str, Tensor]:
        """Empty: no strengths between start and learned."""
        return {}

    def load_initial_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when there is anything to load."""
        if state:
            raise ValueError(f"{self.name!r} keeps no start of its words, but {len(state)} tensors were given for it")


def phrase(words: str, class_noun: str, with_class_noun: bool) -> str:
    """Modifier and class noun, without an article."""
    return f"{words} {class_noun}".strip() if with_class_noun else words
