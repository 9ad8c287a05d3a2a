"""The user's own clips."""

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
    """Every clip of every subject: the examples of role "instance" that motions are learned from.

    `window` says which frames: rate, stride, length, start, and how many windows of each clip. Masks are the user's where
    they lie beside the clip, else its transparency, else there are none. The caption is the user's own, or "" for the
    prompt part to fill.
    """

    kind: Literal["clips"] = "clips"
    window: ClipWindow = ClipWindow()
    fit: ResizeMode = "cover"  # how frames that are not square become so
    apart: bool = False  # each frame as a picture

    def check(self, subjects: Mapping[str, Subject], earlier: Sequence[str]) -> Mapping[Path, Path | None]:
        found = {path: s.masks.get(path) for s in subjects.values() for path in s.clips}
        if not found:
            raise ValueError("there are no clips: give subject.clips=FOLDER")
        for path, mask in found.items():  # what is too short, or has other masks, is said before a model is loaded
            clip = open_frames(path)
            self.window.picks(clip)
            if mask is not None:
                open_masks(mask, clip)
        return found

    def examples(self, context: SourceContext) -> Iterator[Example]:
        """ValueError, naming the file, when a clip or its masks cannot be used; see `read_windows`."""
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
