"""Computes the distances and normals of a surface from its depth in a view."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from pcs_3d.fields.base import unit


def along_rays(depth: Tensor, cameras: Cameras) -> Tensor:
    """Converts depths along the cameras' axes (`[B, H, W, 1]`) to distances from the cameras."""
    _, directions = cameras.rays(*depth.shape[1:3])
    return depth / -(directions * cameras.axes[:, None, None, 2]).sum(-1, keepdim=True).to(depth)


def normals_of_distance(distance: Tensor, opacity: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Computes normals and points of a surface from its distances to the cameras (`[B, H, W, 1]`).

    Returns:
        Unit normals in world coordinates that face the camera, and the points, both [B, H, W, 3]. Normals are 0 where
        the opacity is 0.5 or less.
    """
    origins, directions = (r.to(distance) for r in cameras.rays(*distance.shape[1:3]))
    points = origins + directions * distance
    padded = F.pad(points.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate").permute(0, 2, 3, 1)
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    up = padded[:, :-2, 1:-1] - padded[:, 2:, 1:-1]
    normals = unit(torch.linalg.cross(right, up, dim=-1))
    return torch.where(opacity > 0.5, normals, torch.zeros_like(normals)), points
