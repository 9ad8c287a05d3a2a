"""Penalties that compare the field with pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.regularize.base import GeometryPenalty, Pictures, Seen
from pcs_3d.renderers.rendering import Rendering
from shared.config import BatchSize, NotNegative


class ReferenceViews(GeometryPenalty):
    """Makes the field match pictures of the object from their cameras: the mean squared error of pixels, on a grey background,
    and of opacities against masks (RealFusion, https://arxiv.org/abs/2302.10663, eq. 5). Without masks, all pixels count, and
    the field is drawn on the colour of each picture's border.

    count: pictures per step, drawn at random.
    mask_weight: the weight of the opacities' error.
    outside: the weight of pixels outside the masks; 0 if the silhouette should not follow the pictures.
    """

    needs_pictures: ClassVar[bool] = True
    kind: Literal["reference_views"] = "reference_views"
    count: BatchSize = 1
    mask_weight: NotNegative = 0.5
    outside: Annotated[float, Setting(ge=0, le=1)] = 1.0

    def value(self, seen: Seen) -> Tensor:
        drawn, chosen = _drawn(self, seen, self.count)
        if chosen.masks is None:
            return F.mse_loss(drawn.pixels, chosen.pixels)
        mask = chosen.masks
        on_grey = chosen.pixels * mask + 0.5 * (1 - mask)
        counted = torch.lerp(torch.full_like(mask, self.outside), torch.ones_like(mask), mask)
        error = (counted * (drawn.pixels - on_grey).square()).mean()
        return error + self.mask_weight * F.mse_loss(drawn.opacity, mask)


class Silhouette(GeometryPenalty):
    """mean (o − mask)² of opacities, seen from the cameras of pictures with masks: only the silhouette."""

    needs_pictures: ClassVar[bool] = True
    needs_masks: ClassVar[bool] = True
    kind: Literal["silhouette"] = "silhouette"
    count: BatchSize = 1

    def value(self, seen: Seen) -> Tensor:
        drawn, chosen = _drawn(self, seen, self.count)
        if chosen.masks is None:
            raise self.missing("pictures of the object, all with masks")
        return F.mse_loss(drawn.opacity, chosen.masks)


def _drawn(penalty: GeometryPenalty, seen: Seen, count: int) -> tuple[Rendering, Pictures]:
    """Draws the field from the cameras of `count` random pictures, on grey or, without masks, on the colour of each picture's
    border; also returns these pictures."""
    pictures = seen.pictures
    if pictures is None or seen.draw is None or seen.settings is None:
        raise penalty.missing("pictures of the object with known cameras (references)")
    where = "cpu" if seen.generator is None else seen.generator.device
    order = torch.randperm(len(pictures.pixels), generator=seen.generator, device=where)
    at = order[:count].to(pictures.pixels.device)
    height, width = pictures.pixels.shape[-2:]
    chosen = Pictures(pictures.pixels[at], pictures.cameras[at], None if pictures.masks is None else pictures.masks[at])
    behind = border_color(chosen.pixels)
    behind = behind if chosen.masks is None else torch.full_like(behind, 0.5)
    settings = replace(
        seen.settings, height=height, width=width, background=behind, shading="albedo", light=None, normals=False
    )
    return seen.draw(chosen.cameras, settings), chosen


def border_color(pixels: Tensor) -> Tensor:
    """[B, 3, 1, 1]: the median of each channel along the border of pictures [B, 3, H, W], which is the colour of a plain
    background."""
    rows, columns = pixels[..., [0, -1], :].flatten(2), pixels[..., 1:-1, [0, -1]].flatten(2)
    return torch.cat([rows, columns], -1).median(-1).values[..., None, None]
