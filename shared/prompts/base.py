"""The base class of all caption parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import AfterValidator, Field

from shared.config import KindPart
from shared.types import Example


def _with_place(template: str) -> str:
    if "{concept}" not in template:
        raise ValueError(f"template {template!r} has no {{concept}}")
    return template


#: A caption that contains {concept}.
Template = Annotated[str, AfterValidator(_with_place)]
#: Words for each owner of an example, by the owner's name.
Names = Mapping[str, str]


class CaptionPart(KindPart):
    """Writes an example's caption each time the example is drawn."""

    drop: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability of an empty caption

    def __call__(self, example: Example, generator: torch.Generator, words: Names, class_nouns: Names) -> Example:
        """Returns the example with its caption.

        Args:
            words: the words that stand for each owner in captions
            class_nouns: the class noun of each owner
        """
        raise NotImplementedError
