"""Checks whether a model can tell two concepts apart by their words."""

from __future__ import annotations

from collections.abc import Sequence

from shared.backbones.protocol import Backbone, Placeholder


def confusable(backbone: Backbone, a: Placeholder, b: Placeholder) -> bool:
    """Returns whether, in every text encoder, the words of one placeholder are equal to or contained in those of the
    other (for example, "mug" in "sks mug"). Returns False if either placeholder has no words."""
    encoders = [c for c in backbone.components if c.startswith("text_encoder")]
    return bool(encoders) and all(_within(_read(backbone, c, a), _read(backbone, c, b)) for c in encoders)


def _read(backbone: Backbone, component: str, placeholder: Placeholder) -> list[str]:
    """Returns the words as a text encoder sees them. Added tokens are kept whole, and all other words are split by the
    encoder's tokenizer."""
    out: list[str] = []
    for word in placeholder.words.split():
        if word in placeholder.tokens:
            out.append(word)
        else:
            out += [piece.casefold() for piece in backbone.word_pieces(component, word)]
    return out


def _within(a: Sequence[str], b: Sequence[str]) -> bool:
    short, long = sorted((list(a), list(b)), key=len)
    return bool(short) and any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1))
