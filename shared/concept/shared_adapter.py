"""Lets several concepts share one adapter. An adapter learned for all of them in one run is then loaded only once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from shared.backbones.protocol import Adapter


class SharedAdapter:
    """One concept's share of an adapter. The adapter is applied only once, at the strength with the largest
    magnitude among those of its concepts, and is removed together with the last of these concepts."""

    def __init__(self, adapter: Adapter, owner: str, strengths: dict[str, float] | None = None) -> None:
        self.adapter, self.owner = adapter, owner
        # owner -> strength; all shares of the adapter use the same mapping
        self.strengths: dict[str, float] = {} if strengths is None else strengths

    def share(self, owner: str) -> SharedAdapter:
        """Returns the same adapter under another concept's name."""
        return SharedAdapter(self.adapter, owner, self.strengths)

    @property
    def slot(self) -> str:
        return self.adapter.slot

    def train(self, mode: bool) -> None:
        self.adapter.train(mode)

    def set_strength(self, strength: float) -> None:
        self.strengths[self.owner] = strength
        self._apply()

    def _apply(self) -> None:
        self.adapter.set_strength(max(self.strengths.values(), key=abs))

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.adapter.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.adapter.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.adapter.load_state_dict(state)

    def eject(self) -> None:
        self.strengths.pop(self.owner, None)
        if self.strengths:
            self._apply()
        else:
            self.adapter.eject()


def unshared(adapter: Adapter) -> Adapter:
    """Returns the adapter that a share refers to, or any other adapter unchanged."""
    return adapter.adapter if isinstance(adapter, SharedAdapter) else adapter
