"""Settings for clips that start from the noise of another clip, as stored in recipes and concepts.

Importing this module loads no model library.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.config import Many, Part


class NoisePriorSettings(Part):
    """Determines how much of the initial noise comes from a clip, and how that clip is inverted."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.3  # p, the share of the noise's variance that comes from the clip
    prompt: str = ""  # the prompt used for the inversion
    steps: Many | None = None  # steps of the inversion; if null, as many as in sampling
    refine: Annotated[int, Field(ge=0, le=1000)] = 0  # see `shared.sampling.inversion.invert`
