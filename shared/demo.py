"""Runs the demo, which learns a held-out toybox subject once and shows it in every installed modality.

A package adds its part of the demo through an entry point in the group `pcs.demo`. The entry point is named after the
modality, and its value is a module with two functions. `check(asked)` rejects invalid requests before any work is done.
`show(asked, bars)` does the work, and yields lines to print and `Exhibit`s for the page. Parts run in the order of
`ORDER`, so that later parts can use the concepts that earlier parts learned.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.config import unknown
from shared.io.contact_sheets import contact_sheet, write_picture
from shared.io.decode import read_picture
from shared.io.outputs import atomic_folder, check_output, write_text
from shared.io.resize import resize
from shared.metrics.clips.page import inline_clip
from shared.metrics.html import inline, render
from shared.runner.bars import Bars
from shared.toybox import reference_sets as album

__all__ = ["Asked", "Bars", "DemoPart", "Exhibit", "parts", "run"]

GROUP = "pcs.demo"
ORDER = ("image", "video", "3d")
_WIDEST = 1600  # the maximum width in pixels of a picture on the page
_TILES = 5  # pictures per row of the overview
_TILE = 128  # the side length of an overview picture in pixels


@dataclass(frozen=True)
class Asked:
    """The subject, motion and recipes of a demo, and the folder to write it to."""

    out: Path
    subject: str
    recipe: str
    motion: str
    motion_recipe: str
    asset_recipe: str

    @property
    def thing(self) -> album.HeldOut:
        return album.held_out(self.subject)

    @property
    def references(self) -> Path:
        return self.out / "references"

    @property
    def concept(self) -> Path:
        """The concept's folder."""
        return self.out / f"my-{self.thing.thing.class_name}.concept"


@dataclass(frozen=True)
class Exhibit:
    """An item on the page: a PNG or an animated WebP, with links to files in the demo's folder."""

    title: str
    file: Path
    text: str
    scores: Sequence[tuple[str, str]] = ()
    more: Mapping[str, Path] = field(default_factory=dict)  # link text -> target
    # pictures for the item's row in the overview, [N, 3, H, W] in [-1, 1]; if None, the item has no row
    shots: Tensor | None = None


class DemoPart(Protocol):
    """The module that a package provides for its part of the demo."""

    def check(self, asked: Asked) -> None:
        """Raises ValueError for unknown names."""
        ...

    def show(self, asked: Asked, bars: Bars) -> Iterator[str | Exhibit]:
        """Does the work, and yields lines to print and items for the page."""
        ...


def parts(chosen: Sequence[str] = ()) -> Mapping[str, DemoPart]:
    """Returns the parts of the installed packages, or only those in `chosen`, in order. Raises ValueError for unknown names."""
    from importlib.metadata import entry_points

    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    for name in chosen:
        if name not in found:
            raise ValueError(f"--part: {unknown(name, found, 'part')}")
    return {name: found[name].load() for name in ORDER if name in found and (not chosen or name in chosen)}


def run(asked: Asked, names: Sequence[str], overwrite: bool, bars: Bars) -> Iterator[str]:
    """Runs the parts in `names`, or all parts if it is empty, and yields lines to print. `asked.out` appears, or is
    replaced, only once the demo is complete. Raises ValueError if a name is unknown, or if `asked.out` exists and may
    not be overwritten."""
    chosen = parts(names)
    check_output(asked.out, overwrite)
    for part in chosen.values():
        part.check(asked)
    start = time.perf_counter()
    with atomic_folder(asked.out, overwrite) as folder:
        for line in _made(replace(asked, out=folder), chosen.values(), bars):
            yield line.replace(str(folder), str(asked.out))  # where the files will be
    yield f"page         {asked.out / 'index.html'}"
    yield f"These are toy numbers, measured on the toybox. Done in {time.perf_counter() - start:.0f} s."


def _made(asked: Asked, chosen: Iterable[DemoPart], bars: Bars) -> Iterator[str]:
    """Fills the folder `asked.out`, and yields lines to print."""
    files = album.write_album(asked.subject, asked.references)
    yield f"references   {len(files)} pictures of {asked.subject} in {asked.references}"
    exhibits: list[Exhibit] = []
    rows = {"References": torch.stack([resize(read_picture(f), _TILE).pixels for f in files[:_TILES]])}
    for part in chosen:
        for made in part.show(asked, bars):
            if isinstance(made, Exhibit):
                exhibits.append(made)
                if made.shots is not None:  # if several exhibits share a title, only the first gets a row
                    rows.setdefault(made.title, F.interpolate(made.shots[:_TILES], (_TILE, _TILE), mode="area"))
            else:
                yield made
    yield f"overview     {write_picture(contact_sheet(rows, _TILE), asked.out / 'overview.png')}"
    _write_page(asked, exhibits)


def _write_page(asked: Asked, exhibits: Sequence[Exhibit]) -> None:
    def shown(exhibit: Exhibit) -> dict[str, Any]:
        moves, data = exhibit.file.suffix == ".webp", exhibit.file.read_bytes()
        links = {text: path.relative_to(asked.out).as_posix() for text, path in exhibit.more.items()}
        return {
            "about": exhibit,
            "src": inline_clip(data) if moves else inline(data, _WIDEST),
            "moves": moves,
            "links": links,
        }

    references = [inline(p.read_bytes()) for p in sorted(asked.references.glob("*.png"))]
    page = render("demo.html.j2", subject=asked.subject, references=references, exhibits=[shown(e) for e in exhibits])
    write_text(asked.out / "index.html", page)
