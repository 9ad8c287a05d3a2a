"""The real object that an asset is compared with. It is given as a held-out subject of the toybox or as a mesh file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.evaluation.views import SIDE, PaintedMesh, Views, draw, painted_mesh
from shared.config import absent, expanded
from shared.toybox.reference_sets import held_out
from shared.toybox.render import render
from shared.toybox.subjects import HeldOut
from shared.toybox.world import Camera, Scene

_MESHES = (".glb", ".obj", ".ply")


class Truth(Protocol):
    """The real object that an asset should look like."""

    @property
    def name(self) -> str:
        """The object's name in a report."""
        ...

    def views(self, around: Cameras, side: int = SIDE) -> Views:
        """Returns views of the object from these cameras."""
        ...


@dataclass(frozen=True)
class TrueMesh:
    """An object given as a mesh file."""

    name: str
    mesh: PaintedMesh

    def views(self, around: Cameras, side: int = SIDE) -> Views:
        return draw(self.mesh, around, side)


@dataclass(frozen=True)
class TrueToy:
    """A held-out subject of the toybox. Its views are lit, cut out and placed on white."""

    held: HeldOut

    @property
    def name(self) -> str:
        return self.held.name

    @property
    def class_noun(self) -> str:
        return self.held.thing.class_name

    @property
    def plain(self) -> TrueToy:
        """A generic object of the class. It has the class's usual shape and this object's two colours, but not this
        object's proportions or pattern."""
        thing = self.held.thing
        return TrueToy(replace(self.held, thing=replace(thing, pattern_seed=None)))

    def views(self, around: Cameras, side: int = SIDE) -> Views:
        return self.lit(around, [0] * len(around), side)

    def lit(self, around: Cameras, seeds: Sequence[int], side: int = SIDE) -> Views:
        """Returns one view per camera, with the light that the camera's seed determines. The cameras must have the
        toybox's distance and field of view."""
        angles = zip(around.azimuth_deg.tolist(), around.elevation_deg.tolist(), seeds, strict=True)
        scenes = [Scene((self.held.thing,), "white studio", (Camera(a, e),), "photo", s) for a, e, s in angles]
        drawn = render(scenes, side)
        masks = drawn.mask[:, 0] >= 0.5
        return Views(torch.where(masks[:, None], drawn.pixels, torch.ones(())), masks)


def read_truth(name: str) -> Truth:
    """Reads the ground truth that the user chose, given as the name of a toybox subject ("development-car") or as a
    mesh file.

    Raises ValueError if the file is missing or not a mesh, or if the subject is unknown; the message lists the known
    subjects.
    """
    if Path(name).suffix.lower() in _MESHES or "/" in name or expanded(name).exists():
        path = expanded(name)
        if not path.is_file():
            raise ValueError(f"--truth {name}: {absent(path, 'no such file')}")
        return TrueMesh(path.name, painted_mesh(path))
    try:
        return TrueToy(held_out(name))
    except ValueError as error:
        raise ValueError(f"--truth: {error} Or give a mesh file ({', '.join(_MESHES)}).") from None


def mean_color(views: Views) -> Tensor:
    """Returns the mean colour (`[3]`) of the pixels that the object covers, or grey if it covers none."""
    inside = views.pixels.permute(0, 2, 3, 1)[views.masks]
    return inside.mean(0) if len(inside) else torch.full((3,), 0.5)
