"""Shading of colours: plain, lit by one lamp, without texture, or as normals."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from pcs_3d.renderers.rendering import RenderSettings

AMBIENT = 0.3
"""The share of a colour that is visible without light; DreamFusion draws it from 0.1 to 1."""


def needs_normals(settings: RenderSettings) -> bool:
    """Whether the shading needs normals."""
    return settings.shading != "albedo"


def lamps(cameras: Cameras, settings: RenderSettings) -> Tensor:
    """[B, 3]: positions of the light; by default, the cameras' own."""
    return cameras.positions if settings.light is None else settings.light


def shaded(features: Tensor, normals: Tensor | None, points: Tensor, lamp: Tensor, settings: RenderSettings) -> Tensor:
    """Features [N, K] of points [N, 3] with normals [N, 3], lit from lamp [N, 3] -> [N, K].

    lambertian: colour · (ambient + (1 − ambient) · max(0, n·l)) (DreamFusion, eq. 7).
    textureless: the same for white.
    normal: (n + 1) / 2 in world coordinates.
    """
    if settings.shading == "albedo":
        return features
    assert normals is not None
    if settings.shading == "normal":
        return (normals + 1) / 2
    toward = F.normalize(lamp - points, dim=-1)
    light = AMBIENT + (1 - AMBIENT) * (normals * toward).sum(-1, keepdim=True).clamp_min(0)
    return light * (torch.ones_like(features) if settings.shading == "textureless" else features)
