"""Which instruments a run measures with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from shared.metrics.encoders import ImageEncoder, Instruments, load_clip, load_dino
from shared.metrics.toybox import load_toybox, toybox_look_alikes

#: The evaluators of a world of its own, by the name that a backbone states.
OWN: Mapping[str, Callable[[], Instruments]] = {"toybox": load_toybox}


def look_alikes(files: Sequence[Path]) -> tuple[dict[str, Tensor] | None, Tensor | None]:
    """Other things of the class, and new pictures of the thing that these pictures show, where a world knows it.

    Returns:
        name -> [n, 3, H, W], and [F, 3, H, W], in [-1, 1]; None where no world knows the pictures
    """
    return toybox_look_alikes(files)


def load_instruments(
    clip: Path | str | None = None, dino: Path | str | None = None, evaluators: str | None = None, device: str = "cpu"
) -> Instruments:
    """The instruments for a run. A folder takes the place of a world's own; without a DINO, CLIP judges likeness too.

    evaluators: those of the world that the pictures are of (`World.instruments`); of others they mean nothing.
    ValueError when nothing is left to measure with.
    """
    owned = OWN[evaluators]() if evaluators else Instruments()
    text = load_clip(clip, device) if clip else owned.text_image
    who: ImageEncoder | None = load_dino(dino, device) if dino else owned.identity or text
    if who is None:
        raise ValueError(
            "nothing to measure with: give a local CLIP folder (clip=PATH), a DINO folder (dino=PATH), or both"
        )
    return Instruments(text, who, owned.attributes)
