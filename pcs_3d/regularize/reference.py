"""The thing as it is known from pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.regularize.base import GeometryPenalty, Views


class ReferenceViews(GeometryPenalty):
    """The field, seen from where pictures of the thing were taken, looks like them: the mean squared error of pixels, on a grey
    background, and of opacities against masks (RealFusion, https://arxiv.org/abs/2302.10663, eq. 5). count: pictures a step,
    drawn at random. Without masks all pixels count; with them those of the thing."""

    needs_pictures: ClassVar[bool] = True
    kind: Literal["reference_views"] = "reference_views"
    count: Annotated[int, Setting(ge=1)] = 1
    mask_weight: Annotated[float, Setting(ge=0)] = 0.5

    def value(self, views: Views) -> Tensor:
        pictures = views.pictures
        if pictures is None or views.draw is None or views.settings is None:
            raise self.missing("pictures of the thing whose cameras are known")
        where = "cpu" if views.generator is None else views.generator.device
        order = torch.randperm(len(pictures.pixels), generator=views.generator, device=where)
        chosen = order[: self.count].to(pictures.pixels.device)
        target = pictures.pixels[chosen]
        height, width = target.shape[-2:]
        grey = target.new_full((len(chosen), target.shape[1], 1, 1), 0.5)
        settings = replace(
            views.settings, height=height, width=width, background=grey, shading="albedo", light=None, normals=False
        )
        drawn = views.draw(pictures.cameras[chosen], settings)
        if pictures.masks is None:
            return F.mse_loss(drawn.pixels, target)
        mask = pictures.masks[chosen]
        return F.mse_loss(drawn.pixels, target * mask + 0.5 * (1 - mask)) + self.mask_weight * F.mse_loss(
            drawn.opacity, mask
        )
