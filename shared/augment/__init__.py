"""Random changes (flips, resizing, colours, backgrounds) that are made to an example each time it is drawn."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.augment.background import Background
from shared.augment.base import Augmentation
from shared.augment.color_jitter import ColorJitter
from shared.augment.flip import Flip
from shared.augment.random_resize import RandomResize

Augment = Annotated[Flip | RandomResize | ColorJitter | Background, Field(discriminator="kind")]

__all__ = ["Augment", "Augmentation", "Background", "ColorJitter", "Flip", "RandomResize"]
