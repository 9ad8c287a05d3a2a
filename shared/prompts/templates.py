"""Writes captions for training pictures from templates."""

from __future__ import annotations

import re
from typing import Literal

import torch

from shared.prompts.base import CaptionPart, Names, Template
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


class Templates(CaptionPart):
    """Draws one template per picture and step. For a picture that the user has captioned, the user's caption is used
    instead, with the concept inserted.

    In a user's caption, `<name>` or `{concept}` marks where the concept goes. If neither occurs, the concept replaces
    the class noun. If the class noun does not occur either, the concept is put at the beginning.
    """

    kind: Literal["templates"] = "templates"
    set: Literal["plain", "subject", "style"] = "plain"  # the set of templates to draw from
    templates: tuple[Template, ...] = ()  # templates to use instead of the set; if empty, the set is used
    user_captions: bool = True  # whether to use the user's captions instead of templates

    @property
    def taxonomy(self) -> str:
        one = len(self.templates or SETS[self.set]) == 1
        return ("one template" if one else "template captions") + (", some empty" if self.drop else "")

    def __call__(self, example: Example, generator: torch.Generator, words: Names, class_nouns: Names) -> Example:
        """Returns the example with its caption. A class picture keeps its own, or gets one with the class noun."""
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
            text = text if concept else text.removeprefix("{concept}, ")  # a motion may have no words
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
