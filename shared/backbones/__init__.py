"""Model families that share one protocol. This package loads no model library when it is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.backbones.load import load_backbone

if TYPE_CHECKING:
    from shared.backbones.protocol import Backbone

__all__ = ["Backbone", "load_backbone"]


def __getattr__(name: str) -> Any:
    if name == "Backbone":
        from shared.backbones.protocol import Backbone

        return Backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
