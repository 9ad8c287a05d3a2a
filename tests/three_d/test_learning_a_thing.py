"""A field trained only on pictures takes on the shape and colours of the pictured object, even on unseen sides."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pcs_3d.cameras import Cameras, turntable
from pcs_3d.fields import Gaussians, Tetrahedra, Voxels
from pcs_3d.fields.base import BaseVolume
from pcs_3d.fields.field import Sample, SplatField, SurfaceField
from pcs_3d.fields.starts import Blob
from pcs_3d.renderers import Mesh, Splat, Volume
from pcs_3d.renderers.rendering import Rendering
from tests.three_d.closed_forms import view


class Doll(BaseVolume):
    """A body with a nose at the front, coloured so that no two sides look alike."""

    def __init__(self) -> None:
        super().__init__(1.1, 3)
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def at(self, points: Tensor) -> Sample:
        body = 0.55 - (points / torch.tensor([1.0, 1.0, 1.3])).norm(dim=-1)
        nose = 0.25 - (points - torch.tensor([0.55, 0.0, 0.2])).norm(dim=-1)
        density = 80 * torch.sigmoid(60 * torch.maximum(body, nose))
        left = torch.sigmoid(20 * points[..., 1:2])
        colors = left * torch.tensor([0.9, 0.2, 0.1]) + (1 - left) * torch.tensor([0.1, 0.3, 0.9])
        top = torch.sigmoid(20 * points[..., 2:] - 6)
        return Sample(density, (1 - top) * colors + top * torch.tensor([0.95, 0.9, 0.2]))


def renderer(field):
    return (
        Mesh() if isinstance(field, SurfaceField) else Splat() if isinstance(field, SplatField) else Volume(samples=32)
    )


@torch.no_grad()
def seen(field, cameras: Cameras, side: int = 32) -> Rendering:
    return renderer(field).render(field, cameras, view(len(cameras), side, background=0.5))


def learned(field, steps: int, side: int = 32):
    cameras = Cameras.cat([turntable(6, 15.0), Cameras.of([30.0, 200.0], [60.0, -35.0])])
    truth = seen(Doll(), cameras, side)
    groups = [{"params": g.parameters, "lr": g.lr} for g in field.groups()["main"]]
    optimizer = torch.optim.Adam(groups)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        which = torch.randperm(len(cameras), generator=draw)[:2]
        drawn = renderer(field).render(field, cameras[which], view(2, side, background=0.5, generator=draw))
        loss = (drawn.pixels - truth.pixels[which]).square().mean()
        loss = loss + (drawn.opacity - truth.opacity[which]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.02 ** (1 / steps)
    return field


def agreement(field) -> tuple[float, float]:
    """Returns the IoU of the silhouettes and the PSNR in dB, both over views that were not used in training."""
    cameras = Cameras.of([25.0, 115.0, 205.0, 310.0], [35.0, 0.0, 20.0, -10.0])
    truth, mine = seen(Doll(), cameras), seen(field, cameras)
    a, b = truth.opacity > 0.5, mine.opacity > 0.5
    error = float((truth.pixels - mine.pixels).square().mean())
    return float((a & b).sum() / (a | b).sum()), -10 * math.log10(error)


@pytest.mark.parametrize(
    ("part", "steps", "overlap", "psnr"),
    [
        (Voxels(resolution=24, start=Blob(radius=0.7), lr=0.3, lr_features=0.3), 100, 0.95, 26),
        (Tetrahedra(resolution=20, color_resolution=24, start=Blob(radius=0.6), lr=0.1, lr_places=0.03), 80, 0.93, 23),
        (Gaussians(count=250, start=Blob(radius=0.6), lr=1e-2, lr_features=0.1), 60, 0.93, 22),
    ],
    ids=["voxels", "tetrahedra", "gaussians"],
)
def test_a_field_trained_on_eight_pictures_matches_the_object_from_unseen_sides(part, steps, overlap, psnr):
    field = part.build()
    before, _ = agreement(field)
    iou, decibels = agreement(learned(field, steps))
    print(f"{part.kind}: IoU {before:.3f} -> {iou:.3f}, {decibels:.1f} dB")
    assert iou > overlap and decibels > psnr
