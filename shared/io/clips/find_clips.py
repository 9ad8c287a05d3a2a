"""Sorts a folder's entries into clips, their captions and masks, and everything else."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.config import absent, expanded
from shared.io.caption_files import caption_files, caption_text, given_captions, looks_like_captions, unused_rows
from shared.io.clips.clip_kinds import READABLE, clip_kind
from shared.io.clips.frame_folders import CAPTION
from shared.io.clips.video_files import why_not
from shared.io.failures import of_the_machine
from shared.io.find_pictures import MASK_ENDS, listing_of, no_caption, owner_stem
from shared.io.foreign_files import MARK
from shared.io.terminal import encodable, names

PathLike = str | os.PathLike[str]
_MASKS = "masks"


@dataclass(frozen=True)
class ClipListing:
    """Clips in order (files and folders of frames), with their captions and masks if they have any."""

    clips: tuple[Path, ...]
    captions: Mapping[Path, str]  # clip -> one line
    masks: Mapping[Path, Path]  # clip -> its masks, as `read_windows` accepts them
    warnings: tuple[str, ...] = ()


def find_clips(
    clips: PathLike | Sequence[PathLike],
    masks: PathLike | Mapping[PathLike, PathLike] | None = None,
    captions: PathLike | Mapping[PathLike, str] | None = None,
) -> ClipListing:
    """Finds clips with their captions and masks.

    `clips` is a folder (whose clips are sorted by name), a single clip, or a list of folders and clips (in the given
    order). A clip is a video, an animation, or a folder of frames. A folder that contains pictures but no clips is
    itself a clip.

    The caption of `NAME.mp4`, or of the folder `NAME/`, is read from `NAME.txt` (or `NAME/caption.txt`). The masks are
    read from `masks/NAME`, `NAME.mask`, `NAME-mask` or `NAME_mask`. They are a clip or folder with a mask for each
    frame, or a picture with the mask for the first frame. A folder of frames may also contain masks, which are then
    named in the same way as masks for pictures. `masks` and `captions` replace the masks and captions found next to
    the clips. Each of the two is either a folder whose entries have the clips' names, or a mapping whose keys are clips
    (paths or names).

    Entries that are not clips are skipped. One UserWarning per folder lists them with the reasons. If only some clips
    have a caption or masks, a UserWarning lists the others. Raises ValueError if a path does not exist, a given file is
    not a clip, no clips are left, or `masks` or `captions` matches no clip.
    """
    paths = [clips] if isinstance(clips, (str, os.PathLike)) else list(clips)
    if not paths:
        raise ValueError("no clips: the list of files is empty")
    parts = [_listed(expanded(path)) for path in paths]
    found = tuple(dict.fromkeys(clip for part in parts for clip in part.clips))
    notes = [note for part in parts for note in part.warnings]
    named = [clip for part in parts for clip in part.clips]
    twice = [clip.name for clip in found if named.count(clip) > 1]
    notes += [f"listed twice but used only once: {names(twice)}"] if twice else []
    texts = {clip: text for part in parts for clip, text in part.captions.items()}
    planes = {clip: mask for part in parts for clip, mask in part.masks.items()}
    if captions is not None:
        texts = _given_captions(found, captions)
    if masks is not None:
        planes = _given_masks(found, masks)
    texts = {clip: text for clip, text in texts.items() if text}
    notes += _gaps(found, texts, "caption", "their captions come from the recipe's template")
    notes += _gaps(found, planes, "masks", "their whole frames count as the subject, unless the frames are transparent")
    notes = list(dict.fromkeys(notes))  # several given clips may share one metadata.jsonl
    for note in notes:
        warnings.warn(encodable(note), UserWarning, stacklevel=2)
    return ClipListing(found, texts, planes, tuple(notes))


def _listed(path: Path) -> ClipListing:
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise ValueError(f"{path} {absent(path)}")
    reason = _not_a_clip(path)
    if reason:
        raise ValueError(f"{path} is not a clip ({reason}): give {READABLE}")
    return _with_neighbours((path,), _candidates(path.parent, [path]))


def _folder(folder: Path) -> ClipListing:
    entries = sorted((p for p in folder.iterdir() if p.name != MARK), key=lambda p: p.name)
    reasons = {path: "hidden" if path.name.startswith(".") else _not_a_clip(path) for path in entries}
    found = [path for path, reason in reasons.items() if not reason and path.name != _MASKS]
    stems = {_stem(path) for path in found}
    found = [path for path in found if owner_stem(_stem(path), stems) == _stem(path)]
    if not found and any(reason == _PICTURE for reason in reasons.values()):
        return _with_neighbours((folder,), _candidates(folder.parent, [folder]))
    if not found:
        said = [f"{path.name} ({reason})" for path, reason in reasons.items() if reason]
        raise ValueError(f"no clips in {folder}: found {f'only {names(said)}' if said else 'nothing'}; give {READABLE}")
    candidates = _candidates(folder, found)
    listing = _with_neighbours(tuple(found), candidates)
    texts = set(caption_files(found, folder).values())
    used = {*listing.masks.values(), *found, *texts, folder / _MASKS}
    stray = {p: why or "a mask without a clip" for p, why in reasons.items() if p not in used}
    stray |= {p: no_caption(p, found, texts) for p in stray if looks_like_captions(p)}
    stray |= {p: "a mask without a clip" for p in candidates if p not in used}
    said = [f"{p.relative_to(folder).as_posix()} ({why})" for p, why in stray.items()]
    note = f"{folder}: skipped files that are not clips: {names(said)}"
    return ClipListing(listing.clips, listing.captions, listing.masks, (*listing.warnings, *([note] if said else [])))


_PICTURE = "one picture, not a clip: put the frames of a clip in their own folder"


def _not_a_clip(path: Path) -> str:
    """Returns the reason why an entry of a folder is not a clip, or "" if it is one."""
    if path.is_dir():
        return "" if _frames(path) else "a folder without frames"
    if not path.is_file():
        return absent(path, "not a file")
    try:
        if path.stat().st_size == 0:
            return "empty, 0 bytes"
        kind = clip_kind(path)
    except OSError as error:
        if of_the_machine(error):
            raise
        return f"cannot be opened: {error.strerror}"
    except ValueError as error:
        return str(error).removeprefix(f"{path} ")
    if kind == "picture":
        return _PICTURE
    return "not a video" if kind is None else why_not(path) if kind == "video" else ""


def _frames(folder: Path) -> bool:
    """Whether a folder directly contains pictures, which are then the frames of one clip."""
    try:
        return bool(listing_of(folder, known=(CAPTION,)).pictures)
    except (OSError, ValueError) as error:
        if of_the_machine(error):
            raise
        return False


def _with_neighbours(found: tuple[Path, ...], candidates: Sequence[Path]) -> ClipListing:
    captions, masks, notes = {}, {}, []
    owners = {_stem(path) for path in found}
    for clip in found:
        inside = listing_of(clip, known=(CAPTION,)) if clip.is_dir() else None
        texts = [*caption_files([clip], clip.parent).values(), *([clip / CAPTION] if inside else [])]
        for text in texts:
            if text.is_file():
                captions.setdefault(clip, caption_text(text, clip))
        if inside and inside.masks:
            masks[clip] = clip
        for mask in candidates:
            if mask != clip and owner_stem(_stem(mask), owners) == _stem(clip):
                masks[clip] = mask
                break
        notes += inside.warnings if inside else ()
    notes += unused_rows(found, found[0].parent)
    return ClipListing(found, captions, masks, tuple(notes))


def _candidates(folder: Path, found: Sequence[Path]) -> list[Path]:
    """Returns the possible masks of clips in this folder. Those in `masks/` come first; they are left out if `masks/`
    is itself a clip."""
    inside = sorted((folder / _MASKS).iterdir()) if (folder / _MASKS).is_dir() and folder / _MASKS not in found else []
    beside = sorted(p for p in folder.iterdir() if _stem(p).endswith(MASK_ENDS))
    return [p for p in (*inside, *beside) if not p.name.startswith(".") and _not_a_clip(p) in ("", _PICTURE)]


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _gaps(found: Sequence[Path], having: Mapping[Path, object], what: str, then: str) -> list[str]:
    without = [p.name for p in found if p not in having]
    if not having or not without:
        return []
    return [f"{len(without)} of {len(found)} clips have no {what}: {names(without)}; {then}"]


def _given_captions(found: Sequence[Path], captions: PathLike | Mapping[PathLike, str]) -> dict[Path, str]:
    if isinstance(captions, Mapping):
        return {_match(found, key, "captions"): " ".join(text.split()) for key, text in captions.items()}
    there = given_captions(found, captions, "a clip's", "clips")
    return {clip: caption_text(text, clip) for clip, text in there.items()}


def _given_masks(found: Sequence[Path], masks: PathLike | Mapping[PathLike, PathLike]) -> dict[Path, Path]:
    if isinstance(masks, Mapping):
        return {_match(found, key, "masks"): expanded(mask) for key, mask in masks.items()}
    return _named_alike(found, masks, "masks")


def _match(found: Sequence[Path], key: PathLike, what: str) -> Path:
    name = os.fspath(key)
    hits = [p for p in found if p == expanded(name)] or [p for p in found if p.name == name]
    if len(hits) != 1:
        reason = "no clip" if not hits else f"{len(hits)} clips"
        raise ValueError(f"{what}: {name!r} matches {reason}. The clips are: {names(p.name for p in found)}")
    return hits[0]


def _named_alike(found: Sequence[Path], folder: PathLike, what: str) -> dict[Path, Path]:
    """Maps each clip to the entry in `folder` with the same name, if there is one."""
    root = expanded(folder)
    if not root.is_dir():
        raise ValueError(f"{what}: {root} {absent(root, 'is not a folder')}")
    entries = [p for p in sorted(root.iterdir()) if not p.name.startswith(".")]
    out = {clip: entry for clip in found for entry in entries if _stem(entry) == _stem(clip)}
    if not out:
        seen, clips = names(p.name for p in entries) or "nothing", names(p.name for p in found)
        raise ValueError(
            f"{what}: no file in {root} has a clip's name; the folder contains {seen}, while the clips are {clips}"
        )
    return out
