"""Reads the user's own clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from shared.io.clips.mask_frames import open_masks
from shared.io.clips.open_frames import open_frames
from shared.io.clips.read_clip import read_windows
from shared.io.clips.window import ClipWindow
from shared.io.resize import ResizeMode
from shared.sources.base import SourcePart
from shared.sources.source_context import SourceContext
from shared.types import Example, Subject


class Clips(SourcePart):
    """Yields every clip of every subject: the examples of role "instance" that motions are learned from.

    `window` sets which frames are used: rate, stride, length, start, and the number of windows per clip. Masks are the
    user's if there are any next to the clip, else the clip's transparency, else none. The caption is the user's own, or ""
    for the prompt part to fill in.
    """

    kind: Literal["clips"] = "clips"
    window: ClipWindow = ClipWindow()
    fit: ResizeMode = "cover"  # how non-square frames are made square
    apart: bool = False  # True: each frame becomes a picture

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        found = {path: s.masks.get(path) for s in subjects.values() for path in s.clips}
        if not found:
            raise ValueError("there are no clips: give subject.clips=FOLDER")
        for path, mask in found.items():  # reports short clips and mismatched masks before a model is loaded
            clip = open_frames(path)
            self.window.picks(clip)
            if mask is not None:
                open_masks(mask, clip)
        return found

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """Raises ValueError, naming the file, if a clip or its masks cannot be used; see `read_windows`."""
        for name, subject in context.subjects.items():
            for path in subject.clips:
                caption = subject.captions.get(path, "")
                for clip in read_windows(path, self.window, context.resolution, self.fit, subject.masks.get(path)):
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
