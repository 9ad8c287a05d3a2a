"""Distributions of training times and of noise. To add a distribution, write a module and add its class to the union."""

from typing import Annotated

from pydantic import Field

from shared.noise.times import LogitNormal, Uniform

Noise = Annotated[Uniform | LogitNormal, Field(discriminator="kind")]

__all__ = ["LogitNormal", "Noise", "Uniform"]
