"""Presents a threestudio geometry and its material as one of this package's fields, for export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcs_3d.fields.base import BaseVolume
from pcs_3d.fields.field import Sample


class Lifted(BaseVolume):
    """A volume defined by a threestudio geometry and its material. Raises ValueError if the geometry has no densities
    or the material has no colours."""

    def __init__(self, geometry: Any, material: Any) -> None:
        super().__init__(float(geometry.cfg.radius), 3)
        self.geometry, self.material = geometry, material
        with torch.no_grad():
            self.at(torch.zeros(1, 3, device=self.device))

    def at(self, points: Tensor) -> Sample:
        flat = points.reshape(-1, 3)
        found = self.geometry(flat, output_normal=False)
        if "density" not in found:
            raise ValueError(f"exporter: {type(self.geometry).__name__} has no density to extract a surface from")
        density = found["density"].reshape(points.shape[:-1]) * self.inside(points)
        shown = self.material.export(points=flat, **found)
        if "albedo" not in shown:
            raise ValueError(f"exporter: {type(self.material).__name__} exports no colours (albedo)")
        return Sample(density, shown["albedo"].reshape(*points.shape[:-1], 3))

    def density(self, points: Tensor) -> Tensor:
        flat = points.reshape(-1, 3)
        return self.geometry.forward_density(flat).reshape(points.shape[:-1]) * self.inside(points)
