"""Gaussian splatting (3DGS, https://arxiv.org/abs/2308.04079), using gsplat on a GPU and PyTorch otherwise."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.fields.field import SplatField, Splats
from pcs_3d.fields.gaussians import rotation_matrices
from pcs_3d.renderers.base import RendererPart
from pcs_3d.renderers.by_gsplat import BLUR, by_gsplat, gsplat
from pcs_3d.renderers.rendering import Rendering, RenderSettings
from pcs_3d.renderers.screen import along_rays, normals_of_distance
from pcs_3d.renderers.shading import lamps, needs_normals, shaded


class Splat(RendererPart):
    """Renders a field by Gaussian splatting.

    tile: the side length, in pixels, of the square tiles. Each tile has its own list of Gaussians.
    engine: `gsplat` needs CUDA. `auto` uses gsplat on a GPU if it is installed and works, and `torch` otherwise. If
    gsplat is installed but does not work, a warning is shown.
    """

    draws: ClassVar[type] = SplatField
    kind: Literal["splat"] = "splat"
    tile: Annotated[int, Setting(ge=2, le=64)] = 8
    engine: Literal["auto", "torch", "gsplat"] = "auto"

    def render(self, field: SplatField, cameras: Cameras, settings: RenderSettings) -> Rendering:
        self.check(field, cameras, settings)
        splats = field.splats()
        draw = by_gsplat if self.uses_gsplat(splats.means.device) else self._by_torch
        colors, opacity, depth = draw(splats, cameras, settings.height, settings.width)
        depth, normals = along_rays(depth, cameras), None
        if settings.normals or needs_normals(settings):
            normals, points = normals_of_distance(depth, opacity.detach(), cameras)
            lit = lamps(cameras, settings)[:, None, None].expand_as(points)
            normal, point, lamp = (n.reshape(-1, 3) for n in (normals, points, lit))
            # The colours are opacity-weighted sums, and are lit as if each pixel showed a single surface.
            seen = shaded(colors.reshape(-1, colors.shape[-1]), normal, point, lamp, settings)
            seen = seen.view(*normals.shape[:3], -1)
            own = settings.shading in ("textureless", "normal")
            colors = seen * opacity if own else seen
        seen = opacity.permute(0, 3, 1, 2)
        return Rendering(
            colors.permute(0, 3, 1, 2) + (1 - seen) * settings.background.to(seen), seen, depth.permute(0, 3, 1, 2),
            None if normals is None else normals.permute(0, 3, 1, 2),
        )  # fmt: skip

    def uses_gsplat(self, device: torch.device) -> bool:
        """Returns whether gsplat renders fields on this device. Raises ValueError if `engine` is gsplat but gsplat
        cannot be used."""
        if self.engine == "torch":
            return False
        why = gsplat(device).why if device.type == "cuda" else "the field is not on a GPU"
        if self.engine == "gsplat" and why:
            raise ValueError(f"renderer.engine = gsplat cannot be used, because {why}: set renderer.engine=torch")
        return not why

    def _by_torch(self, splats: Splats, cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        views = [self._view(splats, cameras[i : i + 1], height, width) for i in range(len(cameras))]
        colors, opacity, depth = (torch.stack(v) for v in zip(*views, strict=True))
        return colors, opacity, depth

    def _view(self, splats: Splats, camera: Cameras, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Renders one view from lists of the Gaussians in each tile, sorted from near to far. Returns colours (`[H, W,
        K]`), opacity and depth (both `[H, W, 1]`)."""
        places, spread, depth = projected(splats, camera, height, width)
        lists = self._lists(places, spread, depth, splats, (height, width))  # [T, M], padded with -1
        rows, columns = -(-height // self.tile), -(-width // self.tile)
        inner = torch.arange(self.tile, device=places.device)
        tiles = torch.arange(rows * columns, device=places.device)
        y = (tiles // columns * self.tile)[:, None, None] + inner[:, None] + 0.5
        x = (tiles % columns * self.tile)[:, None, None] + inner + 0.5
        pixels = torch.stack(torch.broadcast_tensors(x, y), -1).reshape(len(tiles), -1, 1, 2)
        at = lists.clamp_min(0)
        away = pixels - places[at][:, None]  # [T, P, M, 2]
        a, b, c = (spread[at][:, None, :, i] for i in range(3))
        power = (
            -0.5
            * (c * away[..., 0] ** 2 - 2 * b * away[..., 0] * away[..., 1] + a * away[..., 1] ** 2)
            / (a * c - b * b)
        )
        alpha = (splats.opacities[at] * (lists >= 0))[:, None] * power.exp()
        alpha = torch.where(alpha > 1 / 512, alpha.clamp(max=0.995), torch.zeros_like(alpha))
        passed = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], -1), -1)[..., :-1]
        weights = alpha * passed
        values = torch.cat([splats.features, depth[:, None], torch.ones_like(depth)[:, None]], -1)[at]
        drawn = (weights @ values).view(rows, columns, self.tile, self.tile, -1).transpose(1, 2)
        drawn = drawn.reshape(rows * self.tile, columns * self.tile, -1)[:height, :width]
        opacity = drawn[..., -1:]
        return drawn[..., :-2], opacity, drawn[..., -2:-1] / opacity.clamp_min(1e-6)

    @torch.no_grad()
    def _lists(self, places: Tensor, spread: Tensor, depth: Tensor, splats: Splats, size: tuple[int, int]) -> Tensor:
        """Returns the Gaussians that reach each tile, sorted from near to far, as `[T, M]`. Shorter lists are padded
        with -1."""
        rows, columns = (-(-s // self.tile) for s in size)
        reach = torch.stack([spread[:, 0], spread[:, 2]], -1).sqrt() * 3
        low = ((places - reach) / self.tile).floor().long()
        high = ((places + reach) / self.tile).floor().long()
        seen = (depth > 0.05) & (splats.opacities > 1 / 512) & (reach.amax(-1) < 4 * max(size))
        x, y = torch.arange(columns, device=places.device), torch.arange(rows, device=places.device)
        across = (x >= low[:, :1]) & (x <= high[:, :1]) & seen[:, None]
        down = (y >= low[:, 1:]) & (y <= high[:, 1:])
        near = depth.argsort(stable=True)
        hit = (down[near].T[:, None] & across[near].T[None]).reshape(rows * columns, -1)
        most = max(1, int(hit.sum(-1).max()))
        tile, which = hit.nonzero().unbind(-1)
        place = hit.long().cumsum(-1)[tile, which] - 1
        lists = near.new_full((rows * columns, most), -1)
        lists[tile, place] = near[which]
        return lists


def projected(splats: Splats, camera: Cameras, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projects Gaussians onto a view (EWA). Returns their positions in pixels (`[N, 2]`), their variances and
    covariance in pixels² (`[N, 3]`; xx, xy, yy), and their depths (`[N]`)."""
    shorter = min(height, width)
    local = (splats.means - camera.positions[0]) @ camera.axes[0].T
    depth = -local[:, 2]
    zoom = camera.focal[0] * shorter / 2 / depth.clamp_min(0.05)
    places = torch.stack([width / 2 + local[:, 0] * zoom, height / 2 - local[:, 1] * zoom], -1)
    zero = torch.zeros_like(zoom)
    lean = zoom / depth.clamp_min(0.05)  # points closer to the camera are magnified more
    jacobian = torch.stack([zoom, zero, local[:, 0] * lean, zero, -zoom, -local[:, 1] * lean], -1).view(-1, 2, 3)
    frame = rotation_matrices(splats.rotations) * splats.scales[:, None]
    half = jacobian @ (camera.axes[0] @ frame)
    spread = half @ half.mT
    return places, torch.stack([spread[:, 0, 0] + BLUR, spread[:, 0, 1], spread[:, 1, 1] + BLUR], -1), depth
