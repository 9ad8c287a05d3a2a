"""A fixed mesh with trainable colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field as Setting
from torch import Tensor, nn

from pcs_3d.fields import grids
from pcs_3d.fields.base import BaseField, FieldPart
from pcs_3d.fields.field import Surface
from pcs_3d.fields.starts import MeshFile, PhaseStart, first_features
from shared.config import default_kind
from shared.trainable.base import Rate


class TexturedMesh(FieldPart):
    """A fixed mesh from a file or an earlier phase (`start`), and a grid of trainable colours around it with
    `resolution` nodes along each side. The grid is initialised with the start's colours."""

    drawn_by: ClassVar[str] = "mesh"
    kind: Literal["textured_mesh"] = "textured_mesh"
    start: Annotated[MeshFile | PhaseStart, Setting(discriminator="kind"), default_kind("file")] = MeshFile()  # type: ignore[assignment]
    resolution: Annotated[int, Setting(ge=4, le=512)] = 96
    lr: Rate = 0.1

    def check(self) -> None:
        """Raises ValueError if the file cannot be read or has no triangles."""
        if isinstance(self.start, MeshFile):
            self.start.triangles()

    def build(self, channels: int = 3, seed: int = 0) -> TexturedMeshField:
        return TexturedMeshField(self, channels)


class TexturedMeshField(BaseField):
    """A mesh, which is saved with the state but not trained, and a grid of trained colours.

    vertices, faces: [V, 3] and [F, 3].
    raw_features: [R, R, R, K]; colours are stored before the sigmoid is applied.
    """

    faces: Tensor
    vertices: Tensor

    def __init__(self, part: TexturedMesh, channels: int) -> None:
        super().__init__(part.bound, channels)
        self.part = part
        surface = part.start.triangles()
        self.register_buffer("vertices", surface.vertices)
        self.register_buffer("faces", surface.faces)
        features = first_features(part.start, part.resolution, part.bound, channels)
        self.raw_features = nn.Parameter(features.contiguous())

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        return [("features", [self.raw_features], self.part.feature_rate)]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        for name in ("vertices", "faces"):  # first resized to the saved shapes
            kept = state.get(name)
            if kept is not None and kept.ndim == 2 and kept.shape[1] == 3:
                setattr(self, name, getattr(self, name).new_zeros(kept.shape))
        super().load_state_dict(state)

    def surface(self) -> Surface:
        return Surface(self.vertices, self.faces)

    def features_at(self, points: Tensor) -> Tensor:
        return self.colored(grids.trilinear(self.raw_features, points, self.bound))

    def total_variation(self) -> Tensor:
        """Returns the total variation of the colours before the sigmoid."""
        return grids.total_variation(self.raw_features)
