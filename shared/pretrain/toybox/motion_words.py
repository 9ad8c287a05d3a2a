"""Adds the motion words, which picture captions never use, to the tokenizer and the text model. Each word becomes
one token with its own embedding.

Generated pictures do not change, because all other words keep their ids and embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.toybox.captions import vocabulary
from shared.toybox.motions.clip_captions import PHRASES
from shared.toybox.tokenizer import clean_words, is_one_token

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


def motion_words() -> list[str]:
    """Returns, in alphabetical order, the words that occur in motion phrases but in no picture caption."""
    pictures = set(clean_words(vocabulary()))
    return [word for word in clean_words(p for phrases in PHRASES.values() for p in phrases) if word not in pictures]


def add_words(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> list[int]:
    """Makes each motion word a single token, in place. Returns the sorted ids of all motion words.

    Each new embedding is initialised with the mean embedding of the words in picture captions, plus noise (seed 0) with
    a tenth of the standard deviation of these embeddings. The new embedding is therefore within the range that the
    network has seen. Motion words that are already a single token keep their embeddings.
    """
    from transformers import AddedToken

    words = motion_words()
    new = [word for word in words if not is_one_token(tokenizer, word)]
    known = len(tokenizer)
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in new])
    if new:
        table: Any = text_encoder.get_input_embeddings()
        rows = table.weight.detach()
        grown = nn.Embedding(known + len(new), rows.shape[1], dtype=rows.dtype, device=rows.device)
        with torch.no_grad():
            grown.weight[:known] = rows
            grown.weight[known:] = _first(tokenizer, rows, len(new))
        grown.weight.requires_grad_(table.weight.requires_grad)
        text_encoder.set_input_embeddings(grown)
        text_encoder.config.vocab_size = known + len(new)
    ids: list[int] = [tokenizer(word)["input_ids"][1] for word in words]  # pyright: ignore[reportAssignmentType]
    return sorted(ids)


def _first(tokenizer: CLIPTokenizer, rows: Tensor, count: int) -> Tensor:
    said = [tokenizer(word)["input_ids"] for word in clean_words(vocabulary())]
    seen = rows[sorted({ids[1] for ids in said if len(ids) == 3})].float()  # pyright: ignore[reportArgumentType]
    noise = torch.randn(count, rows.shape[1], generator=torch.Generator().manual_seed(0))
    return (seen.mean(0) + 0.1 * seen.std(0) * noise.to(rows.device)).to(rows.dtype)
