"""Chooses the instruments that a run measures with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shared.metrics.encoders import ImageEncoder, Instruments, load_clip, load_dino
from shared.metrics.toybox import load_toybox, toybox_known
from shared.metrics.true_thing import Known

#: The evaluators of the worlds that have their own, keyed by the backbone's `World.instruments`.
OWN: Mapping[str, Callable[[], Instruments]] = {"toybox": load_toybox}


def known_thing(files: Sequence[Path]) -> Known | None:
    """Returns what a world knows about the thing in these pictures, or None if no world can draw it."""
    return toybox_known(files)


def load_instruments(
    clip: Path | str | None = None, dino: Path | str | None = None, evaluators: str | None = None, device: str = "cpu"
) -> Instruments:
    """Loads the instruments for a run. A given CLIP or DINO model replaces the world's own. CLIP judges likeness if
    nothing else can.

    evaluators: the world whose own evaluators are used (`World.instruments`). They are meaningless on pictures from
        elsewhere

    Raises ValueError if there is nothing to measure with.
    """
    owned = OWN[evaluators]() if evaluators else Instruments()
    text = load_clip(clip, device) if clip else owned.text_image
    who: ImageEncoder | None = load_dino(dino, device) if dino else owned.identity or text
    if who is None:
        raise ValueError(
            "nothing to measure with: give a local CLIP folder (clip=PATH), a DINO folder (dino=PATH), or both"
        )
    typical = None if dino else owned.typical  # these readings are valid only for the world's own encoder
    return replace(owned, text_image=text, identity=who, typical=typical)
