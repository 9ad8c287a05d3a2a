"""Which instruments a run measures with."""

from __future__ import annotations

from pathlib import Path

from shared.metrics.encoders import ImageEncoder, Instruments, load_clip, load_dino
from shared.metrics.toybox import load_toybox


def load_instruments(
    clip: Path | str | None = None, dino: Path | str | None = None, toybox: bool = False, device: str = "cpu"
) -> Instruments:
    """The instruments for a run. A folder takes the place of the toybox's own; without a DINO, CLIP judges likeness
    too.

    toybox: whether the pictures are the toybox's: only then do its evaluators mean anything.
    ValueError when nothing is left to measure with.
    """
    own = load_toybox() if toybox else Instruments()
    text = load_clip(clip, device) if clip else own.text_image
    who: ImageEncoder | None = load_dino(dino, device) if dino else own.identity or text
    if who is None:
        raise ValueError(
            "nothing to measure with: give a local CLIP folder (clip=PATH), a DINO folder (dino=PATH), or both"
        )
    return Instruments(text, who, own.attributes)
