"""All files of one asset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field as Setting
from torch import Tensor

from pcs_3d.cameras import turntable
from pcs_3d.export.extract import Extracted, extract, simplified
from pcs_3d.export.gaussian_ply import write_gaussians
from pcs_3d.export.texture import textured
from pcs_3d.export.write import write_glb, write_obj, write_ply
from pcs_3d.fields.field import SplatField, SurfaceField
from pcs_3d.fields.grids import by_chunks
from pcs_3d.renderers.base import RendererPart
from pcs_3d.renderers.rendering import RenderSettings
from shared.config import Part


class ExportSettings(Part):
    """resolution: nodes along a side of the grid that densities are asked on; threshold: None, found automatically; faces: the
    most triangles; texture: pixels along a side; all_parts: also what is not connected to the largest part."""

    resolution: Annotated[int, Setting(ge=8, le=512)] = 96
    threshold: Annotated[float, Setting(gt=0)] | None = None
    faces: Annotated[int, Setting(ge=16)] = 20_000
    texture: Annotated[int, Setting(ge=16, le=8192)] = 512
    all_parts: bool = False


@dataclass(frozen=True)
class Exported:
    """files: what was written; faces, watertight, volume (radii³): of the mesh; notes: what was chosen and left out."""

    files: tuple[Path, ...]
    faces: int
    watertight: bool
    volume: float
    notes: tuple[str, ...]


def export_asset(field: Any, folder: Path, settings: ExportSettings | None = None, name: str = "asset") -> Exported:
    """`NAME.glb`, `NAME.obj` with MTL and PNG, `NAME.ply`, and `NAME.splats.ply` of Gaussians, in a folder that is there.

    Raises ValueError for a field without a surface, one of latents, and one of values that are not numbers, before anything
    is written.
    """
    settings = settings or ExportSettings()
    if field.channels != 3:
        raise ValueError(f"the field holds latents of {field.channels} channels, and files hold colours")
    found = extract(field, settings.resolution, settings.threshold, settings.all_parts)
    mesh = simplified(found, settings.faces)
    colors = surface_colors(field)
    painted = textured(mesh, colors, settings.texture)
    at_vertices = by_chunks(colors, torch.from_numpy(mesh.vertices).float()).cpu().numpy()
    files = [write_glb(folder / f"{name}.glb", painted), *write_obj(folder / f"{name}.obj", painted)]
    files.append(write_ply(folder / f"{name}.ply", mesh.vertices, mesh.faces, at_vertices))
    if isinstance(field, SplatField):
        with torch.no_grad():
            files.append(write_gaussians(folder / f"{name}.splats.ply", field.splats()))
    watertight, volume = _solid(mesh)
    notes = mesh.notes if watertight else (*mesh.notes, "the mesh is not watertight")
    return Exported(tuple(files), len(mesh.faces), watertight, volume, notes)


def surface_colors(field: Any) -> Callable[[Tensor], Tensor]:
    """What a field shows at points [N, 3] on its surface: [N, 3], on the CPU, without gradient."""

    @torch.no_grad()
    def colors(points: Tensor) -> Tensor:
        there = points.to(field.device)
        shown = field.features_at(there) if isinstance(field, SurfaceField) else field.at(there).features
        return shown.float().cpu()

    return colors


def _solid(mesh: Extracted) -> tuple[bool, float]:
    import trimesh

    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    return bool(solid.is_watertight), float(solid.volume) if solid.is_watertight else float(np.nan)


def write_turntable(
    path: Path,
    field: Any,
    renderer: RendererPart,
    frames: int = 36,
    size: int = 256,
    background: Sequence[float] = (1.0, 1, 1),
) -> Path:
    """A clip once around the thing, beginning at its front: `.mp4` (2 s and more), or as `write_clip` has it."""
    from shared.io.clips.write_clip import write_clip

    if field.channels != len(background):
        raise ValueError(f"the field has {field.channels} channels, and the background {len(background)}")
    views = []
    for i in range(frames):
        camera = turntable(frames)[i : i + 1].to(field.device)
        behind = torch.tensor(background, device=field.device).view(1, -1, 1, 1)
        with torch.no_grad():
            views.append(renderer.render(field, camera, RenderSettings(size, size, behind)).pixels.cpu())
    return write_clip(path, torch.cat(views) * 2 - 1, max(6.0, min(18.0, frames / 2)))
