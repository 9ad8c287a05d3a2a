"""Draws Gaussians with gsplat (https://github.com/nerfstudio-project/gsplat)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.fields.field import Splats
from shared.io.failures import of_the_machine

BLUR = 0.3  # added to the variances, in pixels², so that no Gaussian falls between pixels


@dataclass(frozen=True)
class Found:
    """gsplat's rasterization function, or None and the reason why it cannot be used."""

    rasterization: Any = None
    why: str = ""


@lru_cache
def gsplat(device: torch.device) -> Found:
    """Imports gsplat and tests it by rendering one Gaussian on the device. This test is needed because gsplat builds
    its kernels on first use, so that a broken installation may fail only then. Warns once if gsplat is installed but
    does not work."""
    try:
        from gsplat import rasterization  # pyright: ignore[reportMissingImports]

        found = Found(rasterization)
        origin, one = torch.zeros(1, 3, device=device), torch.ones(1, device=device)
        turn = torch.tensor([[1.0, 0, 0, 0]], device=device)
        ball = Splats(origin, origin + 0.1, turn, one, origin)
        _rasterized(found, ball, Cameras.of([0.0]).to(device), 8, 8)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "gsplat":
            return Found(why="it is not installed")
        if of_the_machine(error):
            raise
        why = f"it does not work ({type(error).__name__}: {str(error)[:200]})"
        warnings.warn(
            f"gsplat is installed but {why.removeprefix('it ')}, so Gaussians are rendered in PyTorch, which is slower",
            stacklevel=2,
        )
        return Found(why=why)
    return found


def by_gsplat(splats: Splats, cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return _rasterized(gsplat(splats.means.device), splats, cameras, height, width)


def _rasterized(
    found: Found, splats: Splats, cameras: Cameras, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    b = len(cameras)
    flip = torch.diag(splats.means.new_tensor([1.0, -1, -1]))  # x right, y down, z ahead
    turn = flip @ cameras.axes
    views = torch.eye(4, device=turn.device).repeat(b, 1, 1)
    views[:, :3, :3] = turn
    views[:, :3, 3] = -(turn @ cameras.positions[..., None])[..., 0]
    zoom = cameras.focal * min(height, width) / 2
    lens = torch.zeros(b, 3, 3, device=turn.device)
    lens[:, 0, 0] = lens[:, 1, 1] = zoom
    lens[:, 0, 2], lens[:, 1, 2], lens[:, 2, 2] = width / 2, height / 2, 1
    drawn, opacity, _ = found.rasterization(
        splats.means, splats.rotations, splats.scales, splats.opacities, splats.features, views, lens, width, height,
        render_mode="RGB+ED", eps2d=BLUR,
    )  # fmt: skip
    assert math.prod(opacity.shape) == b * height * width
    return drawn[..., :-1], opacity, drawn[..., -1:]
