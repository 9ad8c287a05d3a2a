"""Prepares subjects' masks by growing, softening, tracking or pooling them, or by replacing them with boxes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.masks.base import MaskPart, no_mask
from shared.masks.box import Box
from shared.masks.given import Given
from shared.masks.grow import Grow
from shared.masks.pool import pool_masks
from shared.masks.track import Track

Mask = Annotated[Given | Grow | Box, Field(discriminator="kind")]

__all__ = ["Box", "Given", "Grow", "Mask", "MaskPart", "Track", "no_mask", "pool_masks"]
