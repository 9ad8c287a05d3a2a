"""The base class for renderers."""

from __future__ import annotations

from typing import Any, ClassVar

from pcs_3d.cameras import Cameras
from pcs_3d.renderers.rendering import Rendering, RenderSettings
from shared.config import KindPart, unknown


class RendererPart(KindPart):
    """Base class for renderers. A renderer consists of its settings and keeps no state between views."""

    draws: ClassVar[type]  # the protocol of the fields that it can render

    def render(self, field: Any, cameras: Cameras, settings: RenderSettings) -> Rendering:
        """Renders B views of a field. The views are differentiable with respect to the field. Raises ValueError if this
        renderer cannot render the field, or if the settings are incompatible with the field."""
        raise NotImplementedError

    def check(self, field: Any, cameras: Cameras, settings: RenderSettings) -> None:
        """Raises ValueError if the field, the background, the shading and this renderer are incompatible."""
        if not isinstance(field, self.draws):
            raise ValueError(
                f"renderer: {self.kind} cannot render a {type(field).__name__}: choose another renderer.kind"
            )
        if settings.shading not in ("albedo", "lambertian", "textureless", "normal"):
            raise ValueError("shading: " + unknown(settings.shading, ["albedo", "lambertian", "textureless", "normal"]))
        if field.channels != 3 and settings.shading != "albedo":
            raise ValueError(f"shading: {settings.shading} needs 3 channels, but the field has {field.channels}")
        given, b = tuple(settings.background.shape), len(cameras)
        if given not in ((b, field.channels, 1, 1), (b, field.channels, settings.height, settings.width)):
            raise ValueError(f"background: {list(given)} does not match {b} views with {field.channels} channels and "
                             f"{settings.height}×{settings.width} pixels")  # fmt: skip
