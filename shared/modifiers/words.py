"""Names concepts with words that the text encoder already knows."""

from __future__ import annotations

import warnings
from typing import Literal

from shared.backbones.protocol import Backbone
from shared.config import KindPart
from shared.modifiers.base import PlaceholderBase, phrase


class PlainText(KindPart):
    """Replaces `<name>` with plain words, or with only the class noun if no words are set."""

    kind: Literal["plain_text"] = "plain_text"
    words: str = ""  # the words that stand for the concept
    with_class_noun: bool = True  # whether the class noun follows the words

    def attach(self, backbone: Backbone, name: str, class_noun: str, seed: int = 0) -> PlaceholderBase:
        return _attach(backbone, PlaceholderBase(name, phrase(self.words, class_noun, self.with_class_noun)))


class RareToken(KindPart):
    """Names the subject with a rare word, as in "sks mug" (DreamBooth, https://arxiv.org/abs/2208.12242).

    If a tokenizer splits the word, it is still accepted, but a warning lists the pieces."""

    kind: Literal["rare_token"] = "rare_token"
    token: str = "sks"  # the rare word
    with_class_noun: bool = True  # whether the class noun follows the word

    def attach(self, backbone: Backbone, name: str, class_noun: str, seed: int = 0) -> PlaceholderBase:
        placeholder = _attach(backbone, PlaceholderBase(name, phrase(self.token, class_noun, self.with_class_noun)))
        encoders = [c for c in backbone.components if c.startswith("text_encoder")] if self.token.strip() else []
        split = {c: pieces for c in encoders if len(pieces := backbone.word_pieces(c, self.token)) > 1}
        if split:
            read = "; ".join(f"{c}: {' + '.join(map(repr, pieces))}" for c, pieces in split.items())
            warnings.warn(
                f"modifier.token={self.token!r} is not a single token here ({read}). The model already knows these pieces "
                "as words, so a rare word that is a single token represents a subject better.",
                stacklevel=2,
            )
        return placeholder


def _attach(backbone: Backbone, placeholder: PlaceholderBase) -> PlaceholderBase:
    backbone.add_placeholder(placeholder)
    return placeholder
