"""What a picture shows at every pixel, without painting it: coverage, depth, position, normal, and the part that is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from shared.toybox.splat import DISTANCE, Hits, groups, instances, turned, visible
from shared.toybox.world import Scene

FAR = 2 * DISTANCE  # the depth of the background
SPACING = 0.02  # of neighbouring points of a surface, in pictures of 64 pixels
_CHUNK = 32
T = TypeVar("T")


@dataclass(frozen=True)
class Surfaces:
    """The geometry of B pictures of H×W pixels, as a photo shows it.

    mask: [B, 1, H, W], the part of each pixel that things cover; depth: [B, 1, H, W] in radii of the thing from its
    camera (10 in the background); position: [B, 3, H, W], object space of the thing (unit sphere, x forward, y left,
    z up); normal: [B, 3, H, W] seen by the camera (right, up, towards it, before its roll), the mean of unit vectors
    over what is covered; both 0 in the background; slot: int64 [B, H, W], the colour slot (`part_colors.SLOTS`) of
    the nearest surface, -1 where things cover less than half.
    """

    mask: Tensor
    depth: Tensor
    position: Tensor
    normal: Tensor
    slot: Tensor


def surfaces(scenes: Sequence[Scene], size: int = 64, device: str | torch.device = "cpu") -> Surfaces:
    """The geometry of the pictures that `render` draws of the same scenes at the same size, with the same bits."""
    where = torch.device(device)
    return by_chunks(Surfaces, scenes, lambda chunk: _chunk(chunk, size, where))


def by_chunks(kind: Callable[..., T], scenes: Sequence[Scene], draw: Callable[[list[Scene]], T]) -> T:
    """What `draw` makes of a few scenes at a time, a dataclass of tensors, as one of all of them.

    Raises:
        ValueError: there are no scenes
    """
    if not scenes:
        raise ValueError("there is nothing to draw: give at least one scene")
    drawn: list[Any] = [draw(list(scenes[i : i + _CHUNK])) for i in range(0, len(scenes), _CHUNK)]
    return kind(*(torch.cat([getattr(chunk, f.name) for chunk in drawn]) for f in fields(drawn[0])))


@torch.no_grad()
def _chunk(scenes: list[Scene], size: int, device: torch.device) -> Surfaces:
    things = instances(scenes, device)
    hits = visible(things, groups(things, SPACING * 64 / size, device), len(scenes), 2 * size)
    canvas = HitImage(hits, len(scenes), 2 * size)
    mask = canvas.scatter(torch.ones_like(hits.depth[:, None]))
    cover = halved(mask)
    weight = cover.clamp_min(1e-6)
    normal = canvas.scatter(turned(things.axes, hits.who, hits.normal))
    return Surfaces(
        cover,
        near_depth(canvas.depth(), mask),
        halved(canvas.scatter(hits.position)) / weight,
        halved(normal) / weight,
        _nearest_slot(canvas, cover),
    )


@dataclass(frozen=True)
class HitImage:
    """Where the hits of B scenes lie on pictures of S×S subpixels."""

    hits: Hits
    count: int
    side: int

    def scatter(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values [M, D] of the hits as pictures [B, D, S, S]."""
        flat = values.new_full((self.count * self.side * self.side, values.shape[1]), fill)
        flat[self.hits.at] = values
        return flat.view(self.count, self.side, self.side, -1).permute(0, 3, 1, 2)

    def depth(self) -> Tensor:
        """Depth [B, 1, S, S], `FAR` in the background."""
        return self.scatter(self.hits.depth[:, None], FAR)


def halved(picture: Tensor) -> Tensor:
    """The mean of 2×2 pixels: [B, C, S, S] to [B, C, S / 2, S / 2]."""
    rows = picture[..., ::2, :] + picture[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) * 0.25


def near_depth(depth: Tensor, mask: Tensor) -> Tensor:
    """The mean depth of what each pixel shows of things, `FAR` where it shows none: [B, 1, S, S] to half of it."""
    cover = halved(mask)
    return torch.where(cover > 0, halved(depth * mask) / cover.clamp_min(1e-6), torch.full_like(cover, FAR))


def _nearest_slot(canvas: HitImage, cover: Tensor) -> Tensor:
    depth, slot = _quarters(canvas.depth()), _quarters(canvas.scatter(canvas.hits.slot[:, None], -1))
    seen = slot.gather(1, depth.argmin(1, keepdim=True))
    return torch.where(cover >= 0.5, seen, -1)[:, 0]


def _quarters(picture: Tensor) -> Tensor:
    """[B, 1, S, S] to the four subpixels of each pixel, [B, 4, S / 2, S / 2]."""
    return torch.cat([picture[..., y::2, x::2] for y in (0, 1) for x in (0, 1)], 1)
