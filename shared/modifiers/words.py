"""Concepts named by words that the text encoder already knows."""

from __future__ import annotations

import warnings
from typing import Literal

from shared.backbones.protocol import Backbone
from shared.config import KindPart
from shared.modifiers.base import PlaceholderBase, phrase


class PlainText(KindPart):
    """`<name>` is said in plain words; with none, by the class noun alone."""

    kind: Literal["plain_text"] = "plain_text"
    words: str = ""
    with_class_noun: bool = True

    def attach(self, backbone: Backbone, name: str, class_noun: str, seed: int = 0) -> PlaceholderBase:
        return _attach(backbone, PlaceholderBase(name, phrase(self.words, class_noun, self.with_class_noun)))


class RareToken(KindPart):
    """A rare word of the vocabulary stands for the subject: "sks mug" (DreamBooth, https://arxiv.org/abs/2208.12242).

    A token that a tokenizer splits is accepted, with one warning that names the pieces."""

    kind: Literal["rare_token"] = "rare_token"
    token: str = "sks"
    with_class_noun: bool = True

    def attach(self, backbone: Backbone, name: str, class_noun: str, seed: int = 0) -> PlaceholderBase:
        placeholder = _attach(backbone, PlaceholderBase(name, phrase(self.token, class_noun, self.with_class_noun)))
        encoders = [c for c in backbone.components if c.startswith("text_encoder")] if self.token.strip() else []
        split = {c: pieces for c in encoders if len(pieces := backbone.word_pieces(c, self.token)) > 1}
        if split:
            read = "; ".join(f"{c}: {' + '.join(map(repr, pieces))}" for c, pieces in split.items())
            warnings.warn(
                f"modifier.token={self.token!r} is not one token here ({read}): pieces are words of their own that the "
                "model knows, so a rarer single token holds a subject better",
                stacklevel=2,
            )
        return placeholder


def _attach(backbone: Backbone, placeholder: PlaceholderBase) -> PlaceholderBase:
    backbone.add_placeholder(placeholder)
    return placeholder
