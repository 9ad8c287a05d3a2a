"""Regions, which are parts of space with their own guidance. A new kind of region needs one file and one entry in the
union."""

from typing import Annotated

from pydantic import Field

from pcs_3d.regions.base import Inside, RegionPart, seen, together
from pcs_3d.regions.box import Box
from pcs_3d.regions.sdf import Sdf
from pcs_3d.regions.view_mask import ViewMask

Region = Annotated[Box | Sdf | ViewMask, Field(discriminator="kind")]

__all__ = ["Box", "Inside", "Region", "RegionPart", "Sdf", "ViewMask", "seen", "together"]
