"""How a finished field is written to files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Setting

from shared.config import Part, Positive


class ExportSettings(Part):
    """resolution: nodes along a side of the grid on which the surface is extracted.
    threshold: density at the surface; null: found automatically.
    faces: maximum number of triangles.
    texture: pixels along a side of the texture.
    all_parts: whether parts that are not connected to the largest one are kept.
    picture: pixels along a side of the renders and the turntable.
    frames: number of frames of the turntable.
    """

    resolution: Annotated[int, Setting(ge=8, le=512)] = 96
    threshold: Positive | None = None
    faces: Annotated[int, Setting(ge=16, le=10_000_000)] = 20_000
    texture: Annotated[int, Setting(ge=16, le=8192)] = 512
    all_parts: bool = False
    picture: Annotated[int, Setting(ge=16, le=4096)] = 256
    frames: Annotated[int, Setting(ge=8, le=960)] = 48
