"""The token overlay, which adds words to a base model without changing its embedding table or its tokenizer.

Added tokens get ids after the base vocabulary, in a copy of the tokenizer. The text encoder never sees those ids: it
gets a harmless base id in their place, and while it runs, a hook inserts the learned vectors at those positions. As a
result, embedding tables keep their size, gradients reach the vectors, the end-of-text pooling of old CLIP configurations
(`argmax` of the ids) stays correct, and the original state returns once the last added token is removed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.io.terminal import check_utf8

#: Refers to the end-of-text token wherever words are expected. A learned token cannot be equal to it, because learned
#: tokens contain no whitespace.
END = "<end of text>"


@dataclass(frozen=True)
class Tokenized:
    """Prompts tokenized for one text encoder, padded to its maximum length."""

    ids: Tensor  # [B, L]; added tokens have their own ids
    mask: Tensor  # [B, L]; 1 for text, 0 for padding


class TokenOverlay:
    """A backbone's tokenizers, by the name of the text encoder, and the tokens added to them.

    Args:
        tokenizers: the base tokenizers; never changed
        max_length: tokens per prompt that each text encoder reads, including special tokens
    """

    def __init__(self, tokenizers: Mapping[str, Any], max_length: Mapping[str, int]) -> None:
        self.base = dict(tokenizers)
        self.current: dict[str, Any] = dict(tokenizers)
        self.max_length = dict(max_length)
        self.tokens: tuple[str, ...] = ()

    def check_new(self, tokens: Sequence[str]) -> None:
        """Raises ValueError when a token is empty, contains whitespace, is repeated, or is already taken."""
        for i, token in enumerate(map(check_utf8, tokens)):
            if not token or any(c.isspace() for c in token):
                raise ValueError(f"token {token!r} must not be empty or contain whitespace")
            if token in tokens[:i]:
                raise ValueError(f"token {token!r} is listed twice")
            for component, tokenizer in self.current.items():
                if token in tokenizer.get_vocab():
                    raise ValueError(f"token {token!r} is already in the vocabulary of {component}; choose another")

    def set(self, tokens: Sequence[str]) -> None:
        """Resets to the base tokenizers plus these tokens, matched exactly (case, hyphens and digits matter)."""
        self.tokens = tuple(tokens)
        if not tokens:
            self.current = dict(self.base)
            return
        from transformers import AddedToken

        added = [AddedToken(t, single_word=False, lstrip=False, rstrip=False, normalized=False) for t in tokens]
        for component, tokenizer in self.base.items():
            fresh = copy.deepcopy(tokenizer)
            fresh.add_tokens(added)
            self.current[component] = fresh

    def tokenize(self, component: str, prompts: Sequence[str], device: torch.device) -> Tokenized:
        """Tokenizes `prompts`, padded and truncated to the encoder's maximum length, as in diffusers' pipelines."""
        out = self.current[component](
            [check_utf8(prompt) for prompt in prompts],  # a tokenizer reports invalid text only as a type error
            padding="max_length",
            max_length=self.max_length[component],
            truncation=True,
            return_tensors="pt",
        )
        return Tokenized(out.input_ids.to(device), out.attention_mask.to(device))

    def overflow(self, component: str, prompt: str) -> str:
        """Returns the end of `prompt` that this encoder would cut off, or "" if the whole prompt fits."""
        tokenizer = self.current[component]
        room = self.max_length[component] - tokenizer.num_special_tokens_to_add()
        out = tokenizer(check_utf8(prompt), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if len(out["input_ids"]) <= room:
            return ""
        return prompt[out["offset_mapping"][room][0] :].strip()

    def ids_of(self, component: str, tokens: Sequence[str]) -> list[int]:
        """Returns the ids of added tokens."""
        return [self.current[component].convert_tokens_to_ids(t) for t in tokens]

    def find(self, component: str, ids: Tensor, tokens: Sequence[str], words: str) -> Tensor:
        """Returns a bool mask [B, L] of a concept's positions. These are the positions of its added tokens or, if it
        has no tokens, of every occurrence of its `words`."""
        if tokens:
            return torch.isin(ids, torch.tensor(self.ids_of(component, tokens), device=ids.device))
        positions = torch.zeros_like(ids, dtype=torch.bool)
        pattern = (
            self.current[component](check_utf8(words), add_special_tokens=False)["input_ids"] if words.strip() else []
        )
        n = len(pattern)
        if not 0 < n <= ids.shape[1]:
            return positions
        hits = (ids.unfold(1, n, 1) == torch.tensor(pattern, device=ids.device)).all(-1)  # [B, L-n+1]
        for i in range(n):
            positions[:, i : i + hits.shape[1]] |= hits
        return positions

    def find_words(self, component: str, prompts: Sequence[str], words: str) -> Tensor:
        """Returns a bool mask [B, L] on the CPU, True where `words` occur in the prompts as this encoder reads them. Matches
        inside longer words and truncated matches do not count. Added tokens count as words.

        Args:
            words: text, matched case-insensitively unless it contains an added token, or END for the end-of-text token

        Raises:
            ValueError: when `words` is empty
        """
        length = self.max_length[component]
        out = self.current[component](
            list(prompts), padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True
        )
        positions = torch.zeros(len(prompts), length, dtype=torch.bool)
        if words == END:
            positions[torch.arange(len(prompts)), torch.tensor(out["attention_mask"]).sum(1) - 1] = True
            return positions
        pattern = _whole(words, any(token in words for token in self.tokens))
        for row, (prompt, offsets) in enumerate(zip(prompts, out["offset_mapping"], strict=True)):
            # a T5 token may include the space before its word
            spans = [(a + len(prompt[a:b]) - len(prompt[a:b].lstrip()), b) for a, b in offsets]
            starts, ends = ({span[i] for span in spans if span[0] < span[1]} for i in (0, 1))
            for start, end in (match.span() for match in pattern.finditer(prompt)):
                if start in starts and end in ends:  # otherwise the match begins or ends inside a token
                    positions[row] |= torch.tensor([start <= a < b <= end for a, b in spans])
        return positions

    def filler(self, component: str) -> int:
        """Returns the base id that is put in place of added tokens. It is the lowest id that does not belong to a
        special token."""
        special = set(self.base[component].all_special_ids)
        return next(i for i in range(len(special) + 1) if i not in special)

    def word_ids(self, component: str, words: str) -> list[int]:
        """Returns the base ids of `words` without special tokens. Raises ValueError when there are none."""
        ids = self.base[component](check_utf8(words), add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"{words!r} contains no word that {component} can read")
        return list(ids)

    def pieces(self, component: str, words: str) -> tuple[str, ...]:
        """Returns the pieces into which the base tokenizer splits `words`, without word-boundary marks."""
        pieces = self.base[component].convert_ids_to_tokens(self.word_ids(component, words))
        return tuple(p for p in (str(t).replace("</w>", "").replace("▁", "") for t in pieces) if p)


def _whole(words: str, exact: bool) -> re.Pattern[str]:
    """Returns a pattern that matches `words` with any whitespace between them and no letter or digit directly around them."""
    parts = check_utf8(words).split()
    if not parts:
        raise ValueError("words must not be empty, because their positions in the prompts are needed")
    before, after = (r"(?<!\w)" if words.strip()[0].isalnum() else "", r"(?!\w)" if words.strip()[-1].isalnum() else "")
    return re.compile(before + r"\s+".join(map(re.escape, parts)) + after, 0 if exact else re.IGNORECASE)


def slots(ids: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Returns, for every position of `ids` ([B, L]), the index of its id in `token_ids`, or -1 if it is not in the
    list."""
    out = torch.full_like(ids, -1)
    for i, token in enumerate(token_ids):
        out[ids == token] = i
    return out


@contextmanager
def overlaid(embedding: nn.Module, places: Tensor, vectors: Tensor) -> Iterator[None]:
    """Inside the context, the embedding's output is `vectors` wherever `places` is not -1.

    Args:
        embedding: the token embedding; its output is [B, L, d]
        places: [B, L], indices into the vectors, or -1
        vectors: [n, d], or [B, n, d] if each sample has its own; differentiable
    """

    def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        at = places.clamp_min(0)
        picked = (
            vectors[at] if vectors.ndim == 2 else vectors[torch.arange(vectors.shape[0], device=at.device)[:, None], at]
        )
        return torch.where((places >= 0)[..., None], picked.to(output), output)

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def join_embeddings(parts: Sequence[Tensor], batch: int) -> Tensor:
    """Joins the vectors of several placeholders into one table [N, d]. If any placeholder has per-sample vectors, the
    table is [B, N, d]."""
    if all(p.ndim == 2 for p in parts):
        return torch.cat(list(parts))
    return torch.cat([p if p.ndim == 3 else p.expand(batch, *p.shape) for p in parts], dim=1)


def same_embeddings(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two sets of vectors give the same encoding *and* the same gradients, so that one encoder run serves both.

    Trainable vectors are the same only if they share memory, because sites that start out equal must be able to diverge.
    """

    def equal(x: Tensor, y: Tensor) -> bool:
        if x is y:
            return True
        if x.requires_grad or y.requires_grad:
            place = (x.data_ptr(), x.shape, x.stride(), x.requires_grad)
            return place == (y.data_ptr(), y.shape, y.stride(), y.requires_grad)
        return x.shape == y.shape and torch.equal(x, y)

    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
