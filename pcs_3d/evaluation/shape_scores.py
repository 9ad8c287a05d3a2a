"""Compares an asset's silhouettes and colours with those of the real object, and measures properties of its mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.evaluation.alignment import aligned, iou
from pcs_3d.evaluation.views import PaintedMesh, Views, draw

BEST_DB = 60.0  # the PSNR of identical colours
_BEHIND = (0.0, 1.0)  # the backgrounds: black and white


@dataclass(frozen=True)
class Compared:
    """A mesh compared with the real object.

    iou: the overlap of the silhouettes in each view, [B], 0 to 1.
    psnr: the PSNR of the colours in each view, [B], in dB.
    psnr_of_all: the PSNR over all views.
    mesh, views: the mesh with the size and position that `aligned` found, and its views.
    """

    iou: Tensor
    psnr: Tensor
    psnr_of_all: float
    mesh: PaintedMesh
    views: Views


def compared(mesh: PaintedMesh, truth: Views, around: Cameras) -> Compared:
    """Aligns the mesh with the truth, using only scale and translation, and compares the two view by view."""
    placed = aligned(mesh, truth.masks, around)
    views = draw(placed, around, truth.masks.shape[-1])
    return Compared(*differences(views, truth), placed, views)


def differences(views: Views, truth: Views) -> tuple[Tensor, Tensor, float]:
    """Compares views with those of the truth, without aligning them. Returns the overlap of the silhouettes and the
    PSNR of the colours in dB (both float64 `[B]`), and the PSNR over all views."""
    errors = [_errors(view, t) for view, t in zip(_each(views), _each(truth), strict=True)]
    psnr = torch.tensor([_decibels(e) for e in errors], dtype=torch.float64)
    return iou(views.masks, truth.masks), psnr, _decibels(torch.cat(errors))


def _each(views: Views) -> list[tuple[Tensor, Tensor]]:
    return list(zip(views.pixels, views.masks, strict=True))


def _errors(view: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the squared errors of the pixels that the object covers in either picture. The errors are computed on
    black and on white, so that a missing part is not mistaken for a part in the background colour."""
    (pixels, mask), (wanted, true_mask) = view, truth
    parts = []
    for level in _BEHIND:
        behind = torch.full((), level)
        mine, true = torch.where(mask, pixels, behind), torch.where(true_mask, wanted, behind)
        parts.append((mine - true).double().square()[:, mask | true_mask].flatten())
    return torch.cat(parts)


def _decibels(errors: Tensor) -> float:
    if not len(errors):
        return math.nan
    return min(BEST_DB, -10 * math.log10(max(float(errors.mean()), 1e-12)))


@dataclass(frozen=True)
class Geometry:
    """Properties of a mesh of radius 1. All except `faces` are measured with coincident vertices merged.

    faces, vertices: the numbers of triangles and vertices.
    watertight: whether the mesh is closed.
    components, largest_component: the number of connected parts, and the largest one's share of the triangles.
    volume, share_of_box: the volume in radii³, and its share of the bounding box. Both are None if the mesh is not
    closed.
    """

    faces: int
    vertices: int
    watertight: bool
    components: int
    largest_component: float
    volume: float | None
    share_of_box: float | None


def geometry(mesh: PaintedMesh) -> Geometry:
    """Measures a mesh. Texture seams, along which files repeat vertices, do not count as open edges."""
    import trimesh

    corners = mesh.vertices.double().numpy()
    _, number = np.unique(np.round(corners / 1e-5).astype(np.int64), axis=0, return_inverse=True)
    number = number.reshape(-1)
    places = np.zeros((int(number.max()) + 1, 3))
    places[number] = corners
    faces = number[mesh.faces.numpy()]
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    solid = trimesh.Trimesh(places, faces, process=False)
    parts = trimesh.graph.connected_component_labels(_pairs(faces), node_count=len(places))[faces[:, 0]]
    counts = np.unique(parts, return_counts=True)[1]
    closed = bool(solid.is_watertight)
    volume = abs(float(solid.volume)) if closed else None
    box = float(np.prod(np.ptp(places[np.unique(faces)], axis=0)))
    return Geometry(
        faces=len(mesh.faces),
        vertices=len(np.unique(faces)),
        watertight=closed,
        components=len(counts),
        largest_component=float(counts.max() / counts.sum()),
        volume=volume,
        share_of_box=None if volume is None or box <= 0 else volume / box,
    )


def _pairs(faces: np.ndarray) -> np.ndarray:
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
