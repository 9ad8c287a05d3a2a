"""Heads that read off the U-Net's features what the renderer knows of a picture, and so teach it what it draws.

The squared error of latents says little about small parts: an eye is a hundredth of it. While the U-Net learns, its features
must tell coverage, depth, normal, object-space position and part of what is seen, cell by cell (representation alignment,
arXiv 2410.06940, with the truth in the place of another network's features). The heads are thrown away afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.pretrain.toybox import truth_maps as maps
from shared.toybox.part_colors import SLOTS

_WIDTH = 128
_MEASURED = maps.SLOT  # channels before the slots
#: How much a cell's slot counts: the two colours of a thing cover most of it, and all that is small is among the others.
_SLOT_WEIGHTS = [{"main": 0.25, "second": 0.5}.get(name, 1.0) for name in SLOTS]


class TruthHeads(nn.Module):
    """Reads truth maps off the middle of a U-Net and its two finest levels on the way up.

    The U-Net may run in several threads, so each remembers its own features.
    """

    slot_weights: Tensor

    def __init__(self, unet: Any) -> None:
        super().__init__()
        config = unet.config
        self.side = 2 * config.sample_size
        levels = len(config.block_out_channels)
        features = (
            ("mid", unet.mid_block, config.block_out_channels[-1], 2**levels),
            ("before", unet.up_blocks[-2], config.block_out_channels[1], 2),
            ("finest", unet.up_blocks[-1], config.block_out_channels[0], 2),
        )
        self.heads = nn.ModuleDict({name: _head(channels, finer) for name, _, channels, finer in features})
        self.register_buffer("slot_weights", torch.tensor(_SLOT_WEIGHTS), persistent=False)
        self.seen = threading.local()
        for name, block, *_ in features:
            block.register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            setattr(self.seen, name, output)

        return keep

    def forward(self) -> dict[str, Tensor]:
        """What each head reads, of the U-Net's latest forward pass in this thread: logits of coverage, depth, normal and
        position, logits of slots, [B, 8 + slots, S, S]."""
        return {name: head(getattr(self.seen, name)).float() for name, head in self.heads.items()}

    def loss(self, truth: Tensor, clarity: Tensor, weights: Sequence[float]) -> Tensor:
        """What the heads read wrongly, of the U-Net's latest forward pass in this thread.

        Args:
            truth: int8 [B, 9, S, S] as `truth_maps`, S twice the side of the latents
            clarity: [B] how much each picture counts: under much noise the answer is not determined
            weights: of coverage, depth, normal, position and slot

        Returns:
            a scalar, the mean over pictures and heads
        """
        return torch.stack([self._wrong(read, truth, clarity, weights) for read in self().values()]).mean()

    def _wrong(self, read: Tensor, truth: Tensor, clarity: Tensor, weights: Sequence[float]) -> Tensor:
        measured, slots = maps.decode(truth)
        cover, depth, normal, position, slot = weights
        mask = F.binary_cross_entropy_with_logits(read[:, maps.MASK], measured[:, maps.MASK], reduction="none")
        total = cover * (mask.mean((1, 2, 3)) * clarity).sum()
        seen = slots >= 0
        share = seen / seen.sum((1, 2), keepdim=True).clamp_min(1)
        row = torch.where(seen)[0]
        # Only what is covered: a quarter of the cells.
        found, true, name = read.movedim(1, -1)[seen], measured.movedim(1, -1)[seen], slots[seen]
        error = (found[:, :_MEASURED] - true).abs()
        parts = (depth, maps.DEPTH), (normal, maps.NORMAL), (position, maps.POSITION)
        wrong = torch.stack([weight * error[:, part].sum(1) for weight, part in parts]).sum(0)
        total = total + (wrong * share[seen] * clarity[row]).sum()
        counted = self.slot_weights[name]
        whole = counted.new_zeros(len(truth)).index_add_(0, row, counted)
        entropy = F.cross_entropy(found[:, _MEASURED:], name, reduction="none") * counted / whole[row]
        return (total + slot * (entropy * clarity[row]).sum()) / len(truth)


def _head(channels: int, finer: int) -> nn.Module:
    """[B, channels, s, s] to what is read, [B, 8 + slots, finer * s, finer * s]."""
    outputs = _MEASURED + len(SLOTS)
    return nn.Sequential(
        nn.GroupNorm(1, channels),
        nn.Conv2d(channels, _WIDTH, 1),
        nn.SiLU(),
        nn.Conv2d(_WIDTH, outputs * finer**2, 1),
        nn.PixelShuffle(finer),
    )
