"""Finds and reads the clips that a motion, or a subject together with its motion, was learned from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.config import expanded
from shared.io.checksums import sha256
from shared.io.clips.find_clips import find_clips
from shared.io.clips.open_frames import open_frames
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.recipe.reads import sources_of
from shared.runner.judging import beside
from shared.runner.loaded_concepts import Loaded


def motion_clips(loaded: Loaded, folder: Path | None) -> tuple[Path, ...]:
    """Returns the clips that a motion was learned from, in `folder` or else in the recorded folder next to the concept.

    Raises ValueError if they are missing, or if the recorded folder contains a clip whose hash the concept does not
    store.
    """
    meta, path = loaded.concept.meta, loaded.concept.path
    if folder is None and loaded.subject is not None and loaded.subject.clips:
        return loaded.subject.clips
    recorded = meta.learned_with.folder_of(meta.name)
    source = folder or (beside(path.resolve().parent, Path(recorded).name) if path and recorded else None)
    if source is None or (folder is None and not source.is_dir()):
        raise ValueError("give --references FOLDER: a motion stores the hashes of its clips, not the clips themselves")
    found = find_clips(expanded(source)).clips
    hashes = {r.sha256 for r in meta.references}
    if folder is None and not all(sha256(p) in hashes for p in found):
        raise ValueError(f"{source} has clips that the motion was not learned from: give --references FOLDER")
    return found


def read_motion(path: Path, recipe: Mapping[str, Any], side: int) -> Tensor:
    """Reads a clip with the rate, stride, length and start that a motion's recipe sets. Returns [3, F, side, side].

    If the clip is too short for the recipe, all its frames are read. Raises ValueError if the clip has only one frame.
    """
    window = _window(recipe)
    source = open_frames(path)
    try:
        window.picks(source)
    except ValueError:
        window = ClipWindow(length=source.count)
    if window.length < 2:
        raise ValueError(f"{path} has only one frame, so nothing moves in it")
    return read_clip(path, window.model_copy(update={"windows": 1}), side).frames


def _window(recipe: Mapping[str, Any]) -> ClipWindow:
    windows = [source["window"] for source in sources_of("clips", recipe) if isinstance(source.get("window"), Mapping)]
    return ClipWindow.model_validate(windows[0]) if windows else ClipWindow()
