"""A region drawn as a mask over one view."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import FOV_DEG, Cameras, look_at_distance
from pcs_3d.regions.base import Inside, RegionPart
from shared.config import PathText, Real
from shared.io.decode import read_mask


class ViewMask(RegionPart):
    """The part of space that the given camera projects onto the bright part of a mask, limited to a range of depths.
    Draw the mask over a render from this camera.

    depth: the range of depths in radii, measured along the camera's axis from the object's centre. For example, (0, 2)
    is the far half.
    """

    kind: Literal["view_mask"] = "view_mask"
    path: PathText
    azimuth_deg: Real = 0.0
    elevation_deg: Real = 15.0
    fov_deg: Annotated[float, Field(gt=0, lt=180)] = FOV_DEG
    fill: Annotated[float, Field(gt=0, le=2)] = 0.92
    depth: tuple[Real, Real] = (-2.0, 2.0)

    def build(self) -> Inside:
        drawn = torch.from_numpy(np.asarray(read_mask(self.path), dtype=np.float32) / 255)[None, None]
        distance = look_at_distance(self.fov_deg, self.fill)
        camera = Cameras.of([self.azimuth_deg], self.elevation_deg, distance, self.fov_deg)
        height, width = drawn.shape[-2:]
        scale = torch.tensor([min(height, width) / width, -min(height, width) / height])

        def inside(points: Tensor) -> Tensor:
            places, depth = camera.to(points.device).project(points.reshape(-1, 3))
            asked = (places * scale.to(places)).view(1, -1, 1, 2)
            shown = F.grid_sample(drawn.to(places), asked, align_corners=False).reshape(points.shape[:-1])
            away = depth.reshape(points.shape[:-1]) - distance
            within = torch.minimum(away - self.depth[0], self.depth[1] - away)
            return shown * self.faded(within) * (depth.reshape(away.shape) > 0)

        return inside
