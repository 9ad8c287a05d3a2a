"""The options of `pcs video generate` that steer a clip."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcs_video.motion.camera_pan import CameraPan
from shared.commands.steering import Steering, checked
from shared.config import validate
from shared.sampling.given_files import is_clip
from shared.sampling.given_frames import GivenFrames
from shared.sampling.subject_boxes import SubjectBoxes


@dataclass(frozen=True)
class ClipSteering(Steering):
    """The options that steer clips. Besides what `Steering` offers, a clip can begin with given frames, and its camera
    can move."""

    first_frame: Path | None = None
    prefix: Path | None = None
    prefix_frames: int | None = None
    pan: str = ""

    @property
    def files(self) -> list[Path]:
        return [*super().files, *(p for p in (self.first_frame, self.prefix) if p is not None)]

    def hooks(self) -> list[Any]:
        """Returns the sampling hooks. Raises ValueError, naming the option, for errors found before a model is loaded."""
        if self.first_frame is not None and self.prefix is not None:
            raise ValueError("--first-frame and --prefix both set how the clip begins; give only one of them")
        if self.prefix_frames is not None and self.prefix is None:
            raise ValueError("--prefix-frames sets how much of --prefix is used; also give --prefix")
        if self.first_frame is not None and self.keep is not None:
            warnings.warn(
                "--first-frame sets the whole first frame, so --keep applies only to the later frames", stacklevel=2
            )
        made, boxes = super().hooks(), {}
        for hook in made:
            boxes = dict(hook.boxes) if isinstance(hook, SubjectBoxes) else boxes
        if self.pan:
            made.insert(len(made) - (self.keep is not None), parse_pan(self.pan, boxes))
        for option, path in (("--first-frame", self.first_frame), ("--prefix", self.prefix)):
            if path is None:
                continue
            hook = checked(option, GivenFrames(path=path, frames=self.prefix_frames))
            if is_clip(path) != (option == "--prefix"):
                other = "a clip; give it as --prefix" if option == "--first-frame" else "a picture; use --first-frame"
                raise ValueError(f"{option}: {path} is {other}")
            made.append(hook)
        return made


def parse_pan(text: str, boxes: Any = None) -> CameraPan:
    """Parses `RIGHT,DOWN`, in fractions of width and height. Raises ValueError if the text is malformed."""
    try:
        right, down = (float(x) for x in text.split(","))
        return validate(CameraPan, {"right": right, "down": down, "boxes": boxes or {}})
    except ValueError:
        raise ValueError(
            f"--pan {text!r}: give RIGHT,DOWN as fractions of the width and height, each between -1 and 1, such as 0.25,0"
        ) from None
