"""A placeholder whose embedding rows a test can choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shared.types import SiteContext


class FixedPlaceholder:
    """A placeholder whose rows are a given function of the component, the time and the site."""

    __test__ = False

    def __init__(
        self,
        name: str,
        tokens: tuple[str, ...],
        rows: Callable[[str, Tensor | None, str | None], Tensor] | None = None,
        varies_with: tuple[str, ...] = (),
        words: str | None = None,
        edit: Callable[[SiteContext, Tensor, str | None], SiteContext] | None = None,
    ) -> None:
        self.name, self.tokens, self.words = name, tokens, " ".join(tokens) if words is None else words
        self.varies_with = frozenset(varies_with)
        self.components = ()
        self._rows, self._edit = rows, edit

    def embeddings(self, component: str, t: Tensor | None, site: str | None) -> Tensor | None:
        return self._rows(component, t, site) if self._rows else None

    def edit(self, context: SiteContext, positions: Tensor, t: Tensor | None, site: str | None) -> SiteContext:
        return self._edit(context, positions, site) if self._edit else context

    def parameters(self) -> Any:
        return iter(())

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


WIDTH = {"text_encoder": 16, "text_encoder_2": 24}


def fixed(n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {c: torch.randn(n, d, generator=generator) for c, d in WIDTH.items()}
