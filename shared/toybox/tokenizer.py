"""The toybox's own CLIP tokenizer, in which every word of the toybox world is one token.

The vocabulary is a byte-pair encoding *trained to exhaustion* on a fixed word list. Merges are learned until each
listed word is a single symbol, so each listed word becomes exactly one token (tested). Other text falls back to shorter
symbols, down to single bytes, as in OpenAI's CLIP, so no text is ever unknown. The tokenizer is an ordinary
``transformers.CLIPTokenizer``. New tokens are added with ``add_tokens`` and the text model's
``resize_token_embeddings``.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 32
"""The maximum number of tokens per prompt, including the start and end tokens (``model_max_length``)."""

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"

RARE_TOKENS: tuple[str, ...] = ("sks", "zwx", "ohwx", "xjy", "qrt", "vbn", "hta", "olis", "pll", "ucd", "wvf", "zkm")
"""Words that mean nothing in the toybox world. Each is one token and can be used as an identifier, as in DreamBooth."""

PROMPT_WORDS: tuple[str, ...] = tuple(
    """a an the of in on at with and or to from by is are this that its it one two three some no not my your
    photo picture image drawing painting sketch rendering render illustration depiction photograph shot view scene style
    good bad nice cool clean dirty dark bright close up cropped large small big tiny little weird rotated background
    front side back above left right top below behind beside next near under over around middle center
    wearing holding standing sitting floating lying facing seen shaped made covered
    red green blue yellow orange purple pink white black brown gray grey cyan teal golden shiny wet striped dotted
    spotted checkered plain pattern patterned colorful rainbow santa hat scarf glasses shirt outfit crown bow cap
    jungle snow beach street cobblestone fabric wooden floor city mountain house rug forest wheat field tree autumn
    leaves water ocean milk grass sunflowers mirror sidewalk road dirt desert sky night sunset sea room studio wall
    toy object thing animal stuffed plush vehicle figure character face person portrait man woman cartoon statue
    backpack bowl can candle cat clock sneaker dog boot duck monster robot car sunglasses teapot vase wolf bear cube
    pixel art watercolor pencil ink pastel neon flat line outline sepia gray-scale monochrome silhouette poster
    spinning turning moving jumping walking bouncing waving slowly fast video clip blurry ugly low high quality
    sharp detailed""".split()  # noqa: SIM905 - readable as prose
)
"""Words that are used in prompts. Some of them do not occur in the toybox's captions."""

_BYTES_PER_SYMBOL = 256


def byte_symbols() -> list[str]:
    """Returns the 256 printable stand-ins for bytes that GPT-2 and CLIP use, in CLIP's order.

    Returns:
        one character per byte value, printable bytes first (Radford et al., GPT-2's ``bytes_to_unicode``)
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(_BYTES_PER_SYMBOL) if b not in set(printable)]
    return [chr(b) for b in printable] + [chr(_BYTES_PER_SYMBOL + i) for i in range(len(others))]


def world_words() -> list[str]:
    """Returns the words of the toybox's captions, the prompt words and the rare tokens, sorted and unique.

    Returns:
        lower-case words that consist only of letters; other words are split, as they are by CLIP's pre-tokenizer
    """
    from shared.toybox import captions

    return clean_words([*captions.vocabulary(), *PROMPT_WORDS, *RARE_TOKENS])


def clean_words(words: Iterable[str]) -> list[str]:
    """Splits words at all characters except ASCII letters. Returns the parts in lower case, sorted and without
    duplicates."""
    parts: set[str] = set()
    for word in words:
        spaced = "".join(c if c.isascii() and c.isalpha() else " " for c in word.lower())
        parts.update(spaced.split())
    return sorted(parts)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Learns byte-pair merges (Sennrich et al., arXiv 1508.07909) until each of ``words`` is one symbol.

    Ties are broken alphabetically, so the result depends only on the words.

    Returns:
        the merges, in the order in which they are applied
    """
    pieces = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(word):
        hit = i + 1 < len(word) and (word[i], word[i + 1]) == pair
        merged.append(word[i] + word[i + 1] if hit else word[i])
        i += 2 if hit else 1
    return merged


def build(words: Sequence[str] | None = None) -> CLIPTokenizer:
    """Builds the tokenizer for ``words``. The same words always give the same tokenizer.

    The ids are assigned in this order: 256 bytes, 256 bytes at the end of a word, the merges, the start token and the
    end token. The end token is also used for padding, as in CLIP.

    Args:
        words: the words that become one token each, once ``clean_words`` has split them. If None, the words of
            ``world_words`` are used.

    Returns:
        a ``CLIPTokenizer`` whose ``model_max_length`` is ``MAX_LENGTH``
    """
    from transformers import CLIPTokenizer

    vocab, merges = _vocab_and_merges(world_words() if words is None else clean_words(words))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)  # pyright: ignore[reportArgumentType]
    return cast("CLIPTokenizer", tokenizer)


def _vocab_and_merges(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = learn_merges(words)
    symbols = byte_symbols()
    names = [*symbols, *(s + END_OF_WORD for s in symbols), *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    return {name: i for i, name in enumerate(names)}, merges


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes ``tokenizer.json`` and its config. Also writes ``vocab.json`` and ``merges.txt``, which older versions of
    transformers need."""
    tokenizer.save_pretrained(str(folder))
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")


def is_one_token(tokenizer: CLIPTokenizer, word: str) -> bool:
    """Returns whether ``word`` is tokenized as a single token between the start and end tokens."""
    return len(tokenizer(word)["input_ids"]) == 3
