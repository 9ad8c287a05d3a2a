"""How time and noise are drawn. To add a distribution, write one file and add one line to the union."""

from typing import Annotated

from pydantic import Field

from shared.noise.times import LogitNormal, Uniform

Noise = Annotated[Uniform | LogitNormal, Field(discriminator="kind")]

__all__ = ["LogitNormal", "Noise", "Uniform"]
