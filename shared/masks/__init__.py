"""Where the subject is: masks as given, grown and softened, or as boxes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.masks.base import MaskPart, no_mask
from shared.masks.box import Box
from shared.masks.given import Given
from shared.masks.grow import Grow

Mask = Annotated[Given | Grow | Box, Field(discriminator="kind")]

__all__ = ["Box", "Given", "Grow", "Mask", "MaskPart", "no_mask"]
