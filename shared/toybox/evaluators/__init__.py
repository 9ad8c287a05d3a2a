"""The toybox's measuring instruments: an attribute recognizer, an identity encoder, a CLIP model and a pose estimator.

`weights/CARD.md` states how reliable each one is. Imports are lazy, so importing this package does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.toybox.evaluators.clip import load_clip
    from shared.toybox.evaluators.identity import IdentityEncoder, load_identity
    from shared.toybox.evaluators.recognizer import Recognizer, load_recognizer

__all__ = ["IdentityEncoder", "Recognizer", "load_clip", "load_identity", "load_recognizer"]
_HOME = {
    "IdentityEncoder": "identity",
    "Recognizer": "recognizer",
    "load_clip": "clip",
    "load_identity": "identity",
    "load_recognizer": "recognizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
