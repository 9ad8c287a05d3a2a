"""Textures a mesh by unwrapping it with xatlas and baking the field's colours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pcs_3d.export.extract import Extracted
from pcs_3d.fields.grids import by_chunks
from pcs_3d.renderers.rasterize import barycentric, nearest_faces


@dataclass(frozen=True)
class Textured:
    """A textured mesh.

    vertices: [V, 3]; vertices on seams are duplicated.
    faces: [F, 3].
    uv: [V, 2] in [0, 1], with v up.
    texture: uint8 [H, W, 3]; the first row is at v = 1.
    normals: [V, 3], unit normals of the smooth surface.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    texture: np.ndarray
    normals: np.ndarray


def textured(mesh: Extracted, colors: Callable[[Tensor], Tensor], size: int = 512) -> Textured:
    """Unwraps a mesh and bakes a texture of size×size pixels for it.

    Pixels outside all triangles get the colour of the nearest covered pixel, so that no seam shows when a viewer
    interpolates or shrinks the texture.

    Args:
        colors: takes points on the surface ([N, 3]) and returns their colours ([N, 3], in [0, 1])
    """
    import trimesh
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32))
    packing = xatlas.PackOptions()
    packing.padding, packing.resolution = 2, size
    charts = xatlas.ChartOptions()
    atlas.generate(charts, packing)
    original, faces, uv = atlas[0]
    original, faces = original.astype(np.int64), faces.astype(np.int64)
    smooth = np.array(trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).vertex_normals)
    vertices = mesh.vertices[original]
    texture = _baked(vertices, faces, uv.astype(np.float64), colors, size)
    return Textured(vertices, faces, uv.astype(np.float64), texture, smooth[original])


@torch.no_grad()
def _baked(
    vertices: np.ndarray, faces: np.ndarray, uv: np.ndarray, colors: Callable[[Tensor], Tensor], size: int
) -> np.ndarray:
    from scipy import ndimage

    corners = torch.from_numpy(uv[faces] * [size, -size] + [0.0, size])  # pixels, y down
    face = nearest_faces(corners, torch.ones(len(faces), 3, dtype=torch.float64), size, size)
    y, x = (face >= 0).nonzero(as_tuple=True)
    if not len(y):
        raise ValueError("the texture is so small that none of its pixels lies in a triangle: increase export.texture")
    chosen = face[y, x]
    shares = barycentric(corners[chosen], torch.stack([x, y], -1) + 0.5)
    points = (shares[..., None] * torch.from_numpy(vertices[faces])[chosen]).sum(1).float()
    seen = by_chunks(colors, points).clamp(0, 1)
    picture = np.zeros((size, size, 3), dtype=np.uint8)
    picture[y.numpy(), x.numpy()] = seen.mul(255).round().to(torch.uint8).cpu().numpy()
    nearest = ndimage.distance_transform_edt((face < 0).numpy(), return_distances=False, return_indices=True)
    return picture[tuple(np.asarray(nearest))]
