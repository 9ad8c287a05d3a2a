"""Penalties on fields. A new penalty needs a class (in its own file or next to related penalties) and one entry in
the union."""

from typing import Annotated

from pydantic import Field

from pcs_3d.regularize.base import GeometryPenalty, Pictures, Seen
from pcs_3d.regularize.grids import Eikonal, Laplacian, TotalVariation
from pcs_3d.regularize.normals import NormalConsistency, NormalImageSmoothness, NormalSmoothness, Orientation
from pcs_3d.regularize.opacity import Opaque, Sparsity, ZVariance
from pcs_3d.regularize.reference import ReferenceViews, Silhouette

GeometryRegularizer = Annotated[
    Sparsity
    | Opaque
    | Silhouette
    | ZVariance
    | Orientation
    | NormalSmoothness
    | NormalImageSmoothness
    | NormalConsistency
    | TotalVariation
    | Eikonal
    | Laplacian
    | ReferenceViews,
    Field(discriminator="kind"),
]

__all__ = ["GeometryPenalty", "GeometryRegularizer", "Pictures", "Seen"]
