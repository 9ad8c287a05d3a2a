"""Generates clips of the class with the untuned model, in order to preserve the model's motion during tuning."""

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
    """For each subject, generates `num_images` clips of `frames` frames with the role "prior", and caches them as
    `Generated` does.

    A model that learns a subject only from pictures forgets how things move. To prevent this, it also learns from its
    own clips. MotionBooth (https://arxiv.org/abs/2406.17758) uses real clips of arbitrary content instead.
    """

    made: ClassVar[str] = "class clips"
    kind: Literal["generated_clips"] = "generated_clips"  # pyright: ignore[reportIncompatibleVariableOverride]
    num_images: int = Field(default=32, ge=1, le=100_000)  # number of clips
    frames: int = Field(default=16, ge=2, le=4096)
    batch_size: int = Field(default=1, ge=1, le=1024)  # clips generated at once

    @property
    def frame_counts(self) -> Mapping[str, int]:
        return {"frames": self.frames}

    def _more_facts(self) -> list[Any]:
        return [self.frames]

    def _size(self, side: int) -> tuple[int, ...]:
        return self.frames, side, side

    def _file(self, folder: Path, number: int) -> Path:
        return folder / f"{number:05d}"  # a folder of frames, because video formats merge equal frames

    def _is_there(self, path: Path) -> bool:
        return path.is_dir()

    def _read(self, path: Path) -> Tensor:
        return read_clip(path, ClipWindow(length=self.frames)).frames

    def _key_of(self, path: Path) -> str | None:
        return read_clip_metadata(path).get("key")

    def _write(self, pixels: Tensor, path: Path, about: Mapping[str, str]) -> None:
        if path.is_dir():
            shutil.rmtree(path)  # a damaged clip
        write_clip(path, pixels, 8, about)
