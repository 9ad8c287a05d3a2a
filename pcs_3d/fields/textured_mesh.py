"""A mesh that stays as it is and takes other colours."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field as Setting
from torch import Tensor, nn

from pcs_3d.fields import grids
from pcs_3d.fields.base import BaseField, FieldPart
from pcs_3d.fields.field import Surface
from pcs_3d.fields.starts import MeshFile, first_grid
from pcs_3d.meshes.read_mesh import read_mesh
from shared.trainable.base import Rate


class TexturedMesh(FieldPart):
    """The triangles of a file (`start`), and colours on a grid of so many nodes around them, which are the file's at first."""

    drawn_by: ClassVar[str] = "mesh"
    kind: Literal["textured_mesh"] = "textured_mesh"
    start: MeshFile  # type: ignore[assignment]
    resolution: Annotated[int, Setting(ge=4, le=512)] = 96
    lr: Rate = 0.1

    def build(self, channels: int = 3, seed: int = 0) -> TexturedMeshField:
        return TexturedMeshField(self, channels)


class TexturedMeshField(BaseField):
    """vertices [V, 3], faces [F, 3]: not trained; colours [R, R, R, K] before sigmoid."""

    faces: Tensor
    vertices: Tensor

    def __init__(self, part: TexturedMesh, channels: int) -> None:
        super().__init__(part.bound, channels)
        self.part = part
        pieces = [p for p in read_mesh(part.start.path, part.start.up, part.start.azimuth_deg) if len(p.faces)]
        if not pieces:
            raise ValueError(
                f"field.start.path: {part.start.path} has points and no triangles, which textured_mesh needs"
            )
        offsets = np.cumsum([0, *(len(p.vertices) for p in pieces)])
        faces = np.concatenate([p.faces + offset for p, offset in zip(pieces, offsets[:-1], strict=True)])
        vertices = np.concatenate([p.vertices for p in pieces])
        self.register_buffer("vertices", torch.from_numpy(vertices).float(), persistent=False)
        self.register_buffer("faces", torch.from_numpy(faces), persistent=False)
        features = first_grid(part.start, part.resolution, part.bound, channels)[..., 1:]
        self.raw_features = nn.Parameter(features.contiguous())

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        return [("features", [self.raw_features], self.part.feature_rate)]

    def surface(self) -> Surface:
        return Surface(self.vertices, self.faces)

    def features_at(self, points: Tensor) -> Tensor:
        return self.colored(grids.trilinear(self.raw_features, points, self.bound))

    def total_variation(self) -> Tensor:
        """Of colours before sigmoid."""
        return grids.total_variation(self.raw_features)
