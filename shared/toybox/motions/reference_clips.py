"""Writes folders of clips of held-out motions, like those that a user would provide. The clips in a folder show one
motion in different places, performed by different things or by one held-out thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from shared.io.contact_sheets import write_picture
from shared.io.outputs import atomic_folder, check_output
from shared.toybox.motions.clip_captions import plain_clip_caption
from shared.toybox.motions.clips import MovingScene, draw_clip, sample_moving
from shared.toybox.motions.held_out import held_out_motion
from shared.toybox.reference_sets import held_out
from shared.toybox.world import BACKGROUNDS, CLASSES, SEEDS, Thing

KEY = "toybox-motion"
FRAMES = range(2, 65)  # the frame counts that a clip may have


def write_frames(frames: Tensor, path: Path, about: dict[str, str]) -> Path:
    """Writes frames [F, 3, H, W] in [-1, 1] as a folder of PNGs named `000.png`, `001.png` and so on. Each PNG stores the
    metadata. Returns the folder."""
    for i, frame in enumerate(frames):
        write_picture(frame, path / f"{i:03d}.png", about)
    return path


def reference_moving(name: str, n: int, seed: int, frames: int = 16, thing: Thing | None = None) -> list[MovingScene]:
    """Samples n clips of a held-out motion, each with a different background. All of them show `thing`, if it is given, and
    otherwise each shows a plain thing of a different class.

    Things are plain so that captions can describe them. Classes and backgrounds repeat only after all of them have been
    used. Raises ValueError if the motion is unknown or if the number of frames is invalid.
    """
    motion = held_out_motion(name)
    if frames not in FRAMES:
        raise ValueError(f"a clip must have {FRAMES[0]} to {FRAMES[-1]} frames, not {frames}")
    rng = np.random.default_rng([seed, SEEDS[name.split("-")[0]].start, 16])
    kinds, places = rng.permutation(len(CLASSES)), rng.permutation(len(BACKGROUNDS))
    out = []
    for i in range(n):
        performer: dict[str, Any] = {"thing": thing}
        if thing is None:
            performer = {"class_name": CLASSES[kinds[i % len(kinds)]], "accessory": "none", "pattern": False}
        place = BACKGROUNDS[places[i % len(places)]]
        out.append(sample_moving(rng, motion, frames, background=place, style="photo", **performer))
    return out


def write_motion(
    name: str,
    folder: Path,
    n: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    frames: int = 16,
    thing: str = "",
) -> list[Path]:
    """Writes n clips of a held-out motion such as `development-zigzag`, so that the motion can be learned from them. By
    default, the first frame is `00/000.png`. If `thing` names a held-out thing such as `development-duck`, it performs
    the motion in all clips.

    Each clip comes with two additions that a careful user would make. One is a caption that describes the thing and its
    place but not the motion (`00/caption.txt`). The other is the thing's mask in each frame (`masks/00/000.png`). The
    motion's name is stored in the metadata of each frame. Returns the clips' folders. Raises ValueError whenever
    `reference_moving` or `atomic_folder` does, or if `thing` is unknown.
    """
    check_output(folder, overwrite)
    moving = reference_moving(name, n, seed, frames, held_out(thing).thing if thing else None)
    written = []
    with atomic_folder(folder, overwrite) as out:
        for i, scene in enumerate(moving):
            drawn = draw_clip(scene)
            clip = write_frames(drawn.frames.permute(0, 3, 1, 2) * 2 - 1, out / f"{i:02d}", {KEY: name})
            (clip / "caption.txt").write_text(plain_clip_caption(scene) + "\n", "utf-8")
            write_frames(drawn.mask[:, None].expand(-1, 3, -1, -1) * 2 - 1, out / "masks" / f"{i:02d}", {})
            written.append(folder / clip.name)
    return written
