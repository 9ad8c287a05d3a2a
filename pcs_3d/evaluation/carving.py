"""Carves meshes from silhouettes. On the toybox, recipes that need a mesh start from these generic shapes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from pcs_3d.evaluation.truths import TrueToy
from pcs_3d.export.extract import Extracted, marched, simplified
from pcs_3d.export.write import write_ply
from pcs_3d.fields.grids import nodes
from shared.config import unknown
from shared.toybox.reference_sets import held_out
from shared.toybox.world import CLASSES

#: The number of cameras in each ring around the object, by the ring's elevation in degrees.
_RINGS = {-40.0: 8, -10.0: 12, 15.0: 16, 45.0: 12, 75.0: 8}
_BOUND = 1.05  # half the side length of the carved cube, in object radii, with a margin around an object of radius 1
_GREY = 0.5
_FACES = 4000
_SOLID = tuple(name for name in CLASSES if name != "face")


def carved(masks: Tensor, around: Cameras, resolution: int = 96) -> Extracted:
    """Returns the surface of the visual hull, the largest shape with these silhouettes (Laurentini, IEEE TPAMI 16(2),
    1994). Hollows that no silhouette shows are filled.

    masks: [B, H, W], the share of each pixel that the object covers, or whether the object covers the pixel, as seen
        by the cameras `around`
    resolution: the number of nodes along each side of the grid

    Raises ValueError if no point is inside all silhouettes.
    """
    places = nodes(resolution, _BOUND).reshape(-1, 3)
    inside = torch.ones(len(places))
    for i in range(len(around)):
        at, _ = around[i : i + 1].project(places)
        at = at * torch.tensor([1.0, -1.0])  # rows of a picture run downwards
        seen = F.grid_sample(masks[None, i : i + 1].float(), at[None], align_corners=False)
        inside = torch.minimum(inside, seen.flatten())
    if not bool((inside > 0.5).any()):
        raise ValueError("no point lies inside all silhouettes: the cameras do not match the masks")
    vertices, faces = marched(inside.view((resolution,) * 3).numpy(), 0.5)
    step = 2 * _BOUND / (resolution - 1)
    return Extracted(vertices * step - step - _BOUND, faces)


def check_class(class_name: str) -> None:
    """Raises ValueError for an unknown class, and for faces, which have no mesh."""
    if class_name not in _SOLID:
        raise ValueError(unknown(class_name, _SOLID, "toybox class"))


def class_mesh(class_name: str, faces: int = _FACES) -> Extracted:
    """Returns the generic shape of a toybox class, with about `faces` triangles. Raises ValueError as `check_class`
    does."""
    check_class(class_name)
    held = held_out("development-duck")
    toy = TrueToy(replace(held, thing=replace(held.thing, class_name=class_name, pattern_seed=None)))
    around = Cameras.of(
        [360 * i / count for count in _RINGS.values() for i in range(count)],
        [elevation for elevation, count in _RINGS.items() for _ in range(count)],
    )
    return simplified(carved(toy.views(around).masks, around), faces)


def write_class_mesh(class_name: str, path: Path) -> Path:
    """Writes the generic shape of a toybox class as a grey PLY file. Raises ValueError as `check_class` does."""
    mesh = class_mesh(class_name)
    if len(mesh.faces) > 2 * _FACES:
        warnings.warn(mesh.notes[-1], stacklevel=2)  # the package that simplifies meshes is missing
    return write_ply(path, mesh.vertices, mesh.faces, np.full((len(mesh.vertices), 3), _GREY))
