"""A field that can change only inside given regions."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor, nn

from pcs_3d.fields.base import BaseVolume, unit
from pcs_3d.fields.field import Replaced, Sample
from pcs_3d.fields.grids import nodes
from pcs_3d.fields.starts import MeshFile, Start, inverse_softplus
from pcs_3d.fields.voxels import VoxelField, Voxels
from pcs_3d.regions import Inside, Region, RegionPart, together
from shared.config import Slot
from shared.trainable import TrainableGroup


class LocalEdit(Voxels):
    """A fixed grid that contains the start, and a learned grid that is visible only inside the regions. Outside the
    regions, the field equals the start bit for bit (compare FocalDreamer's separate fields,
    https://arxiv.org/abs/2308.10608).

    regions: the regions in which the field can change. If empty, the guidance's regions are used.
    fill: the minimum initial density inside the regions, per radius. The resulting grey fog lets new parts grow.
    """

    kind: Literal["local_edit"] = "local_edit"  # pyright: ignore[reportIncompatibleVariableOverride]
    start: Start = MeshFile()
    regions: Slot[Region] = {}
    fill: Annotated[float, Setting(ge=0, le=1000)] = 2.0

    def within(self, regions: Mapping[str, Any]) -> LocalEdit:
        return self if self.regions else self.model_copy(update={"regions": dict(regions)})

    def check(self) -> None:
        if not self.regions:
            raise ValueError(
                "field.kind = local_edit needs a region that may change: set guidance.regions.hat.kind=box "
                "guidance.regions.hat.lo=[…] guidance.regions.hat.hi=[…], in object radii"
            )
        super().check()

    def build(self, channels: int = 3, seed: int = 0) -> LocalEditField:
        return LocalEditField(self, channels)


class LocalEditField(BaseVolume):
    """The field (1 - w) · kept + w · learned, where w is the degree to which a point is inside the regions, in
    [0, 1]."""

    def __init__(self, part: LocalEdit, channels: int) -> None:
        super().__init__(part.bound, channels)
        self.part = part
        parts: Mapping[str, RegionPart] = part.regions
        self.regions: dict[str, Inside] = {name: region.build() for name, region in parts.items()}
        self.kept = VoxelField(part, channels)
        self.learned = copy.deepcopy(self.kept)
        self.kept.requires_grad_(False)
        with torch.no_grad():
            share = together(self.regions, nodes(part.resolution, part.bound))[..., None]
            fog = inverse_softplus((part.fill * share).clamp_min(1e-4))
            anew = fog > self.learned.raw_density
            self.learned.raw_density.copy_(torch.where(anew, fog, self.learned.raw_density))
            self.learned.raw_features.masked_fill_(anew, 0.0)  # grey

    def _kept(self) -> dict[str, Tensor]:
        return {f"{n}.{k}": v for n in ("kept", "learned") for k, v in getattr(self, n)._kept().items()}

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        return self.learned.groups()

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        return self.learned.trained()

    def advance(self, step: int, steps: int) -> Replaced | None:
        return self.learned.advance(step, steps)

    def at(self, points: Tensor) -> Sample:
        flat = points.reshape(-1, 3)
        old, share = self.kept.at(flat), together(self.regions, flat)
        some = _somewhere(share)
        new, part = self.learned.at(flat[some]), share[some]
        density = old.density.index_put((some,), torch.lerp(old.density[some], new.density, part))
        features = old.features.index_put((some,), torch.lerp(old.features[some], new.features, part[:, None]))
        return Sample(density.reshape(points.shape[:-1]), features.reshape(*points.shape[:-1], -1))

    def density(self, points: Tensor) -> Tensor:
        flat = points.reshape(-1, 3)
        density, share = self.kept.density(flat), together(self.regions, flat)
        some = _somewhere(share)
        mixed = torch.lerp(density[some], self.learned.density(flat[some]), share[some])
        return density.index_put((some,), mixed).reshape(points.shape[:-1])

    def between(self, origins: Tensor, directions: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        rays = origins, directions, distances
        (least, most), (low, high) = self.kept.between(*rays), self.learned.between(*rays)
        changed = together(self.regions, origins[:, None] + distances[..., None] * directions[:, None]) > 0
        return (
            torch.where(changed, torch.minimum(least, low), least),
            torch.where(changed, torch.maximum(most, high), most),
        )

    def normals(self, points: Tensor) -> Tensor:
        share, kept = together(self.regions, points)[..., None], self.kept.normals(points)
        return torch.where(share > 0, unit(torch.lerp(kept, self.learned.normals(points), share)), kept)

    def total_variation(self) -> Tensor:
        """Returns the total variation of the learned grid."""
        return self.learned.total_variation()


def _somewhere(share: Tensor) -> Tensor:
    """Returns the indices (int64) of the points inside a region. If there are no such points, returns the index of one
    point outside the regions, so that a gradient of 0 reaches the field."""
    some = share.nonzero()[:, 0]
    return some if len(some) else some.new_zeros(min(1, len(share)))
