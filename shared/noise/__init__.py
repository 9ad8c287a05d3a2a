"""How time and noise are drawn. A new distribution is one file and one line in the union."""

from typing import Annotated

from pydantic import Field

from shared.noise.times import LogitNormal, Uniform

Noise = Annotated[Uniform | LogitNormal, Field(discriminator="kind")]

__all__ = ["LogitNormal", "Noise", "Uniform"]
