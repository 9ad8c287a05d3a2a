"""Fields, which are trainable representations of 3D objects. A new field needs one file and one entry in the union."""

from typing import Annotated

from pydantic import Field

from pcs_3d.fields.frequency_mlp import FrequencyMlp
from pcs_3d.fields.gaussians import Gaussians
from pcs_3d.fields.hash_grid import HashGrid
from pcs_3d.fields.local_edit import LocalEdit
from pcs_3d.fields.tetrahedra import Tetrahedra
from pcs_3d.fields.textured_mesh import TexturedMesh
from pcs_3d.fields.triplane import Triplane
from pcs_3d.fields.voxels import Voxels
from shared.config import default_kind

FieldSettings = Annotated[
    Voxels | Triplane | FrequencyMlp | HashGrid | Tetrahedra | TexturedMesh | Gaussians | LocalEdit,
    Field(discriminator="kind"),
    default_kind("voxels"),
]

__all__ = [
    "FieldSettings",
    "FrequencyMlp",
    "Gaussians",
    "HashGrid",
    "LocalEdit",
    "Tetrahedra",
    "TexturedMesh",
    "Triplane",
    "Voxels",
]
