"""Selects some of a role's layers, by attention projection or by block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Projection = Literal["q", "k", "v", "out"]

#: Patterns for the last part of a layer's name, by projection. They cover the attention layers of diffusers (including
#: the text stream of joint attention), CLIP and T5.
_LEAVES: dict[Projection, str] = {
    "q": r"to_q|add_q_proj|q_proj|q",
    "k": r"to_k|add_k_proj|k_proj|k",
    "v": r"to_v|add_v_proj|v_proj|v",
    "out": r"to_out\.0|to_add_out|out_proj|o",
}
_BLOCK = re.compile(r"((?:.*?\.)??(?:mid_block|(?:\w*blocks?|layers)\.\d+))\.")
_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def of_projections(layers: Sequence[str], projections: Sequence[Projection]) -> list[str]:
    """Returns the layers that compute these attention projections. Leaves out feed-forward layers and convolutions."""
    pattern = re.compile(rf"(.*\.)?({'|'.join(_LEAVES[p] for p in projections)})")
    return [name for name in layers if pattern.fullmatch(name)]


def block_names(layers: Sequence[str]) -> list[str]:
    """Lists the blocks of a network in the order of the forward pass.

    In a transformer, these are all of its blocks (in FLUX, first the double-stream blocks, then the single-stream
    blocks). In a U-Net, they are the down levels, the middle block and the up levels.
    """
    found = dict.fromkeys(match[1] for name in layers if (match := _BLOCK.match(name)))
    order = ("down_blocks", "mid_block", "up_blocks")
    return sorted(found, key=lambda name: next((i for i, part in enumerate(order) if name.startswith(part)), -1))


def of_blocks(layers: Sequence[str], numbers: Sequence[int], blocks: Sequence[str]) -> list[str]:
    """Returns the layers inside the blocks with these numbers. Layers that are not in any block are left out."""
    inside = tuple(f"{blocks[n]}." for n in numbers)
    return [name for name in layers if name.startswith(inside)]


def parse_ranges(text: str) -> tuple[int, ...]:
    """Parses text such as `"0-9,12"` into sorted numbers.

    Raises ValueError when the text has another format, or when a range runs backwards.
    """
    if not _RANGES.fullmatch(text):
        raise ValueError(f"{text!r} is not a list of blocks: write numbers and ranges, counted from 0, such as 0-9,12")
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"{text!r}: the range {part} runs backwards; write {last}-{first}")
        numbers |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))
