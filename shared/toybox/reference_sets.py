"""Writes folders of pictures of held-out things, like those that a user would provide, and identifies the thing that
such pictures show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shared.config import unknown
from shared.io.contact_sheets import read_metadata, write_picture
from shared.io.outputs import atomic_folder, check_output
from shared.toybox.captions import SEEN, background_phrase, describe, plain_caption
from shared.toybox.render import render
from shared.toybox.subjects import HeldOut, faces, reference_scenes, style_scenes, subjects
from shared.toybox.world import Thing

SPLITS = ("development", "reporting")
_KEY = "toybox-subject"


def held_out(name: str) -> HeldOut:
    """Returns a held-out subject or face by name. Raises ValueError, listing the choices, if the name is unknown."""
    held_out = {h.name: h for split in SPLITS for h in (*subjects(split), *faces(split))}
    if name not in held_out:
        raise ValueError(unknown(name, held_out, "toybox subject"))
    return held_out[name]


def pictures(thing: Thing, n: int = 5, seed: int = 0, split: str = "development") -> Tensor:
    """Draws n photos of a thing, from several sides and in several places. Returns [n, 3, 64, 64] in [-1, 1]."""
    return render(reference_scenes(thing, n, seed, split)).pixels * 2 - 1


def write_album(name: str, folder: Path, n: int = 5, seed: int = 0, overwrite: bool = False) -> list[Path]:
    """Writes n reference pictures of a held-out thing. Each PNG stores the thing's name in its metadata.

    Each picture comes with two files that a careful user would add. One is a caption that names the place and the view,
    but no colours or pattern (`NAME.txt`). The other is the thing's mask (`masks/NAME.png`).
    """
    subject = held_out(name)
    check_output(folder, overwrite)
    scenes = reference_scenes(subject.thing, n, seed, name.split("-")[0])
    rendered = render(scenes)
    with atomic_folder(folder, overwrite) as out:
        for i, scene in enumerate(scenes):
            write_picture(rendered.pixels[i] * 2 - 1, out / f"{i:02d}.png", {_KEY: name})
            write_picture(rendered.mask[i].expand(3, -1, -1) * 2 - 1, out / "masks" / f"{i:02d}.png")
            (out / f"{i:02d}.txt").write_text(plain_caption(scene) + "\n", "utf-8")
    return [folder / f"{i:02d}.png" for i in range(n)]


def write_style(name: str, folder: Path, n: int = 5, seed: int = 0, overwrite: bool = False) -> list[Path]:
    """Writes n pictures of different things in a held-out style such as `development-thermal`, so that the style can be
    learned from them.

    Each PNG stores the style's name in its metadata. Each picture has a caption (`NAME.txt`), which describes its
    content but not its style.
    """
    check_output(folder, overwrite)
    scenes = style_scenes(name, n, seed)
    drawn = render(scenes).pixels * 2 - 1
    with atomic_folder(folder, overwrite) as out:
        for i, scene in enumerate(scenes):
            write_picture(drawn[i], out / f"{i:02d}.png", {"toybox-style": name})
            seen = f", {SEEN[scene.view][0]}" if scene.cameras[0].view_is_clear else ""
            drawn_is = f"{describe(scene.things[0], 'none')} {background_phrase(scene.background)}{seen}"
            (out / f"{i:02d}.txt").write_text(drawn_is + "\n", "utf-8")
    return [folder / f"{i:02d}.png" for i in range(n)]


def shown_in(files: Sequence[Path]) -> HeldOut | None:
    """Returns the held-out thing that these pictures show, or None if they are not from an album or show several
    things."""
    names = set()
    for file in files:
        try:
            names.add(read_metadata(file).get(_KEY, ""))
        except ValueError:
            return None
    return held_out(names.pop()) if len(names) == 1 and "" not in names else None


def gallery(subject: HeldOut, n: int = 5, seed: int = 1) -> dict[str, Tensor]:
    """Draws n pictures of each of the subject's distractors, which have the same class and colours as the subject.
    Returns the pictures, keyed by the distractor's name, [n, 3, 64, 64] in [-1, 1]."""
    split = subject.name.split("-")[0]
    return {f"distractor-{i}": pictures(d, n, seed + i, split) for i, d in enumerate(subject.distractors)}


def fresh(subject: HeldOut, n: int = 12, seed: int = 100) -> Tensor:
    """Draws n photos of the subject that are not among the references. A perfect model would generate such pictures."""
    return torch.as_tensor(pictures(subject.thing, n, seed, subject.name.split("-")[0]))
