"""Draws contact sheets of clips. Each row shows the frames of one clip from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shared.config import unknown
from shared.io.contact_sheets import check_tiles, contact_sheet, write_picture
from shared.io.outputs import check_file
from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.motions.clips import Clip, draw_clip, sample_moving
from shared.toybox.motions.held_out import motion_names


def clip_sheet(clips: Sequence[tuple[str, Clip]], columns: int = 8, tile: int = 128) -> Image.Image:
    """Draws a sheet of labelled clips. Each row shows at most `columns` frames, evenly spaced from the first to the
    last.

    Labels may repeat. Raises ValueError if there are no clips.
    """
    rows = {}
    for number, (label, clip) in enumerate(clips):
        count = min(columns, len(clip.frames))
        at = np.linspace(0, len(clip.frames) - 1, count).round().astype(int)
        # Rows are keyed by label; trailing spaces, which are not drawn, keep equal labels apart.
        rows[label + " " * number] = clip.frames[at].permute(0, 3, 1, 2) * 2 - 1
    return contact_sheet(rows, tile)


def write_motion_sheet(
    out: Path, names: Sequence[str], sizes: tuple[int, int, int] = (1, 8, 16), seed: int = 0, overwrite: bool = False
) -> Path:
    """Writes a PNG with clips of the motions in `names`, or of all motions if `names` is empty.

    Held-out motions are given by their full names, such as `development-zigzag`. Raises ValueError if a motion is
    unknown, if the sheet is too large, or if `out` is not the path of a PNG that may be written.

    sizes: the number of clips per motion, the number of frames shown per clip, and the number of frames per clip
    """
    rows, columns, frames = sizes
    motions = {**MOTIONS, **motion_names()}
    for name in names:
        if name not in motions:
            raise ValueError(unknown(name, motions, "toybox motion"))
    shown = rows * len(names or motions) * min(columns, frames)
    check_tiles(shown, f"--rows {rows} --columns {columns}")
    out = check_file(out, overwrite)
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out} cannot be written: its name must end in .png")
    rng = np.random.default_rng([seed, 15])
    clips = [
        (name, draw_clip(sample_moving(rng, motions[name], frames))) for name in names or motions for _ in range(rows)
    ]
    return write_picture(clip_sheet(clips, columns), out)
