"""Settings for writing a finished field to files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Setting

from shared.config import Part, Positive


class ExportSettings(Part):
    """How a finished field is written to files.

    resolution: the number of nodes along each side of the grid on which the surface is extracted.
    threshold: the density at the surface. If null, it is found automatically.
    faces: the approximate maximum number of triangles.
    texture: the side length of the texture, in pixels.
    all_parts: whether to keep parts that are not connected to the largest part.
    picture: the side length of the renders and the turntable, in pixels.
    frames: the number of frames in the turntable.
    """

    resolution: Annotated[int, Setting(ge=8, le=512)] = 96
    threshold: Positive | None = None
    faces: Annotated[int, Setting(ge=16, le=10_000_000)] = 20_000
    texture: Annotated[int, Setting(ge=16, le=8192)] = 512
    all_parts: bool = False
    picture: Annotated[int, Setting(ge=16, le=4096)] = 256
    frames: Annotated[int, Setting(ge=8, le=960)] = 48
