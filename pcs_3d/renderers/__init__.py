"""Renderers, which draw views of a field. Adding one takes one file and one line in the union."""

from typing import Annotated

from pydantic import Field

from pcs_3d.renderers.mesh import Mesh
from pcs_3d.renderers.splat import Splat
from pcs_3d.renderers.volume import Volume
from shared.config import default_kind

RendererSettings = Annotated[Volume | Splat | Mesh, Field(discriminator="kind"), default_kind("volume")]

__all__ = ["Mesh", "RendererSettings", "Splat", "Volume"]
