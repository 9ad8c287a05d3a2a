"""Reads the masks of a clip's frames.

The masks may be a clip or folder of masks, files next to the frames, or a single picture for the first frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

from PIL import Image

from shared.io.clips.clip_kinds import clip_kind
from shared.io.clips.frame_folders import FrameFolder
from shared.io.clips.frame_source import FrameSource
from shared.io.clips.open_frames import open_frames
from shared.io.decode import Picture, picture_size, read_frame, two_valued
from shared.io.terminal import names


class MaskFrames:
    """The masks of a clip by frame index (mode L, 255 where the subject is).

    If `first_only` is set, only the first frame has a mask. That mask must then be tracked through the other frames.
    """

    def __init__(self, path: Path, source: FrameSource | None, files: Sequence[Path] = ()) -> None:
        self.path, self.first_only = path, source is None and len(files) == 1
        self._source, self._files = source, files

    def check(self, indices: Sequence[int]) -> None:
        """Raises ValueError if only the first frame has a mask and the window begins after that frame."""
        if self.first_only and indices[0] != 0:
            raise ValueError(
                f"{self.path} is the mask of the clip's first frame, but this window begins at frame {indices[0]}: "
                "give a mask for each frame, or use windows=1 and start=0"
            )

    def masks(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yields the masks of the frames at ascending `indices`. If only the first frame has a mask, it is repeated.

        Raises ValueError as `check` does.
        """
        self.check(indices)
        if self._source is not None:
            yield from map(as_mask, self._source.frames(indices))
        elif self.first_only:
            yield from repeat(as_mask(read_frame(self._files[0], min_side=1)), len(indices))
        else:
            yield from (as_mask(read_frame(self._files[index], min_side=1)) for index in indices)


def as_mask(picture: Picture) -> Image.Image:
    """Converts a frame to a mask, using its alpha channel if it has one and its brightness otherwise.

    A mask that marks nothing stays empty.
    """
    return two_valued(picture.image.convert("L") if picture.alpha is None else picture.alpha)


def open_masks(path: Path, clip: FrameSource) -> MaskFrames:
    """Opens the masks at `path` for a clip. Raises ValueError if the number or size of the masks does not match the
    frames.

    If the masks are in the same folder as the frames, `path` is that folder.
    """
    if path == clip.path and isinstance(clip, FrameFolder):
        return _beside(clip)
    if path.is_file() and clip_kind(path) == "picture":
        _check_size(path, picture_size(path), clip)
        return MaskFrames(path, None, [path])
    source = open_frames(path)
    _check_size(path, source.size, clip)
    if source.count == 1:
        file = source.files[0] if isinstance(source, FrameFolder) else path
        return MaskFrames(path, None, [file])
    if source.count != clip.count:
        raise ValueError(
            f"{path} contains {source.count} masks, but {clip.path} has {clip.count} frames: give one mask for each "
            "frame, or a single mask for the first frame"
        )
    return MaskFrames(path, source)


def _beside(clip: FrameFolder) -> MaskFrames:
    """Returns the masks in the same folder as the frames, matched by name."""
    for frame, mask in clip.masks.items():
        if (size := picture_size(mask)) != clip.size:
            _wrong_size(mask, size, frame, clip.size)
    without = [frame.name for frame in clip.files if frame not in clip.masks]
    if without and set(clip.masks) != {clip.files[0]}:
        have = f"{len(clip.masks)} of {clip.count} frames have a mask"
        raise ValueError(
            f"{clip.path}: {have}; frames without one: {names(without)}. Give a mask for every frame, or only for the first"
        )
    return MaskFrames(clip.path, None, [clip.masks[frame] for frame in clip.files if frame in clip.masks])


def _check_size(path: Path, size: tuple[int, int], clip: FrameSource) -> None:
    if size != clip.size:
        _wrong_size(path, size, clip.path, clip.size)


def _wrong_size(mask: Path, size: tuple[int, int], clip: Path, other: tuple[int, int]) -> None:
    sizes = f"{size[0]}x{size[1]} pixels, but {clip} is {other[0]}x{other[1]}"
    raise ValueError(f"the mask {mask} is {sizes}: they must have the same size")
