"""How a concept is named in prompts. A new modifier is one file and one line in the union."""

from typing import Annotated

from pydantic import Field

from shared.modifiers.learnable import LearnableToken
from shared.modifiers.words import PlainText, RareToken

Modifier = Annotated[PlainText | RareToken | LearnableToken, Field(discriminator="kind")]

__all__ = ["LearnableToken", "Modifier", "PlainText", "RareToken"]
