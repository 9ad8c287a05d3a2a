"""Writes all of an asset's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_3d.export.extract import Extracted, check_finite, extract, simplified
from pcs_3d.export.gaussian_ply import write_gaussians
from pcs_3d.export.settings import ExportSettings
from pcs_3d.export.texture import textured
from pcs_3d.export.write import write_glb, write_obj, write_ply
from pcs_3d.fields.field import SplatField, SurfaceField
from pcs_3d.fields.grids import by_chunks


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    files: all the files that were written.
    faces: the number of triangles in the mesh.
    watertight: whether the mesh is closed.
    volume: the mesh's volume in radii³, or None if the mesh is not closed.
    notes: the choices that were made and the parts that were left out.
    """

    files: tuple[Path, ...]
    faces: int
    watertight: bool
    volume: float | None
    notes: tuple[str, ...]


def export_asset(field: Any, folder: Path, settings: ExportSettings | None = None, name: str = "asset") -> Exported:
    """Writes a field to an existing folder as `NAME.glb`, as `NAME.obj` with its MTL and PNG, and as `NAME.ply`.
    Gaussians are also written as `NAME.splats.ply`.

    Raises ValueError, before anything is written, if the field has no surface, contains latents instead of colours, or
    contains values that are not finite.
    """
    settings = settings or ExportSettings()
    if field.channels != 3:
        raise ValueError(f"the field has {field.channels} latent channels, but exported files need colours")
    found = extract(field, settings.resolution, settings.threshold, settings.all_parts)
    mesh = simplified(found, settings.faces)
    colors = surface_colors(field)
    painted = textured(mesh, colors, settings.texture)
    at_vertices = by_chunks(colors, torch.from_numpy(mesh.vertices).float()).cpu().numpy()
    splats = []
    # Gaussians are written first, because only this step detects individual Gaussians that are not finite.
    if isinstance(field, SplatField):
        with torch.no_grad():
            splats.append(write_gaussians(folder / f"{name}.splats.ply", field.splats()))
    files = [write_glb(folder / f"{name}.glb", painted), *write_obj(folder / f"{name}.obj", painted)]
    files.append(write_ply(folder / f"{name}.ply", mesh.vertices, mesh.faces, at_vertices))
    watertight, volume = _solid(mesh)
    notes = mesh.notes if watertight else (*mesh.notes, "the mesh is not watertight")
    return Exported((*files, *splats), len(mesh.faces), watertight, volume, notes)


def surface_colors(field: Any) -> Callable[[Tensor], Tensor]:
    """Returns a function that takes points on a field's surface and returns their colours, both `[N, 3]`. The colours
    are on the CPU and have no gradient. The function raises ValueError if any colour is not finite."""

    @torch.no_grad()
    def colors(points: Tensor) -> Tensor:
        there = points.to(field.device)
        shown = field.features_at(there) if isinstance(field, SurfaceField) else field.at(there).features
        shown = shown.float().cpu()
        check_finite(shown, "colours")  # NaN would become an arbitrary colour in 8 bits
        return shown

    return colors


def _solid(mesh: Extracted) -> tuple[bool, float | None]:
    import trimesh

    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    return bool(solid.is_watertight), float(solid.volume) if solid.is_watertight else None
