"""Clips of the class, made by the model itself before it is tuned: what keeps it moving."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from shared.io.clips.clip_metadata import read_clip_metadata
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.clips.write_clip import write_clip
from shared.sources.generated import Generated


class GeneratedClips(Generated):
    """`num_images` clips of `frames` frames per subject, of role "prior", made once and kept as `Generated` keeps pictures.

    A model that learns a thing from pictures alone forgets how things move; its own clips, learned beside them, keep that
    (MotionBooth, https://arxiv.org/abs/2406.17758, takes real clips of anything).
    """

    made: ClassVar[str] = "class clips"
    kind: Literal["generated_clips"] = "generated_clips"  # pyright: ignore[reportIncompatibleVariableOverride]
    num_images: int = Field(default=32, ge=1, le=100_000)  # clips
    frames: int = Field(default=16, ge=2)
    batch_size: int = Field(default=1, ge=1)

    def _more_facts(self) -> list[Any]:
        return [self.frames]

    def _size(self, side: int) -> tuple[int, ...]:
        return self.frames, side, side

    def _file(self, folder: Path, number: int) -> Path:
        return folder / f"{number:05d}"  # of frames: what players read merges frames that are alike

    def _is_there(self, path: Path) -> bool:
        return path.is_dir()

    def _read(self, path: Path) -> Tensor:
        return read_clip(path, ClipWindow(length=self.frames)).frames

    def _key_of(self, path: Path) -> str | None:
        return read_clip_metadata(path).get("key")

    def _write(self, pixels: Tensor, path: Path, about: Mapping[str, str]) -> None:
        if path.is_dir():
            shutil.rmtree(path)  # damaged
        write_clip(path, pixels, 8, about)
