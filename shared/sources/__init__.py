"""Sources of examples, such as the user's pictures or class pictures from the base model. None of them uses the model that is
being trained."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.sources.generated import Generated
from shared.sources.phase_pictures import PhasePictures
from shared.sources.picture_folder import Folder
from shared.sources.references import References
from shared.sources.scene import Scene
from shared.sources.source_context import Generate, SourceContext

Source = Annotated[References | Generated | Folder | PhasePictures | Scene, Field(discriminator="kind")]

__all__ = ["Folder", "Generate", "Generated", "PhasePictures", "References", "Scene", "Source", "SourceContext"]
