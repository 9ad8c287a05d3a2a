"""Reads a user's pictures into a Subject."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from shared.config import absent, expanded
from shared.io.caption_files import caption_text, given_captions
from shared.io.decode import picture_size, read_picture
from shared.io.failures import of_the_machine
from shared.io.find_pictures import PathLike, scan, sniff
from shared.io.terminal import check_utf8, encodable, names
from shared.types import Subject

_DETERMINERS = frozenset(["a", "an", "the", "my", "our", "your", "his", "her", "its", "their"])


def read_subject(
    images: PathLike | Sequence[PathLike],
    class_noun: str = "",
    masks: PathLike | Mapping[PathLike, PathLike] | None = None,
    captions: PathLike | Mapping[PathLike, str] | None = None,
) -> Subject:
    """Reads pictures (a folder, a file or a list), with captions and masks next to them or in the given folders.

    `masks` and `captions` are each either a folder whose files are named after the pictures, or a mapping from pictures
    (paths or file names) to mask files or caption texts. Stray files are skipped with a warning. If only some pictures
    have a caption or a mask, a UserWarning lists the pictures without one.

    Raises ValueError if there are no pictures, if the sizes of a mask and its picture differ, or if a given caption or
    mask matches no picture.
    """
    listing = scan(images)
    by_picture = {p: caption_text(t, p) for p, t in listing.captions.items()}
    mask_of = dict(listing.masks)
    if isinstance(captions, Mapping):
        by_picture = {_match(listing.pictures, k, "captions"): " ".join(v.split()) for k, v in captions.items()}
    elif captions is not None:
        found = given_captions(listing.pictures, captions, "a picture's", "pictures")
        by_picture = {p: caption_text(t, p) for p, t in found.items()}
    if isinstance(masks, Mapping):
        mask_of = {_match(listing.pictures, k, "masks"): expanded(v) for k, v in masks.items()}
    elif masks is not None:
        mask_of = _masks_in(listing.pictures, masks)
    for picture, mask in mask_of.items():
        size, other = picture_size(picture), picture_size(mask)
        if size != other:
            raise ValueError(
                f"the mask {mask} is {other[0]}x{other[1]} pixels, but its picture {picture} is {size[0]}x{size[1]}; "
                "both must have the same size"
            )
    kept = {p: text for p, text in by_picture.items() if text}
    _warn_of_gaps(listing.pictures, kept, "caption", "their captions come from the recipe's template")
    cut_out = {p for p in listing.pictures if p not in mask_of and transparent(p)}
    _warn_of_gaps(listing.pictures, {*mask_of, *cut_out}, "mask", "the whole picture counts as the subject")
    return Subject(images=listing.pictures, class_noun=plain_noun(class_noun), captions=kept, masks=mask_of)


def plain_noun(text: str) -> str:
    """Removes the article or possessive from a class noun ("my mug" becomes "mug"), because templates add an article. Raises
    ValueError if the noun is not UTF-8 or contains <, >, { or }."""
    if set("<>{}") & set(check_utf8(text)):
        raise ValueError(f"class_noun = {text!r}: use a plain word for the kind of subject, for example duck")
    words = text.split()
    return " ".join(words[1:] if len(words) > 1 and words[0].lower() in _DETERMINERS else words)


def _warn_of_gaps(pictures: Sequence[Path], having: Collection[Path], what: str, then: str) -> None:
    """Warns about pictures that lack a caption or mask. If all pictures lack one, this is assumed to be intended."""
    without = [p.name for p in pictures if p not in having]
    if having and without:
        count = f"{len(without)} of {len(pictures)} pictures have no {what}"
        warnings.warn(encodable(f"{count}: {names(without)}; {then}"), UserWarning, stacklevel=3)


def transparent(path: Path) -> bool:
    """Whether a picture has transparency, which serves as its mask. False for unreadable pictures."""
    try:
        return sniff(path) != "JPEG" and read_picture(path).alpha is not None
    except (OSError, ValueError) as error:
        if of_the_machine(error):
            raise
        return False


def _match(pictures: Sequence[Path], key: PathLike, what: str) -> Path:
    name = os.fspath(key)
    hits = [p for p in pictures if p == expanded(name)] or [p for p in pictures if p.name == name]
    if len(hits) != 1:
        reason = "no picture" if not hits else f"{len(hits)} pictures"
        raise ValueError(f"{what}: {name!r} matches {reason}. The pictures are: {names(p.name for p in pictures)}")
    return hits[0]


def _masks_in(pictures: Sequence[Path], folder: PathLike) -> dict[Path, Path]:
    """Maps each picture to the file in `folder` with the same stem, if there is one."""
    root = expanded(folder)
    if not root.is_dir():
        raise ValueError(f"masks: {root} {absent(root, 'is not a folder')}")
    files = [p for p in sorted(root.iterdir()) if p.is_file() and not p.name.startswith(".")]
    out = {picture: f for picture in pictures for f in files if f.stem == picture.stem}
    if not out:
        seen, picture_names = names(p.name for p in files) or "nothing", names(p.name for p in pictures)
        raise ValueError(
            f"masks: no file in {root} is named after a picture; the folder contains {seen}, while the pictures are "
            f"{picture_names}"
        )
    return out
