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
    """Makes renders of the field match pictures of the object from the same cameras (RealFusion,
    https://arxiv.org/abs/2302.10663, eq. 5). The value is the mean squared pixel error on a grey background, plus the
    weighted mean squared error between opacities and masks. Without masks, all pixels count, and each render's
    background is the picture's border colour.

    count: the number of pictures per step, which are drawn at random.
    mask_weight: the weight of the error in opacity.
    outside: the weight of pixels outside the masks. If both this and `mask_weight` are 0, the silhouette need not match
    the pictures.
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
    """The mean of (o − mask)² over opacities o, rendered from the cameras of pictures with masks. It depends only on
    the silhouette.

    count: the number of pictures per step, which are drawn at random.
    """

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
    """Renders the field from the cameras of `count` random pictures. The background is grey or, without masks, the
    colour of each picture's border. Returns the renders and the pictures."""
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
    """Returns the median of each channel along the border of each picture, `[B, 3, 1, 1]`. For a plain background, the
    median is the background's colour. The pictures are `[B, 3, H, W]`."""
    rows, columns = pixels[..., [0, -1], :].flatten(2), pixels[..., 1:-1, [0, -1]].flatten(2)
    return torch.cat([rows, columns], -1).median(-1).values[..., None, None]
