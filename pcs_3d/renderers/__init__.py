"""Renderers, which render views of a field. A new renderer needs one file and one entry in the union."""

from typing import Annotated

from pydantic import Field

from pcs_3d.renderers.mesh import Mesh
from pcs_3d.renderers.splat import Splat
from pcs_3d.renderers.volume import Volume
from shared.config import default_kind

RendererSettings = Annotated[Volume | Splat | Mesh, Field(discriminator="kind"), default_kind("volume")]

__all__ = ["Mesh", "RendererSettings", "Splat", "Volume"]
