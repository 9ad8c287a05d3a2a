"""How a finished field is written to files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Setting

from shared.config import Part


class ExportSettings(Part):
    """resolution: nodes along a side of the grid on which the surface is extracted; threshold: density at the surface; null:
    found automatically; faces: the maximum number of triangles; texture: pixels along a side; all_parts: keep parts that are
    not connected to the largest one; picture: pixels along a side of renders and turntable; frames: of the turntable."""

    resolution: Annotated[int, Setting(ge=8, le=512)] = 96
    threshold: Annotated[float, Setting(gt=0)] | None = None
    faces: Annotated[int, Setting(ge=16)] = 20_000
    texture: Annotated[int, Setting(ge=16, le=8192)] = 512
    all_parts: bool = False
    picture: Annotated[int, Setting(ge=16, le=4096)] = 256
    frames: Annotated[int, Setting(ge=8, le=960)] = 48
