"""Extracts a mesh from a field. If the field has densities, they are sampled on a grid, and the surface is where they
cross a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcs_3d.fields.field import SurfaceField, VolumeField
from pcs_3d.fields.grids import by_chunks, nodes

_CANDIDATES = 48  # number of thresholds tried


@dataclass(frozen=True)
class Extracted:
    """An extracted surface.

    vertices: float64 [V, 3], in object radii.
    faces: int64 [F, 3], counter-clockwise when seen from outside.
    notes: the choices that were made and the parts that were left out, as text.
    """

    vertices: np.ndarray
    faces: np.ndarray
    notes: tuple[str, ...] = ()


@torch.no_grad()
def export_grid(field: VolumeField, resolution: int = 96) -> Tensor:
    """Returns the densities (`[R, R, R]`, on the CPU) at the nodes of a grid that spans the field's bound. Raises
    ValueError if any density is not finite."""
    places = nodes(resolution, field.bound).reshape(-1, 3)
    grid = by_chunks(lambda p: field.density(p.to(field.device)).float().cpu(), places).view((resolution,) * 3)
    check_finite(grid, "densities")
    return grid


def check_finite(values: Tensor, what: str) -> None:
    """Raises ValueError if any of a field's values is not finite."""
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"the field contains {what} that are not finite (NaN or Inf), so its training must have failed"
        )


def extract(field: Any, resolution: int = 96, threshold: float | None = None, all_parts: bool = False) -> Extracted:
    """Extracts the surface of a field. If the field has its own mesh, this mesh is returned. Otherwise, the surface is
    where the density crosses a threshold.

    Args:
        threshold: the density at the surface, per radius. If None, the threshold whose silhouettes best match the
            renders is chosen (`automatic_threshold`).
        all_parts: if False, only the largest connected part is kept

    Raises:
        ValueError: the field has no surface, or some of its densities or vertices are not finite
    """
    if isinstance(field, SurfaceField):
        with torch.no_grad():
            surface = field.surface()
        check_finite(surface.vertices, "vertices")
        return _largest_faces(surface.vertices.double().cpu().numpy(), surface.faces.cpu().numpy(), all_parts)
    grid = export_grid(field, resolution).numpy()
    step = 2 * field.bound / (resolution - 1)
    level = automatic_threshold(grid, step, all_parts) if threshold is None else threshold
    if not grid.max() > level:
        raise ValueError(
            f"the field is empty: its largest density is {grid.max():.3g}, which does not exceed the surface "
            f"threshold of {level:.3g}. Train longer, or with a larger guidance scale"
        )
    notes = [f"threshold {level:.3g}"]
    if not all_parts:
        grid, left = _largest_part(grid, level)
        notes += [f"{left:.1%} of the volume was not connected to the rest and was left out"] * (left > 0)
    vertices, faces = marched(grid, level)
    return Extracted(vertices * step - step - field.bound, faces, tuple(notes))


def automatic_threshold(grid: np.ndarray, step: float, all_parts: bool = True) -> float:
    """Returns the density at which to extract the surface. It is the density at which the surface's silhouettes along
    the three axes best match the pixels that are more than half opaque. If only the largest connected part will be kept,
    only its silhouettes count, so that the object does not fall apart. If a range of densities fits equally well, the
    middle of that range is chosen. Raises ValueError if the field is empty."""
    opaque = [1 - np.exp(-grid.sum(axis) * step) > 0.5 for axis in range(3)]
    largest = float(grid.max())
    if not any(o.any() for o in opaque):
        raise ValueError(
            f"the field is empty: its largest density is {largest:.3g}, and no ray through it is more than half opaque. "
            "Train longer, or with a larger guidance scale"
        )
    levels = np.geomspace(max(largest * 1e-4, 1e-6), largest * 0.95, _CANDIDATES)

    def fit(level: float) -> float:
        shape = grid if all_parts else _largest_part(grid, level)[0]
        return float(np.mean([_overlap(shape.max(axis) > level, o) for axis, o in enumerate(opaque)]))

    fits = np.array([fit(level) for level in levels])
    best = levels[fits >= fits.max() - 2e-3]
    return float((best.min() + best.max()) / 2)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def _largest_part(grid: np.ndarray, level: float) -> tuple[np.ndarray, float]:
    """Returns the grid with only its largest connected part, and the share of the volume that was removed."""
    from scipy import ndimage

    labels, count = ndimage.label(grid > level)  # type: ignore[misc]
    if count < 2:
        return grid, 0.0
    sizes = np.bincount(labels.ravel())[1:]
    others = (labels > 0) & (labels != 1 + sizes.argmax())
    return np.where(others, 0.0, grid), float(1 - sizes.max() / sizes.sum())


def marched(grid: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Pads a grid with empty cells, so that the surface is closed at the bound, and applies marching cubes to it."""
    from skimage.measure import marching_cubes

    vertices, faces, _, _ = marching_cubes(np.pad(grid, 1), level, gradient_direction="ascent")
    return _welded(vertices.astype(np.float64), faces.astype(np.int64)[:, ::-1])


def _welded(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges coincident vertices, drops triangles that become degenerate, and makes the faces point outwards."""
    import trimesh

    mesh = trimesh.Trimesh(vertices, faces, process=True, validate=False)
    mesh.update_faces(mesh.nondegenerate_faces(height=1e-9))
    mesh.remove_unreferenced_vertices()
    if mesh.volume < 0:
        mesh.invert()
    return np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces, dtype=np.int64)


def _largest_faces(vertices: np.ndarray, faces: np.ndarray, all_parts: bool) -> Extracted:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    links = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(vertices),) * 2)
    _, label = connected_components(links, directed=False)
    of_face = label[faces[:, 0]]
    sizes = np.bincount(of_face)
    kept = faces if all_parts else faces[of_face == sizes.argmax()]
    used, numbers = np.unique(kept, return_inverse=True)
    left = len(faces) - len(kept)
    notes = (f"triangles left out because they were not connected to the rest: {left}",) if left else ()
    return Extracted(vertices[used], numbers.reshape(-1, 3), notes)


def simplified(mesh: Extracted, faces: int) -> Extracted:
    """Simplifies a mesh to approximately `faces` triangles, using the fast-simplification package (quadric error).
    Smaller meshes are returned unchanged. If the package is missing, the mesh keeps all its triangles and a note is
    added."""
    if len(mesh.faces) <= faces:
        return mesh
    try:
        import fast_simplification
    except ImportError:
        note = (
            f"the mesh keeps its {len(mesh.faces)} triangles instead of {faces}, because fast-simplification is not "
            "installed (pip install fast-simplification)"
        )
        return Extracted(mesh.vertices, mesh.faces, (*mesh.notes, note))
    simplify: Any = fast_simplification.simplify
    vertices, triangles = simplify(
        mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32), target_count=faces, agg=5
    )
    note = f"the mesh was simplified from {len(mesh.faces)} to {len(triangles)} triangles"
    return Extracted(*_welded(vertices.astype(np.float64), triangles.astype(np.int64)), (*mesh.notes, note))
