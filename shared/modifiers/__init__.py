"""Modifiers define the words that stand for a concept in prompts. To add a modifier, write a module and add its class
to the union."""

from typing import Annotated

from pydantic import Field

from shared.modifiers.learnable import LearnableToken
from shared.modifiers.words import PlainText, RareToken

Modifier = Annotated[PlainText | RareToken | LearnableToken, Field(discriminator="kind")]

__all__ = ["LearnableToken", "Modifier", "PlainText", "RareToken"]
