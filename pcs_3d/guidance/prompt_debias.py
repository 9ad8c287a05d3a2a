"""Removes words that imply one side of an object from the prompts for the other sides (D-SDS,
https://arxiv.org/abs/2303.15413, section 4.2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pcs_3d.view_prompts import DIRECTIONS, Direction
from shared.config import Part, PathText
from shared.io.failures import of_the_machine
from shared.prompts import names_in, without

_QUESTION = "this image is depicting a {mask} view of {prompt}"


class PromptDebias(Part):
    """Removes words that make a view unlikely from the prompt for that view.

    For each word, a masked language model estimates how likely each view is, first given the whole prompt and then
    given the prompt without the word. The word is removed from a view's prompt if p(view | all) / mean(p(view | all),
    p(view | without the word)) is below `threshold`. For example, "smiling" is removed from the prompt for the back
    view.

    Concepts and their class nouns are never removed. Because the language model does not know learned names, it reads
    class nouns instead.
    """

    model: PathText  # a local folder with a masked language model for transformers, such as BERT
    threshold: Annotated[float, Field(gt=0, lt=2)] = 0.95

    def prompts(self, prompt: str, class_nouns: Mapping[str, str]) -> dict[Direction, str]:
        """Returns the prompt for each direction. Raises ValueError if the folder contains no masked language model, or
        if the model's vocabulary lacks the word for a direction."""
        reader = _Reader(self.model)
        kept = {*(f"<{n}>" for n in names_in(prompt)), *(w for noun in class_nouns.values() for w in noun.split())}
        words = prompt.split()
        whole = reader.views(without(prompt, class_nouns))
        out = {direction: list(words) for direction in DIRECTIONS}
        for i, word in enumerate(words):
            if re.sub(r"[^\w<>-]", "", word) in kept:
                continue
            part = reader.views(without(" ".join(words[:i] + words[i + 1 :]), class_nouns))
            ratio = whole / torch.lerp(part, whole, 0.5)
            for direction, value in zip(DIRECTIONS, ratio.tolist(), strict=True):
                if value < self.threshold:
                    out[direction][i] = ""
        return {direction: " ".join(w for w in out[direction] if w) for direction in DIRECTIONS}


class _Reader:
    """A masked language model that estimates how likely each view is."""

    def __init__(self, folder: Any) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: Any = AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            if of_the_machine(error):
                raise
            raise ValueError(
                f"debias.model = {folder} is not a masked language model: {str(error).splitlines()[0]}"
            ) from None
        pieces = {d: self.tokenizer.encode(d, add_special_tokens=False) for d in DIRECTIONS}
        unknown = [d for d, ids in pieces.items() if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id]
        if unknown:
            raise ValueError(f"debias.model = {folder}: its tokenizer has no single token for {', '.join(unknown)}")
        self.views_ids = [ids[0] for ids in pieces.values()]

    @torch.no_grad()
    def views(self, prompt: str) -> Tensor:
        """Returns the probability of each direction, `[4]`."""
        text = _QUESTION.format(mask=self.tokenizer.mask_token, prompt=prompt)
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True)
        place = (inputs["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()[0, 0]
        return self.model(**inputs).logits[0, place, self.views_ids].softmax(-1)
