"""The options of `generate` that steer sampling, for pictures and clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

INVERT = "a clip (or picture) whose inverted latents are mixed into the initial noise"
SHARE = "the share of the initial noise's variance that comes from --invert; 1 means all of it"
PROMPT = "prompt for the inversion; usually empty"
KEEP = "a clip (or picture) with a region to keep unchanged; mark the region with --keep-mask"
MASK = "a mask whose white area stays as in --keep: one mask per frame, or one picture for all frames"
BOXES = (
    'JSON file with one box per subject, {"my-mug": [left, top, right, bottom]}, as fractions of width and height; '
    "a subject can also have a list of boxes (one per frame) or a map from frame numbers to boxes"
)


@dataclass(frozen=True)
class Steering:
    """The options that steer sampling, which are the same for every medium."""

    invert: Path | None = None
    invert_share: float = 0.3
    invert_prompt: str = ""
    keep: Path | None = None
    keep_mask: Path | None = None
    boxes: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The input files, which no output may replace."""
        return [p for p in (self.invert, self.keep, self.keep_mask, self.boxes) if p is not None]

    def hooks(self) -> list[Any]:
        """Returns the sampling hooks. The one for the initial noise comes first, and the one for the kept region last. Raises
        ValueError, naming the option, if a file is invalid."""
        from shared.config import validate
        from shared.sampling.box_tracks import read_tracks
        from shared.sampling.given_frames import GivenFrames
        from shared.sampling.inversion import NoisePrior
        from shared.sampling.subject_boxes import SubjectBoxes

        if (self.keep is None) != (self.keep_mask is None):
            raise ValueError("--keep and --keep-mask must be given together: the mask marks the region to keep")
        made: list[Any] = []
        if self.invert is not None:
            how = {"path": self.invert, "share": self.invert_share, "prompt": self.invert_prompt}
            made.append(checked("--invert", validate(NoisePrior, how)))
        if self.boxes is not None:
            made.append(SubjectBoxes(boxes=named("--boxes", lambda: read_tracks(self.boxes or Path()))))
        if self.keep is not None:
            made.append(checked("--keep", GivenFrames(path=self.keep, mask=self.keep_mask)))
        return made


def named(option: str, read: Any) -> Any:
    """Returns `read()`, adding the option's name to any ValueError it raises."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def checked(option: str, hook: Any) -> Any:
    """Returns the hook. Raises ValueError, naming the option, if the hook cannot use its files."""
    named(option, hook.check)
    return hook
