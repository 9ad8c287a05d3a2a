"""Writes captions that name one or more of the subjects in a picture."""

from __future__ import annotations

from typing import Literal

import torch

from shared.prompts.base import CaptionPart, Names, Template
from shared.types import Example


class UnionSampling(CaptionPart):
    """Names a random non-empty subset of a picture's subjects each time the picture is drawn ("a photo of a <mug> and a
    <dog>"). The loss uses the union of the named subjects' masks (Break-A-Scene, https://arxiv.org/abs/2305.16311, section
    3.2). If concepts were always named together, they could not be told apart after training.

    Class pictures keep their own captions.
    """

    kind: Literal["union_sampling"] = "union_sampling"
    template: Template = "a photo of {concept}"  # {concept} stands for the joined names
    joined_by: str = " and "  # the text between two names
    article: str = "a "  # the text before each name

    def __call__(self, example: Example, generator: torch.Generator, words: Names, class_nouns: Names) -> Example:
        drawn = torch.rand(len(example.owners) + 1, generator=generator)
        if example.role == "prior":
            return example.with_(caption=example.caption.replace("{class_noun}", class_nouns.get(example.owner, "")))
        subset = self._subset(example, drawn[:-1], generator)
        masks = {name: mask for name, mask in example.masks.items() if name in subset}
        caption = self.joined_by.join(f"{self.article}{words[name]}" for name in subset)
        text = "" if float(drawn[-1]) < self.drop else self.template.replace("{concept}", caption)
        return example.with_(owners=subset, masks=masks, caption=text)

    def _subset(self, example: Example, drawn: torch.Tensor, generator: torch.Generator) -> tuple[str, ...]:
        """Draws a size uniformly, then a subset of that size, in random order."""
        count = 1 + int(torch.randint(len(example.owners), (), generator=generator))
        return tuple(example.owners[int(i)] for i in drawn.argsort()[:count])
