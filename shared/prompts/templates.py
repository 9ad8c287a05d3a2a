"""Captions for training pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from shared.config import KindPart
from shared.types import Example

SUBJECT = (
    "a photo of a {concept}",
    "a rendering of a {concept}",
    "a cropped photo of the {concept}",
    "the photo of a {concept}",
    "a photo of a clean {concept}",
    "a photo of my {concept}",
    "a close-up photo of a {concept}",
    "a photo of the {concept}",
    "a good photo of the {concept}",
    "a photo of one {concept}",
    "a photo of a nice {concept}",
)
STYLE = (
    "a painting in the style of {concept}",
    "a picture in the style of {concept}",
    "a rendering in the style of {concept}",
    "the painting in the style of {concept}",
    "a close-up painting in the style of {concept}",
    "a nice painting in the style of {concept}",
)
SETS = {"plain": ("a photo of a {concept}",), "subject": SUBJECT, "style": STYLE}


class Templates(KindPart):
    """One template is drawn per picture and step; a user's own caption is kept, with the concept put into it.

    In a user's caption `<name>` or `{concept}` marks the place; without either, the class noun is replaced, and where it
    does not occur either the concept is put in front.
    """

    kind: Literal["templates"] = "templates"
    set: Literal["plain", "subject", "style"] = "plain"
    templates: tuple[str, ...] = ()  # given: used instead of the set
    user_captions: bool = True  # false: a template in place of each, as where there are none
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability of an empty caption

    @property
    def taxonomy(self) -> str:
        one = len(self.templates or SETS[self.set]) == 1
        return ("one template" if one else "template captions") + (", some empty" if self.drop else "")

    @model_validator(mode="after")
    def _has_place(self) -> Templates:
        for template in self.templates:
            if "{concept}" not in template:
                raise ValueError(f"template {template!r} has no {{concept}}")
        return self

    def __call__(
        self,
        example: Example,
        generator: torch.Generator,
        words: Mapping[str, str],
        class_nouns: Mapping[str, str],
    ) -> Example:
        """Class pictures keep their own caption, or are named by the class noun.

        Args:
            words: by owner, what it is called
            class_nouns: by owner, its plain class
        """
        concept, class_noun = words.get(example.owner, ""), class_nouns.get(example.owner, "")
        choices = self.templates or SETS[self.set]
        pick = choices[int(torch.randint(len(choices), (), generator=generator))]
        dropped = float(torch.rand((), generator=generator)) < self.drop
        if example.role == "prior":
            template = example.caption if example.user_caption else pick.replace("{concept}", "{class_noun}")
            return example.with_(caption=template.replace("{class_noun}", class_noun))
        if dropped:
            return example.with_(caption="")
        if example.user_caption:
            text = _place(example, class_noun) if self.user_captions else pick
        else:
            text = f"{pick} {example.caption}".strip()
        return example.with_(caption=text.replace("{concept}", concept).replace("{class_noun}", class_noun))


def _place(example: Example, class_noun: str) -> str:
    text = example.caption.replace(f"<{example.owner}>", "{concept}")
    if "{concept}" in text:
        return text
    if class_noun and re.search(rf"\b{re.escape(class_noun)}\b", text):
        return re.sub(rf"\b{re.escape(class_noun)}\b", "{concept}", text, count=1)
    return f"{{concept}}, {text}"
