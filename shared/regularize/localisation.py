"""Keeps the attention to each concept's words inside the concept's mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from shared.backbones.attention_maps import Record
from shared.backbones.attention_maps_need import AttentionMaps
from shared.config import NotNegative
from shared.regularize.base import Penalty
from shared.types import Step

Distance = Literal["squared", "cross_entropy"]


class Localisation(Penalty):
    """Adds weight * |A(concept) - mask|^2 to the loss, summed over the concepts in each instance picture or clip and averaged
    over these examples (Break-A-Scene, https://arxiv.org/abs/2305.16311, eq. 3).

    A is the picture's attention to the concept's tokens. It is averaged over heads, selected layers and tokens, and
    divided by its maximum, as in the paper's code. By default, A is compared with the mask at the scale nearest to
    16×16, because the layers of a full-size model localise objects best at this resolution. Each subject needs a mask.
    With `distance: cross_entropy`, A is treated as the probability that a position belongs to the concept (MotionBooth,
    https://arxiv.org/abs/2406.17758, eq. 4).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention_maps"})
    needs_masks: ClassVar[bool] = True
    kind: Literal["localisation"] = "localisation"
    weight: NotNegative = 1e-2  # multiplies the penalty
    scales: tuple[
        Annotated[int, Field(ge=1, le=1024)], ...
    ] = ()  # scales of the layers, relative to the latents; if empty, the scale nearest to 16×16
    normalize: Literal["max", "none"] = "max"  # with max, maps are divided by their maximum
    distance: Distance = "squared"

    @property
    def provides(self) -> tuple[AttentionMaps, ...]:
        """The attention maps at the scales that this penalty uses."""
        return (AttentionMaps(scales=frozenset(self.scales)),)

    def __call__(self, step: Step) -> Tensor:
        masks = step.batch.owner_masks
        if not masks:  # only this batch lacks masks; a run in which no picture has a mask is rejected at the start
            return step.prediction.sum() * 0
        record: Record = step.need("attention_maps")
        positions = step.conditioning.token_positions
        instance = step.batch.with_role("instance").to(step.prediction.device)
        grids: dict[tuple[int, int], list[Tensor]] = {}
        for name in record:
            length = next(iter(positions.values())).shape[1] if positions else 0
            grid = record.sites[name].grid(*step.x_t.shape[-2:])
            grids.setdefault(grid, []).append(record.text_map(name, length))
        losses = [
            localisation_loss(
                torch.stack(maps).mean(0), grid, positions, masks, instance, self.normalize, self.distance
            )
            for grid, maps in grids.items()
        ]
        return self.weight * torch.stack(losses).mean()


def localisation_loss(
    maps: Tensor,
    grid: tuple[int, int],
    positions: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    counted: Tensor,
    normalize: Literal["max", "none"] = "max",
    distance: Distance = "squared",
) -> Tensor:
    """Returns the mean distance between maps and masks, summed over concepts and averaged over examples, as a scalar.

    A concept counts only in examples whose text names it and in which its mask is not empty.

    Args:
        maps: probabilities [B, rows * columns of the grid, L] for pictures. For clips of f frames, [B, f * rows * columns, L]
            or, from networks that process each frame as a picture, [B * f, rows * columns, L]
        grid: the number of rows and the number of columns
        positions: for each concept, a bool mask [B, L] of its tokens
        masks: for each concept, its masks [B, 1, h, w] or [B, 1, f, h, w] in [0, 1]
        counted: bool [B], True for the examples that count
        normalize: if "max", each map is divided by its maximum. The maximum of a clip is taken over all frames, because the
            concept may be absent from some of them
        distance: how the distance between map and mask is measured at each position
    """
    batch = len(counted)
    maps = maps.reshape(batch, -1, maps.shape[-1])
    total = maps.new_zeros(batch)
    for owner in sorted(positions.keys() & masks.keys()):
        at, mask = positions[owner].to(maps), masks[owner].to(maps)
        visible = at.any(1) & mask.flatten(1).any(1)
        map_ = torch.einsum("bpl,bl->bp", maps, at) / at.sum(1).clamp_min(1)[:, None]
        if normalize == "max":
            map_ = map_ / map_.amax(1, keepdim=True).clamp_min(torch.finfo(map_.dtype).tiny)
        target = F.adaptive_avg_pool2d(mask.flatten(0, -3), grid).reshape(batch, -1)
        total = (
            total
            + (_cross_entropy(map_, target) if distance == "cross_entropy" else (map_ - target) ** 2).mean(1) * visible
        )
    return total[counted.to(total.device)].mean() if counted.any() else total.sum() * 0


def _cross_entropy(chance: Tensor, target: Tensor) -> Tensor:
    """Returns -target log(chance) - (1 - target) log(1 - chance) for two tensors in [0, 1] of the same shape. Torch's
    equivalent function does not work under autocast."""
    chance = chance.float().clamp(1e-6, 1 - 1e-6)
    return -(target * chance.log() + (1 - target) * (1 - chance).log())
