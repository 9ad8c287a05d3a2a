"""Renders triangles with a z-buffer and differentiable silhouettes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from pcs_3d.fields.base import unit
from pcs_3d.fields.field import Surface, SurfaceField
from pcs_3d.renderers.base import RendererPart
from pcs_3d.renderers.rasterize import antialiased, barycentric, nearest_faces, silhouette_edges
from pcs_3d.renderers.rendering import Rendering, RenderSettings
from pcs_3d.renderers.screen import along_rays
from pcs_3d.renderers.shading import lamps, shaded


class Mesh(RendererPart):
    """Renders a field's triangles.

    finer: the supersampling factor. Each pixel is the mean of finer × finer samples.
    """

    draws: ClassVar[type] = SurfaceField
    kind: Literal["mesh"] = "mesh"
    finer: Annotated[int, Setting(ge=1, le=4)] = 1

    def render(self, field: SurfaceField, cameras: Cameras, settings: RenderSettings) -> Rendering:
        self.check(field, cameras, settings)
        surface = field.surface()
        bend = vertex_normals(surface)
        views = []
        for i in range(len(cameras)):
            lamp = lamps(cameras, settings)[i]
            views.append(self._view(field, surface, bend, cameras[i : i + 1], lamp, settings, i))
        drawn = torch.stack(views).permute(0, 3, 1, 2)
        drawn = F.avg_pool2d(drawn, self.finer) if self.finer > 1 else drawn
        k = field.channels
        opacity = drawn[:, k : k + 1]
        seen = opacity.detach().clamp_min(1e-6)
        depth = along_rays((drawn[:, k + 1 : k + 2] / seen).permute(0, 2, 3, 1), cameras).permute(0, 3, 1, 2)
        normals = unit(drawn[:, k + 2 :].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return Rendering(drawn[:, :k], opacity, depth * (opacity > 0), normals if settings.normals else None)

    def _view(
        self, field: SurfaceField, surface: Surface, bend: Tensor, camera: Cameras, lamp: Tensor, settings: RenderSettings,
        row: int,
    ) -> Tensor:  # fmt: skip
        """Renders one view as `[H, W, K + 5]`. The channels are colours on the background, opacity, depth along the
        camera's axis, and normals. Depth and normals are multiplied by opacity."""
        height, width = settings.height * self.finer, settings.width * self.finer
        places, depth = on_screen(surface.vertices, camera, height, width)
        corners, depths = places[surface.faces], depth[surface.faces]
        face = nearest_faces(corners.detach(), depth.detach()[surface.faces], height, width)
        covered = face >= 0
        y, x = covered.nonzero(as_tuple=True)
        chosen = face[y, x]
        shares = barycentric(corners[chosen], torch.stack([x, y], -1) + 0.5) / depths[chosen]
        shares = (shares / shares.sum(-1, keepdim=True))[..., None]  # perspective correction
        points = (shares * surface.vertices[surface.faces[chosen]]).sum(1)
        normals = unit((shares * bend[surface.faces[chosen]]).sum(1))
        colors = shaded(field.features_at(points), normals, points, lamp.expand_as(points), settings)
        along = ((camera.positions - points) * camera.axes[0, 2]).sum(-1, keepdim=True)
        values = torch.cat([colors, torch.ones_like(along), along, normals], -1)
        behind = F.interpolate(settings.background[row : row + 1].to(values), (height, width))[0].permute(1, 2, 0)
        empty = torch.cat([behind, values.new_zeros(height, width, 5)], -1)
        drawn = empty.index_put((y, x), values)
        edges = silhouette_edges(surface.faces, corners.detach())
        return antialiased(drawn, covered, places[edges])


def on_screen(points: Tensor, camera: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns the positions in pixels (`[N, 2]`; x right, y down) and the depths (`[N]`) of points (`[N, 3]`) for one
    camera."""
    places, depth = camera.project(points)
    half = min(height, width) / 2
    middle = points.new_tensor([width / 2, height / 2])
    return middle + places[0] * points.new_tensor([half, -half]), depth[0]


def vertex_normals(surface: Surface) -> Tensor:
    """Returns the unit normal of each vertex, `[V, 3]`. The normal points along the area-weighted mean of the normals
    of the adjacent triangles."""
    a, b, c = surface.vertices[surface.faces].unbind(1)
    flat = torch.linalg.cross(b - a, c - a, dim=-1)
    summed = torch.zeros_like(surface.vertices).index_add(0, surface.faces.reshape(-1), flat.repeat_interleave(3, 0))
    return unit(summed)
