"""Shades colours. Depending on the kind of shading, colours are left unchanged, lit by a lamp, replaced by a lit white
surface, or replaced by normals."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from pcs_3d.renderers.rendering import RenderSettings

AMBIENT = 0.3
"""The share of a colour that is visible without light. DreamFusion draws this share at random between 0.1 and 1."""


def needs_normals(settings: RenderSettings) -> bool:
    """Returns whether the shading needs normals."""
    return settings.shading != "albedo"


def lamps(cameras: Cameras, settings: RenderSettings) -> Tensor:
    """Returns the position of the light in each view, `[B, 3]`. By default, it is the camera's position."""
    return cameras.positions if settings.light is None else settings.light


def shaded(features: Tensor, normals: Tensor | None, points: Tensor, lamp: Tensor, settings: RenderSettings) -> Tensor:
    """Shades features (`[N, K]`), given the points that they belong to, the normals there, and the lamp's positions.
    `normals`, `points` and `lamp` are `[N, 3]`.

    The shading `albedo` returns the features unchanged. `lambertian` returns colour · (ambient + (1 − ambient) · max(0,
    n·l)) (DreamFusion, eq. 7), and `textureless` does the same for a white object. `normal` returns (n + 1) / 2 in
    world coordinates.
    """
    if settings.shading == "albedo":
        return features
    assert normals is not None
    if settings.shading == "normal":
        return (normals + 1) / 2
    toward = F.normalize(lamp - points, dim=-1)
    light = AMBIENT + (1 - AMBIENT) * (normals * toward).sum(-1, keepdim=True).clamp_min(0)
    return light * (torch.ones_like(features) if settings.shading == "textureless" else features)
