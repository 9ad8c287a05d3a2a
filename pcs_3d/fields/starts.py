"""A field's contents before the first training step: a blob, a mesh from a file, or the result of an earlier
phase."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field as Setting
from torch import Tensor

from pcs_3d.fields.field import Surface, VolumeField
from pcs_3d.fields.grids import by_chunks, nodes
from pcs_3d.meshes.read_mesh import read_mesh
from pcs_3d.meshes.shape import BallShape, Shape, shape_of_file
from shared.config import KindPart, PathText, Positive, Real, default_kind


class StartPart(KindPart):
    """Base class for starts.

    density: the density inside, per radius.
    softness: the width, in radii, of the layer below the surface in which the density falls off. Because this layer
    lies inside the object, soft shapes look as large as hard ones.
    """

    density: Annotated[float, Setting(gt=0, le=1000)] = 10.0
    softness: Annotated[float, Setting(gt=0, le=1)] = 0.1

    def shape(self) -> Shape:
        """Returns the shape, which provides distances to its surface and colours on it. Raises ValueError if the shape
        is not available."""
        raise NotImplementedError

    def triangles(self) -> Surface:
        """Returns the start's triangles. Raises ValueError if it has none."""
        raise ValueError(f"field.start.kind = {self.kind} has no triangles: start from a file or an earlier phase")

    def check(self) -> None:
        """Raises ValueError if the start's file cannot be read."""
        self.shape()

    def values(self, places: Tensor, channels: int) -> Tensor:
        """Returns the initial values at points (`[N, 3]`), as `[N, 1 + K]`. Each row contains the density before
        softplus, followed by the features (see `features`)."""
        solid = torch.sigmoid(-4 * (self.shape().distance(places) / self.softness + 1))  # 2% at the surface
        raw = inverse_softplus((self.density * solid).clamp_min(1e-4))
        return torch.cat([raw[:, None], self.features(places, channels)], 1)

    def features(self, places: Tensor, channels: int) -> Tensor:
        """Returns features at points (`[N, 3]`) as `[N, K]`. If K is 3, they are the colours of the nearest points on
        the surface, before the sigmoid, or grey if the colours are not known. Otherwise, they are latents, all 0."""
        colors = self.shape().colors(places) if channels == 3 else None
        return torch.zeros(len(places), channels) if colors is None else raw_colors(colors)


class Blob(StartPart):
    """A soft grey ball, as in DreamFusion (https://arxiv.org/abs/2209.14988, appendix A.2).

    radius: the ball's radius, in object radii.
    """

    kind: Literal["blob"] = "blob"
    radius: Annotated[float, Setting(gt=0, le=10)] = 0.5

    def shape(self) -> Shape:
        return BallShape(self.radius)


class MeshFile(StartPart):
    """A mesh or points from a GLB, OBJ or PLY file, scaled to `radius` around the origin. Cameras expect a radius of 1.

    up: the axis that points up in the file. If null, it is z for PLY files and y for other files, as is usual for these
    formats.
    azimuth_deg: the angle by which the object is turned to its left. Set this if the object in the file does not face
    forward.
    """

    kind: Literal["file"] = "file"
    density: Annotated[float, Setting(gt=0, le=1000)] = 40.0
    softness: Annotated[float, Setting(gt=0, le=1)] = 0.03
    path: PathText | None = None  # the GLB, OBJ or PLY file
    up: Literal["y", "z"] | None = None
    azimuth_deg: Real = 0.0
    radius: Annotated[float, Setting(gt=0, le=10)] = 1.0

    def shape(self) -> Shape:
        return shape_of_file(self._named(), self.up, self.azimuth_deg, self.radius)

    def triangles(self) -> Surface:
        pieces = [p for p in read_mesh(self._named(), self.up, self.azimuth_deg) if len(p.faces)]
        if not pieces:
            raise ValueError(f"field.start.path: {self.path} has only points, but this field needs triangles")
        offsets = np.cumsum([0, *(len(p.vertices) for p in pieces)])
        faces = np.concatenate([p.faces + offset for p, offset in zip(pieces, offsets[:-1], strict=True)])
        # Files repeat vertices along texture seams. Here, vertices at the same position are merged.
        places, number = np.unique(np.concatenate([p.vertices for p in pieces]), axis=0, return_inverse=True)
        return Surface(torch.from_numpy(self.radius * places).float(), torch.from_numpy(number.reshape(-1)[faces]))

    def _named(self) -> Path:
        if self.path is None:
            raise ValueError("field.start.path is not set: give a mesh (GLB, OBJ or PLY) as field.start.path=thing.glb")
        return self.path


class PhaseStart(StartPart):
    """The result of an earlier phase of the recipe. The new field can be of any kind. If both fields are volumes, the
    new field inherits the earlier field's densities and colours. Otherwise, it starts from the earlier field's surface.

    resolution: the number of nodes along each side of the grid on which the surface is extracted.
    threshold: the density at the surface. If null, it is found automatically.
    faces: the approximate maximum number of triangles.
    all_parts: whether to keep parts that are not connected to the largest part.
    """

    kind: Literal["phase"] = "phase"
    density: Annotated[float, Setting(gt=0, le=1000)] = 40.0
    softness: Annotated[float, Setting(gt=0, le=1)] = 0.03
    resolution: Annotated[int, Setting(ge=8, le=512)] = 96
    threshold: Positive | None = None
    faces: Annotated[int, Setting(ge=16, le=10_000_000)] = 50_000
    all_parts: bool = False

    def shape(self) -> Shape:
        raise ValueError("field.start.kind = phase, but no earlier phase makes an asset")

    def check(self) -> None:
        """Checks nothing, because recipes are checked before the earlier phase runs."""


class Handed(StartPart):
    """The result of an earlier phase. This start is created while a recipe runs and cannot be set in a recipe.

    surface: the triangles of the earlier field.
    known: the shape, which provides distances to the surface, and colours or latents on it.
    volume: the earlier field itself, if it is a volume.
    """

    kind: Literal["handed"] = "handed"
    density: float = 40.0
    softness: float = 0.03
    surface: Any  # Surface
    known: Any  # Shape
    volume: Any = None  # VolumeField

    def shape(self) -> Shape:
        return self.known

    def triangles(self) -> Surface:
        return self.surface

    @torch.no_grad()
    def values(self, places: Tensor, channels: int) -> Tensor:
        volume: VolumeField | None = self.volume
        if volume is None:
            return super().values(places, channels)

        def asked(points: Tensor) -> Tensor:
            there = volume.at(points.to(volume.device))
            features = raw_colors(there.features) if channels == 3 else there.features
            return torch.cat([inverse_softplus(there.density.clamp_min(1e-4))[..., None], features], -1).float().cpu()

        return by_chunks(asked, places)

    def features(self, places: Tensor, channels: int) -> Tensor:
        return super().features(places, channels) if channels == 3 else self.known.colors(places)


Start = Annotated[Blob | MeshFile | PhaseStart, Setting(discriminator="kind"), default_kind("blob")]


def first_grid(start: StartPart, resolution: int, bound: float, channels: int) -> Tensor:
    """Returns the start's values before softplus and sigmoid (`StartPart.values`) at the nodes of a grid, as
    `[R, R, R, 1 + K]`."""
    places = nodes(resolution, bound).reshape(-1, 3)
    return start.values(places, channels).reshape(resolution, resolution, resolution, -1)


def first_features(start: StartPart, resolution: int, bound: float, channels: int) -> Tensor:
    """Returns the start's features (`StartPart.features`) at the nodes of a grid, as `[R, R, R, K]`. Fields that do not
    store their shape on this grid use this function."""
    places = nodes(resolution, bound).reshape(-1, 3)
    return start.features(places, channels).reshape(resolution, resolution, resolution, -1)


def raw_colors(colors: Tensor) -> Tensor:
    """Clamps colours to [0.02, 0.98] and applies the inverse of the sigmoid."""
    return colors.clamp(0.02, 0.98).logit()


def inverse_softplus(value: Tensor) -> Tensor:
    """Applies the inverse of softplus."""
    return value + torch.log(-torch.expm1(-value))
