"""Reads the user's own clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from shared.config import Side
from shared.io.clips.mask_frames import open_masks
from shared.io.clips.open_frames import open_frames
from shared.io.clips.read_clip import Clip, read_windows
from shared.io.clips.window import ClipWindow
from shared.io.resize import ResizeMode
from shared.masks import Track
from shared.sources.base import SourcePart
from shared.sources.source_context import SourceContext
from shared.types import Example, Subject


class Clips(SourcePart):
    """Yields every clip of every subject. These are the examples with the role "instance", from which motions are
    learned.

    `window` selects the frames by rate, stride, length, start, and number of windows per clip. The user's masks
    are used if there are any. Otherwise, the masks come from the clip's transparency if it has any. A single mask
    belongs to the first frame and is tracked through the clip. The caption is the user's own, or "" for the prompt part
    to fill in.
    """

    kind: Literal["clips"] = "clips"
    window: ClipWindow = ClipWindow()
    size: tuple[Side, Side] | None = None  # frame height and width; null for squares with sides of train.resolution
    fit: ResizeMode = "cover"  # how frames with a different aspect ratio are fitted into that size
    track: Track = Track()
    apart: bool = False  # whether each frame becomes a separate picture

    @property
    def frame_counts(self) -> Mapping[str, int]:
        return {} if self.apart else {"window.length": self.window.length}

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        found = {path: s.masks.get(path) for s in subjects.values() for path in s.clips}
        if not found:
            raise ValueError("there are no clips; give subject.clips=FOLDER")
        for path, mask in found.items():  # reports short clips and mismatched masks before a model is loaded
            clip = open_frames(path)
            masks = None if mask is None else open_masks(mask, clip)
            for picks in self.window.picks(clip):
                if masks is not None:
                    masks.check(picks)
        return found

    def windows(self, subject: Subject, path: Path, side: int) -> Iterator[Clip]:
        """Yields the windows of one clip. Frames have the size that is set or, if none is set, are squares with
        sides of `side` pixels. If the clip has masks, every frame gets one.

        Raises ValueError, naming the file, if a clip or its masks cannot be used (see `read_windows`).
        """
        for clip in read_windows(path, self.window, self.size or side, self.fit, subject.masks.get(path)):
            yield clip if clip.masks is None else replace(clip, masks=self.track(clip.frames, clip.masks))

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Yields the examples. Raises ValueError as `windows` does."""
        for name, subject in context.subjects.items():
            for path in subject.clips:
                caption = subject.captions.get(path, "")
                for clip in self.windows(subject, path, context.resolution):
                    whole = Example(
                        pixels=clip.frames,
                        caption=caption,
                        owners=(name,),
                        masks={} if clip.masks is None else {name: clip.masks},
                        valid=clip.valid,
                        source=str(path),
                        user_caption=bool(caption),
                    )
                    yield from whole.frames() if self.apart else (whole,)
